"""Runs of a model that take turns: all go through one layer before any goes on to the next.

Needs torch. Each run is a greenlet, which is set aside in the middle of the model's own ``forward``
and taken up again there: no code of a model is repeated, and nothing of it has to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from greenlet import GreenletExit, greenlet

T = TypeVar("T")


class Interleaved:
    """Lets runs take turns wherever they come to :meth:`pause`."""

    def __init__(self) -> None:
        self._scheduler: greenlet | None = None

    def pause(self, at: str) -> None:
        """Let the other runs come to where this one is; outside of :meth:`run` do nothing.

        Args:
            at: What comes next. Runs that stop before the same go on together.
        """
        if self._scheduler is None or greenlet.getcurrent() is self._scheduler:
            return
        records = torch.is_grad_enabled()  # of a thread, which all runs share
        self._scheduler.switch(at)
        torch.set_grad_enabled(records)

    def run(self, runs: Sequence[Callable[[], T]], resumed: Callable[[int], None]) -> list[T]:
        """Take all runs to their ends; return what they give, in their order.

        Args:
            runs: What to run. They begin in order, and take turns in order.
            resumed: Called with the index of a run whenever it begins or goes on.
        """
        self._scheduler = greenlet.getcurrent()
        records = torch.is_grad_enabled()
        results: dict[int, Any] = {}
        waiting: dict[int, str] = {}
        lets = [greenlet(each) for each in runs]

        def go_on(index: int) -> None:
            resumed(index)
            reached = lets[index].switch()
            torch.set_grad_enabled(records)
            if lets[index].dead:
                results[index] = reached
                waiting.pop(index, None)
            else:
                waiting[index] = reached

        try:
            for index in range(len(lets)):
                go_on(index)
            while waiting:
                at = waiting[min(waiting)]
                for index in [index for index in sorted(waiting) if waiting[index] == at]:
                    go_on(index)
        finally:
            for let in lets:
                if not let.dead:
                    let.throw(GreenletExit)
            self._scheduler = None
            torch.set_grad_enabled(records)
        return [results[index] for index in range(len(lets))]
