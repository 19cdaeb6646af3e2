"""The checkpoint of a plan, loaded when a step first computes, once for all steps of a process.

Never imports torch by itself: a step that finds its result needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qsens.grid import Plan

if TYPE_CHECKING:
    from qsens.pipeline.loading import Checkpoint

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

    def load(self, progress: Progress) -> Checkpoint:
        """Return the checkpoint; see :func:`qsens.pipeline.loading.load_checkpoint`."""
        if self._loaded is None:
            from qsens.pipeline import loading

            self._loaded = loading.load_checkpoint(self._plan, progress)
        return self._loaded

    def release(self) -> None:
        """Let the model go: whoever needs it next loads it again."""
        self._loaded = None
