"""The GPU steps of one cell: calibrate, score. Idempotent: *make sure that its result is there*.

The fused engine computes all cells of a lane in one pass; the first step that comes by does it,
and the others find theirs. A step that finds what it needs imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

from filelock import FileLock

from qsens.cells import CellSpec
from qsens.errors import OutOfMemory
from qsens.grid import Plan
from qsens.locks import held, try_lock
from qsens.pipeline.failures import failure_to_tell, keep_failure, mark_told, tell
from qsens.pipeline.shared_checkpoint import Progress, SharedCheckpoint
from qsens.store import Store

Step = Literal["calibrate", "score"]


def calibrate(
    plan: Plan, cell_id: str, *, progress: Progress | None = None, wait: bool = False
) -> dict[str, Any]:
    """Make sure that the calibrated amax of a cell are there.

    One run over the samples serves all sizes of the plan. Nothing is computed where the result of
    the cell is there already, where its inputs need no calibration, and by the reference engine:
    ModelOpt calibrates inside ``mtq.auto_quantize``.

    Args:
        plan: The plan.
        cell_id: The cell.
        progress: Called with a phase, steps done, and steps in all.
        wait: Whether to wait for another process that computes the same.

    Raises:
        TryAgain: Another process computes it, and ``wait`` is false.
        DiskFull: There is no space left.
        UserError: It cannot be computed.
        OutOfMemory: The device has not enough memory.
    """
    store, cell = Store(plan), plan.cell(cell_id)
    started = time.monotonic()
    there = outcome_there(plan, cell_id, "calibrate")
    if there is not None:
        return there
    digest = cell.calibration
    lock, where = store.calibration_lock(digest), f"calibration of {cell.cell}"
    with ExitStack() as locks:
        locks.enter_context(held(lock, where=where, wait=wait))
        computed = not store.is_calibrated(digest)
        if computed:
            # Before the heavy import: whoever comes meanwhile must find the locks taken.
            sizes = [cell, *_lock_other_sizes(store, cell, locks)]
            digests = {each.calibration for each in sizes}
            for each in digests:
                store.set_aside_calibration(each)
            # Those that read the same amax would fail alike.
            others = [
                other
                for other in plan.cells
                if other != cell and other.needs_calibration and other.calibration in digests
            ]
            from qsens.pipeline.compute import calibrate_sizes

            shared = locks.enter_context(SharedCheckpoint(plan))
            with _failure_is_kept(store, [cell, *others]):
                calibrate_sizes(store, sizes, progress or _silent, shared)
    return _outcome(store, cell, "done", computed=computed, started=started)


def score(
    plan: Plan,
    cell_id: str,
    *,
    progress: Progress | None = None,
    wait: bool = False,
    checkpoint: SharedCheckpoint | None = None,
) -> dict[str, Any]:
    """Make sure that the result of a cell is there.

    Args:
        plan: The plan.
        cell_id: The cell.
        progress: Called with a phase, steps done, and steps in all.
        wait: Whether to wait for another process that computes the same result.
        checkpoint: That of the plan, where other steps of this process use it as well; loaded for
            this step alone when not given, and by the reference engine, which converts it.

    Raises:
        TryAgain: Another process computes it, and ``wait`` is false.
        DiskFull: There is no space left.
        UserError: It cannot be computed; the reason is kept for the reports.
        OutOfMemory: The device has not enough memory.
    """
    store, cell = Store(plan), plan.cell(cell_id)
    started = time.monotonic()
    there = outcome_there(plan, cell_id, "score")
    if there is not None:
        return there
    with ExitStack() as locks:
        locks.enter_context(held(store.lock(cell), where=cell.cell, wait=wait))
        if store.is_done(cell):
            return _outcome(store, cell, "done", started=started)
        tell(store, cell)
        if plan.config.autoquant.engine == "modelopt":
            store.set_aside_result(cell)
            from qsens.pipeline.compute import score_reference

            with _failure_is_kept(store, [cell]):
                score_reference(store, cell, progress or _silent)
        else:
            # Before the heavy import: whoever comes meanwhile must find the locks taken.
            together = [cell, *_lock_others(store, cell, locks)]
            for each in together:
                store.set_aside_result(each)
            from qsens.pipeline.compute import score_fused

            shared = checkpoint or locks.enter_context(SharedCheckpoint(plan))
            with _failure_is_kept(store, together):
                failed = score_fused(store, together, progress or _silent, shared)
            if cell.cell in failed:
                mark_told(store, cell)
                raise failed[cell.cell]
    return _outcome(store, cell, "done", computed=True, started=started)


def outcome_there(plan: Plan, cell_id: str, step: Step) -> dict[str, Any] | None:
    """Return what ``step`` answers where there is nothing to compute; none where there is."""
    store, cell = Store(plan), plan.cell(cell_id)
    if step == "calibrate":
        status = _calibration_status(store, cell)
    else:
        status = "done" if store.is_done(cell) else None
    return None if status is None else _outcome(store, cell, status)


def is_there(plan: Plan, cell_id: str, step: Step) -> bool:
    """Return whether ``step`` has nothing to compute; a failure that is to be told is there."""
    if outcome_there(plan, cell_id, step) is not None:
        return True
    return step == "score" and failure_to_tell(Store(plan), plan.cell(cell_id)) is not None


def _calibration_status(store: Store, cell: CellSpec) -> str | None:
    """Return why nothing is to be calibrated for ``cell``; none where something is."""
    if store.is_done(cell):
        return "done"
    if store.plan.config.autoquant.engine == "modelopt":
        return "with_score"
    if not cell.needs_calibration:
        return "not_needed"
    if store.is_calibrated(cell.calibration):
        return "done"
    # Its score says why.
    return "failed" if failure_to_tell(store, cell) is not None else None


def _lock_others(store: Store, cell: CellSpec, locks: ExitStack) -> list[CellSpec]:
    """Take the cells of the lane that have no result and that nobody else computes."""
    return [
        other
        for other in store.plan.lane_of(cell)
        if other != cell and _take(store.lock(other), partial(store.is_done, other), locks)
    ]


def _lock_other_sizes(store: Store, cell: CellSpec, locks: ExitStack) -> list[CellSpec]:
    """Take the sizes that have no calibrated amax and that nobody else computes."""
    taken = {cell.calibration: cell}
    for other in store.plan.cells:
        if not other.needs_calibration:
            continue
        digest = other.calibration
        if digest not in taken and _take(
            store.calibration_lock(digest), partial(store.is_calibrated, digest), locks
        ):
            taken[digest] = other
    return [other for other in taken.values() if other is not cell]


def _take(lock: FileLock, is_there: Callable[[], bool], locks: ExitStack) -> bool:
    """Take ``lock`` if what it protects is not there and nobody else computes it."""
    if is_there() or not try_lock(lock):
        return False
    locks.callback(lock.release)
    return not is_there()


@contextmanager
def _failure_is_kept(store: Store, cells: Sequence[CellSpec]) -> Iterator[None]:
    """Keep the reason of a failure for the reports; a later success takes it away.

    The first of ``cells`` is the one whose step this is.
    """
    try:
        yield
    except Exception as error:
        failure = _out_of_memory(error, cells[0]) or error
        for cell in cells:
            if not store.is_done(cell):
                keep_failure(store, cell, failure, told=cell is cells[0])
        if failure is not error:
            raise failure from error
        raise


def _out_of_memory(error: Exception, cell: CellSpec) -> OutOfMemory | None:
    import torch

    if not isinstance(error, torch.OutOfMemoryError | MemoryError):
        return None
    return OutOfMemory(
        f"out of memory: {str(error).splitlines()[0] if str(error) else 'the host has none left'}",
        where=cell.cell,
        remedy="Set a smaller autoquant.memory_gb, or use a device with more memory.",
    )


def _outcome(
    store: Store,
    cell: CellSpec,
    status: str,
    *,
    computed: bool = False,
    started: float | None = None,
) -> dict[str, Any]:
    manifest = store.manifest(cell)
    return {
        "cell": cell.cell,
        "status": status,
        "manifest": str(manifest) if manifest.is_file() else None,
        "seconds": round(time.monotonic() - started, 3) if started is not None else 0.0,
        "computed": computed,
    }


def _silent(phase: str, done: int, total: int) -> None:
    pass
