"""The last step: copy results into the layout and write reports. It never computes a number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from qsens.analysis.samples import SampleScores, read_samples
from qsens.grid import Cell, Plan
from qsens.manifest import (
    MANIFEST_SUFFIX,
    STATE_SUFFIX,
    Audit,
    Manifest,
    dump_json,
    find_manifest,
    read_manifest,
)
from qsens.pipeline.audit import find_audits
from qsens.pipeline.cell import failure_reason
from qsens.pipeline.drift import find_drift
from qsens.pipeline.plan import plan_json
from qsens.report.assets import ASSETS
from qsens.report.cell import write_cell
from qsens.report.findings import Drift, series_of
from qsens.report.model_index import write_model_index
from qsens.report.sweep import PAGE, SUMMARY, Summary, build_summary, read_summary, write_sweep
from qsens.report.views import protected
from qsens.store import SHOWN, Store, copy_file, make_directory, write_text

_TOP = 5


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
    manifests: dict[str, Manifest] = {}
    samples: dict[str, SampleScores] = {}
    missing: dict[str, str] = {}
    model_dir = store.model_dir()
    make_directory(model_dir)
    with FileLock(model_dir / ".publish.lock"):
        audits = find_audits(store)
        for cell in plan.cells:
            if store.is_done(cell):
                manifest = read_manifest(store.manifest(cell))
                manifest = manifest.model_copy(update={"audit": _audit_of(cell, audits)})
                manifests[cell.cell] = manifest
                found = _samples(store.state(cell), manifest)
                if found is not None:
                    samples[cell.cell] = found
                _publish_cell(store, cell, manifest, found)
            else:
                missing[cell.cell] = failure_reason(store, cell)
        sweep_dir = store.sweep_dir()
        write_text(sweep_dir / "plan.json", plan_json(plan))
        said = _said(store)
        summary = build_summary(
            plan,
            manifests,
            missing,
            {
                cell.cell: store.cell_dir(cell).relative_to(model_dir).as_posix()
                for cell in plan.cells
            },
            said.previous if said else _previous(store),
            samples,
            audits=audits,
        )
        drift = find_drift(plan, summary, model_dir / "sweeps")
        if said and said.drift and drift and _lost(said, drift):
            drift = said.drift
        summary = summary.model_copy(update={"drift": drift})
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
                "status": "done" if cell.cell in manifests else "missing",
                "manifest": str(store.published(cell)["manifest"])
                if cell.cell in manifests
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
        ``{manifest, reports: [...]}``, or ``{summary, reports: [...]}``

    Raises:
        UserError: There is no manifest, or more than one, or it is broken.
    """
    if (directory / SUMMARY).is_file():
        written = write_sweep(
            read_summary(directory / SUMMARY), directory.resolve(), single_file=single_file
        )
        return {"summary": str(directory / SUMMARY), "reports": [str(file) for file in written]}
    path = find_manifest(directory)
    manifest = read_manifest(path)
    state = path.with_name(path.name.removesuffix(MANIFEST_SUFFIX) + STATE_SUFFIX)
    written = write_cell(
        manifest,
        path.parent,
        _samples(state, manifest),
        assets=_assets(path.parent),
        single_file=single_file,
    )
    return {"manifest": str(path), "reports": [str(file) for file in written]}


def _samples(state: Path, manifest: Manifest) -> SampleScores | None:
    if not state.is_file():
        return None
    return read_samples(state, manifest.scheme.auto_quantize_method)


def _assets(directory: Path) -> Path:
    """Return the scripts that the layout shares; those beside the page in any other directory."""
    for parent in directory.resolve().parents[:4]:
        if parent.name == "layer-analysis":
            return parent / ASSETS
    return directory / ASSETS


def _audit_of(cell: Cell, audits: Sequence[Audit]) -> Audit | None:
    """Return the audit of a cell's pair: its verdict holds at every size."""
    return next((audit for audit in audits if series_of(audit) == series_of(cell)), None)


def _publish_cell(
    store: Store, cell: Cell, manifest: Manifest, samples: SampleScores | None
) -> None:
    directory = store.cell_dir(cell)
    shown = directory / SHOWN
    if shown.is_file() and shown.read_text(encoding="utf-8") > store.plan.sweep_id:
        return
    published = store.published(cell)
    if store.state(cell).is_file():
        copy_file(store.state(cell), published["state"])
    write_cell(manifest, directory, samples, assets=store.model_dir() / ASSETS)
    write_text(shown, store.plan.sweep_id)
    if manifest.audit is None:
        copy_file(store.manifest(cell), published["manifest"])
        return
    # The result itself never changes: what was found about it later stands in the copy alone.
    scored = json.loads(store.manifest(cell).read_text(encoding="utf-8"))
    audited = scored | {"audit": manifest.audit.model_dump(mode="json")}
    write_text(published["manifest"], dump_json(audited))


def _said(store: Store) -> Summary | None:
    """Return the sweep as it was published before."""
    path = store.sweep_dir() / SUMMARY
    return read_summary(path) if path.is_file() else None


def _lost(said: Summary, drift: Drift) -> bool:
    """Return whether results that a comparison once had are gone: then it stays as it was said."""
    return said.drift is not None and not set(said.drift.compared) <= set(drift.compared)


def _previous(store: Store) -> str | None:
    """Return the sweep before this one; once said, it stays, so that reports can be made again."""
    sweeps = store.model_dir() / "sweeps"
    if store.sweep_dir().parent != sweeps:
        return None
    earlier = [
        entry.name
        for entry in sweeps.glob("*")
        if entry.name < store.plan.sweep_id and (entry / SUMMARY).is_file()
    ]
    return max(earlier, default=None)
