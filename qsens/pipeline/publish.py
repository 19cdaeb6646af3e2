"""The last step: copy results into the layout and write reports. It never computes a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock

from qsens.grid import Cell, Plan
from qsens.manifest import Manifest, find_manifest, read_manifest
from qsens.pipeline.cell import failure_reason
from qsens.pipeline.plan import plan_json
from qsens.report.cell import write_cell
from qsens.report.model_index import write_model_index
from qsens.report.sweep import Summary, build_summary, protected, write_sweep
from qsens.store import SHOWN, Store, copy_file, write_text

_TOP = 5


def publish(plan: Plan) -> dict[str, Any]:
    """Publish what the cells of ``plan`` have; what is missing is named with its reason.

    Returns:
        ``{sweep_id, index, complete, cells, missing, counts, top}``, as the command prints it:
        ``counts`` are the cells in all, done, partial and missing; ``top`` the five groups with the
        largest mean share of the sensitivity.

    Raises:
        DiskFull: Nothing is half-written, and the next run completes it.
    """
    store = Store(plan)
    manifests: dict[str, Manifest] = {}
    missing: dict[str, str] = {}
    model_dir = store.model_dir()
    model_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(model_dir / ".publish.lock"):
        for cell in plan.cells:
            if store.is_done(cell):
                manifests[cell.cell] = read_manifest(store.manifest(cell))
                _publish_cell(store, cell, manifests[cell.cell])
            else:
                missing[cell.cell] = failure_reason(store, cell)
        sweep_dir = store.sweep_dir()
        write_text(sweep_dir / "plan.json", plan_json(plan))
        summary = build_summary(
            plan,
            manifests,
            missing,
            {
                cell.cell: store.cell_dir(cell).relative_to(model_dir).as_posix()
                for cell in plan.cells
            },
            _previous(store),
        )
        write_sweep(summary, sweep_dir)
        if sweep_dir != model_dir:
            write_model_index(model_dir)
    return {
        "sweep_id": plan.sweep_id,
        "index": str(sweep_dir / "index.html"),
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


def report(directory: Path) -> dict[str, Any]:
    """Write the reports of the one manifest in ``directory``, of ours or of the older layout.

    Returns:
        ``{manifest, reports: [...]}``

    Raises:
        UserError: There is no manifest, or more than one, or it is broken.
    """
    path = find_manifest(directory)
    written = write_cell(read_manifest(path), path.parent)
    return {"manifest": str(path), "reports": [str(file) for file in written]}


def _publish_cell(store: Store, cell: Cell, manifest: Manifest) -> None:
    directory = store.cell_dir(cell)
    shown = directory / SHOWN
    if shown.is_file() and shown.read_text(encoding="utf-8") > store.plan.sweep_id:
        return
    published = store.published(cell)
    if store.state(cell).is_file():
        copy_file(store.state(cell), published["state"])
    write_cell(manifest, directory)
    write_text(shown, store.plan.sweep_id)
    copy_file(store.manifest(cell), published["manifest"])


def _previous(store: Store) -> str | None:
    """Return the sweep before this one; once said, it stays, so that reports can be made again."""
    path = store.sweep_dir() / "summary.json"
    if path.is_file():
        return Summary.model_validate_json(path.read_bytes()).previous
    sweeps = store.model_dir() / "sweeps"
    if store.sweep_dir().parent != sweeps:
        return None
    earlier = [
        entry.name
        for entry in sweeps.glob("*")
        if entry.name < store.plan.sweep_id and (entry / "summary.json").is_file()
    ]
    return max(earlier, default=None)
