"""Why cells have no result: kept by the pass that could not compute them, for reports and steps.

One pass finds all cells of a lane that cannot be computed. Each one's own step then raises what the
pass found, the first time without a pass of its own; another time it computes again, so that no
fault that passes stays.
"""

from __future__ import annotations

import logging

from qsens.cells import CellSpec
from qsens.config.base import Frozen
from qsens.documents import dump_document, read_document
from qsens.errors import (
    AnswerIsNo,
    Damaged,
    DiskFull,
    Fault,
    OutOfMemory,
    QsensError,
    TryAgain,
    UserError,
)
from qsens.reading import has_file
from qsens.results import AGAIN
from qsens.store import Store
from qsens.writing import write_text

VERSION = 2
_KINDS = {
    kind.__name__: kind
    for kind in (Fault, UserError, Damaged, AnswerIsNo, OutOfMemory, TryAgain, DiskFull)
}

log = logging.getLogger(__name__)


class Failure(Frozen):
    """Why a cell has no result; ``<cell digest>.failed.json``."""

    error: str
    """Class of the error."""
    what: str
    """The thing and the rule that it broke."""
    where: str = ""
    """The key, file, layer or cell concerned."""
    remedy: str = ""
    """What to do about it."""
    sweep_id: str | None = None
    """The sweep whose pass found it; null in those older than this key."""
    told: bool = True
    """Whether the cell's own step has ended with it."""
    schema_version: int = VERSION
    """Version of this schema."""
    checksum: str | None = None
    """SHA-256 over the canonical JSON of all other keys; null in those older than this key."""

    def raised(self) -> QsensError:
        """Return the error that it was; what was none of ours stays a bug, and may pass."""
        kind = _KINDS.get(self.error, QsensError)
        return kind(self.what, where=self.where, remedy=self.remedy)


def keep_failure(store: Store, cell: CellSpec, error: Exception, *, told: bool = False) -> None:
    """Write down why ``cell`` has no result.

    Args:
        store: Where results lie.
        cell: The cell.
        error: Why it has none.
        told: Whether its own step ends with that error. Of what may pass by itself, no other step
            is told: it tries.
    """
    described = (
        error.as_dict()
        if isinstance(error, QsensError)
        else {"error": type(error).__name__, "what": f"{type(error).__name__}: {error}"}
    )
    failure = Failure(
        **described,
        sweep_id=store.plan.sweep_id,
        told=told or isinstance(error, TryAgain),
    )
    write_text(store.failure(cell), dump_document(failure))


def failure_to_tell(store: Store, cell: CellSpec) -> Failure | None:
    """Return what a pass of this sweep found wrong with ``cell``, where its step is yet to say."""
    failure = _read(store, cell)
    if failure is None or failure.told or failure.sweep_id != store.plan.sweep_id:
        return None
    return failure


def tell(store: Store, cell: CellSpec) -> None:
    """End the step of ``cell``, whose lock is held, with what a pass of this sweep found; once.

    Raises:
        QsensError: What it found. The next step of the cell computes again.
    """
    failure = failure_to_tell(store, cell)
    if failure is None:
        return
    mark_told(store, cell)
    log.info("%s: found by a pass that is over; the next try computes again", cell.cell)
    raise failure.raised()


def mark_told(store: Store, cell: CellSpec) -> None:
    """Note that the step of ``cell`` has ended with what a pass found."""
    failure = _read(store, cell)
    if failure is not None:
        told = failure.model_copy(update={"told": True})
        write_text(store.failure(cell), dump_document(told))


def failure_reason(store: Store, cell: CellSpec) -> str:
    """Return in words why ``cell`` has no result."""
    failure = _read(store, cell)
    return "not computed" if failure is None else failure.what


def _read(store: Store, cell: CellSpec) -> Failure | None:
    """Read a failure; none where there is none, or it is not what was written."""
    path = store.failure(cell)
    if not has_file(path, remedy=AGAIN):
        return None
    try:
        return read_document(Failure, path, what="failure", version=VERSION, name="", again="")
    except Damaged as error:
        store.set_aside(path, f"the failure of {cell.cell}", error.what)
        return None
