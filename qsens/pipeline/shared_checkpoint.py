"""The checkpoint of a plan, loaded when a step first computes, once for all steps of a process.

Never imports torch by itself: a step that finds its result needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from qsens.grid import Plan

if TYPE_CHECKING:
    from qsens.pipeline.loading import Checkpoint
    from qsens.pipeline.workers import Workers

Progress = Callable[[str, int, int], None]
"""Called with a phase, steps done, and steps in all."""


class SharedCheckpoint:
    """Loads the checkpoint of a plan at most once.

    Args:
        plan: The plan.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._loaded: Checkpoint | None = None
        self._workers: Workers | None = None

    def __enter__(self) -> Self:
        """Return it; it is released when the context ends."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release it."""
        self.release()

    def load(self, progress: Progress) -> Checkpoint:
        """Return the checkpoint; see :func:`qsens.pipeline.loading.load_checkpoint`."""
        if self._loaded is None:
            from qsens.pipeline import loading, workers

            count = loading.processes_of(self._plan)
            if count == 1:
                self._loaded = loading.load_checkpoint(self._plan, progress)
                return self._loaded
            self._workers = workers.Workers(self._plan, count)  # they load theirs meanwhile
            try:
                loaded = loading.load_checkpoint(self._plan, progress, rank=0)
                self._workers.join(loaded.model)
            except BaseException:
                self.release()
                raise
            self._loaded = loaded
        return self._loaded

    def release(self) -> None:
        """Let the model go, and the processes that have it too: whoever needs it loads it again."""
        self._loaded = None
        if self._workers is not None:
            self._workers.close()
            self._workers = None
