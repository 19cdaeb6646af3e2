"""A whole sweep in one process: plan, score, audit, publish."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qsens.errors import QsensError
from qsens.grid import Plan
from qsens.pipeline.audit import audit
from qsens.pipeline.cell import score
from qsens.pipeline.publish import publish
from qsens.pipeline.shared_checkpoint import SharedCheckpoint

CellProgress = Callable[[str, str, int, int], None]


def run_sweep(
    plan: Plan, *, progress: CellProgress | None = None
) -> tuple[dict[str, Any], list[QsensError]]:
    """Compute what is missing, cell by cell, audit it where the plan says so, and publish.

    A cell that cannot be computed fails alone; the rest goes on.

    Args:
        plan: The plan.
        progress: Called with a cell, a phase, steps done and steps in all.

    Returns:
        What ``publish`` returns, and the errors of the cells, and of the audit, that failed.
    """
    errors: list[QsensError] = []
    if plan.config.runner.report_only:
        return publish(plan), errors
    with SharedCheckpoint(plan) as checkpoint:
        for cell in plan.cells:
            try:
                # Calibration comes with the score: one load of the checkpoint, often one forward.
                score(
                    plan,
                    cell.cell,
                    progress=_bound(progress, cell.cell),
                    wait=True,
                    checkpoint=checkpoint,
                )
            except QsensError as error:
                checkpoint.release()  # it may be what fills the memory
                errors.append(error)
        mode = plan.config.autoquant.audit
        if mode != "none":
            try:
                audit(
                    plan,
                    full=mode == "full",
                    progress=_bound(progress, plan.cells[0].cell),
                    checkpoint=checkpoint,
                )
            except QsensError as error:
                errors.append(error)
    return publish(plan), errors


def _bound(progress: CellProgress | None, cell: str) -> Callable[[str, int, int], None] | None:
    if progress is None:
        return None
    return lambda phase, done, total: progress(cell, phase, done, total)
