"""The last step: copy results into the layout and write reports. It never computes a number."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsens.analysis.series import series_of
from qsens.cells import CellSpec
from qsens.documents import dump_document, dump_json
from qsens.errors import Damaged
from qsens.grid import Plan
from qsens.pipeline.audit import find_audits
from qsens.pipeline.drift import find_drift
from qsens.pipeline.failures import failure_reason
from qsens.pipeline.plan import plan_json
from qsens.pipeline.stored import Result
from qsens.published import (
    Place,
    Shown,
    may_show,
    place_of,
    read_summary,
    sweep_before,
)
from qsens.reading import MOST_BYTES, has_file, read_json
from qsens.report.cell import CellReport, build_cell, write_cell
from qsens.report.model_index import write_model_index
from qsens.report.sweep import build_summary, write_sweep
from qsens.report.views import protected
from qsens.results import AGAIN, find_manifest
from qsens.schema.audit import Audit
from qsens.schema.manifest import Manifest
from qsens.schema.summary import Drift, Summary
from qsens.store import ANALYSIS, ASSETS, PAGE, PLAN, SUMMARY, SWEEPS, Store, publishing
from qsens.writing import copy_file, write_text

_TOP = 5
_UNVERIFIED_SWEEP = (
    "this summary was written before summaries had checksums: that it is as it was written is not "
    "verified"
)

log = logging.getLogger(__name__)


def publish(plan: Plan) -> dict[str, Any]:
    """Publish what the cells of ``plan`` have; what is missing is named with its reason.

    Returns:
        ``{sweep_id, index, complete, cells, missing, partial, counts, top}``, as the command prints
        it: ``missing`` and ``partial`` are ``{cell, reason}``; ``counts`` are the cells in all,
        done, partial and missing; ``top`` the five groups with the largest mean share of the
        sensitivity.

    Raises:
        DiskFull: Nothing is half-written, and the next run completes it.
    """
    store = Store(plan)
    results: dict[str, Result] = {}
    reports: dict[str, CellReport] = {}
    missing: dict[str, str] = {}
    model_dir = store.model_dir()
    with publishing(store):
        place = place_of(store)
        for cell in plan.cells:
            stored = _result(store, cell)
            if isinstance(stored, str):
                missing[cell.cell] = stored
            else:
                results[cell.cell] = stored
        audits = find_audits(store, {cell: result.manifest for cell, result in results.items()})
        for cell in plan.cells:
            if cell.cell not in results:
                continue
            stored = results[cell.cell]
            audited = stored.manifest.model_copy(update={"audit": _audit_of(cell, audits)})
            results[cell.cell] = Result(audited, stored.samples)
            reports[cell.cell] = build_cell(audited, stored.samples)
            if may_show(store, cell, place):
                _publish_cell(store, cell, results[cell.cell], reports[cell.cell], place)
        sweep_dir = store.sweep_dir()
        write_text(sweep_dir / PLAN, plan_json(plan.model_copy(update={"published": place.number})))
        said = _said(store)
        manifests = {cell: result.manifest for cell, result in results.items()}
        summary = build_summary(
            plan,
            reports,
            missing,
            {
                cell.cell: store.cell_dir(cell).relative_to(model_dir).as_posix()
                for cell in plan.cells
            },
            said.previous if said else sweep_before(store, place),
            audits=audits,
        )
        drift = find_drift(plan, summary, model_dir / SWEEPS, results)
        if said and said.drift and drift and _lost(said, drift):
            drift = said.drift
        summary = summary.model_copy(
            update={
                "drift": drift,
                "published": place.number,
                # What was said of this sweep stays, though what it was said of is gone.
                "notices": tuple(
                    dict.fromkeys(
                        [
                            *(said.notices if said else ()),
                            *store.damages(),
                            *_unverified(manifests),
                        ]
                    )
                ),
            }
        )
        write_sweep(summary, sweep_dir)
        if sweep_dir != model_dir:
            write_model_index(model_dir)
    return {
        "sweep_id": plan.sweep_id,
        "index": str(sweep_dir / PAGE),
        "complete": summary.complete,
        "cells": [
            {
                "cell": cell.cell,
                "status": "done" if cell.cell in results else "missing",
                "manifest": str(store.published(cell)["manifest"])
                if cell.cell in results
                else None,
            }
            for cell in plan.cells
        ],
        "missing": [{"cell": cell, "reason": reason} for cell, reason in missing.items()],
        "partial": [
            {"cell": cell.cell, "reason": "; ".join(cell.partial)} for cell in summary.partial
        ],
        "counts": {
            "cells": len(summary.cells),
            "done": len(summary.done),
            "partial": len(summary.partial),
            "missing": len(summary.missing),
        },
        "top": [
            {"layer": group.layer, "share": group.share}
            for group in protected(summary).groups[:_TOP]
        ],
    }


def report(directory: Path, *, single_file: bool = False) -> dict[str, Any]:
    """Write the reports of a directory: of the one manifest in it, or of the sweep.

    Args:
        directory: Holds one manifest, of ours or of the older layout, or a ``summary.json``.
        single_file: Whether the page holds its scripts, instead of sharing them.

    Returns:
        ``{manifest, reports: [...], notices: [...]}``, or the same with ``summary``

    Raises:
        Damaged: What the directory holds is not what was published there.
        UserError: There is no manifest, or more than one, or it is broken.
    """
    if has_file(directory / SUMMARY, remedy=AGAIN):
        summary = read_summary(directory / SUMMARY)
        if summary.checksum is None:
            summary = summary.model_copy(
                update={"notices": tuple(dict.fromkeys([*summary.notices, _UNVERIFIED_SWEEP]))}
            )
        written = write_sweep(summary, directory.resolve(), single_file=single_file)
        return {
            "summary": str(directory / SUMMARY),
            "reports": [str(file) for file in written],
            "notices": list(summary.notices),
        }
    path = find_manifest(directory)
    result = Result.at(path)
    written = write_cell(
        build_cell(result.manifest, result.samples),
        path.parent,
        assets=_assets(path.parent),
        single_file=single_file,
    )
    return {
        "manifest": str(path),
        "reports": [str(file) for file in written],
        "notices": _unverified({result.manifest.cell or path.stem: result.manifest}),
    }


def _result(store: Store, cell: CellSpec) -> Result | str:
    """Return the result of ``cell``, or why there is none."""
    try:
        if not has_file(store.manifest(cell), remedy=AGAIN, error=Damaged):
            return failure_reason(store, cell)
        return Result.read(store.result_dir(cell))
    except Damaged as error:
        return f"its stored result {error.what}; run the sweep again to compute it again"


def _unverified(manifests: Mapping[str, Manifest]) -> list[str]:
    """Say which results nobody can check: those of the older layout never could be."""
    unverified = [
        cell
        for cell, manifest in manifests.items()
        if manifest.schema_version and not manifest.verified
    ]
    if not unverified:
        return []
    return [
        f"{len(unverified)} of {len(manifests)} results were stored before results had checksums: "
        f"that they are as they were written is not verified; first {unverified[0]}"
    ]


def _assets(directory: Path) -> Path:
    """Return the scripts that the layout shares; those beside the page in any other directory."""
    for parent in directory.resolve().parents[:4]:
        if parent.name == ANALYSIS:
            return parent / ASSETS
    return directory / ASSETS


def _audit_of(cell: CellSpec, audits: Sequence[Audit]) -> Audit | None:
    """Return the audit of a cell's pair: its verdict holds at every size."""
    return next((audit for audit in audits if series_of(audit) == series_of(cell)), None)


def _publish_cell(
    store: Store, cell: CellSpec, result: Result, report: CellReport, place: Place
) -> None:
    directory, published = store.cell_dir(cell), store.published(cell)
    if has_file(store.state(cell), remedy=AGAIN):
        copy_file(store.state(cell), published["state"], remedy=AGAIN)
    write_cell(report, directory, assets=store.model_dir() / ASSETS)
    audit = result.manifest.audit
    if audit is None:
        copy_file(store.manifest(cell), published["manifest"], remedy=AGAIN)
    else:
        # The result itself never changes: what was found about it later stands in the copy alone.
        scored = read_json(store.manifest(cell), most=MOST_BYTES, remedy=AGAIN, error=Damaged)
        audited = scored | {"audit": audit.model_dump(mode="json")}
        # A copy can be checked where the result could.
        dump = dump_document if result.manifest.verified else dump_json
        write_text(published["manifest"], dump(audited))
    Shown(place, cell.digest).write(directory)


def _said(store: Store) -> Summary | None:
    """Return the sweep as it was published before; none where that cannot be read."""
    path = store.sweep_dir() / SUMMARY
    if not has_file(path, remedy=AGAIN):
        return None
    try:
        said = read_summary(path)
    except Damaged as error:
        log.warning("%s; it is made again", error)
        return None
    return said if said.sweep_id == store.plan.sweep_id else None


def _lost(said: Summary, drift: Drift) -> bool:
    """Return whether results that a comparison once had are gone: then it stays as it was said."""
    return said.drift is not None and not set(said.drift.compared) <= set(drift.compared)
