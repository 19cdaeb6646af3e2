"""Progress with the time left: a live bar on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 5.0


class ProgressLine:
    """Shows how far the work is; use it as a context manager.

    Args:
        console: Where to show it; a terminal gets a bar, anything else gets lines.
        cells: What will be worked on, in order, so that it can say which of how many.
    """

    def __init__(self, console: Console, *, cells: Sequence[str]) -> None:
        self._console = console
        self._cells = list(cells)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._phase = ("", "")
        self._started = self._said = time.monotonic()

    def __enter__(self) -> Self:
        """Start a bar on a terminal."""
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def update(self, cell: str, phase: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps of a phase of a cell are done."""
        now = time.monotonic()
        fresh = (cell, phase) != self._phase
        if fresh:
            self._phase, self._started = (cell, phase), now
        if self._bar is not None:
            if fresh or self._task is None:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(self._label(cell, phase), total=total)
            self._bar.update(self._task, completed=done, total=total)
            return
        if fresh or done == total or now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            left = (now - self._started) / done * (total - done) if done else None
            tail = f", {left:.0f} s left" if left is not None and done < total else ""
            text = f"{self._label(cell, phase)} {done}/{total}{tail}"
            self._console.print(text)

    def _label(self, cell: str, phase: str) -> str:
        if len(self._cells) < 2 or cell not in self._cells:
            return f"{cell} {phase}"
        return f"[{self._cells.index(cell) + 1} of {len(self._cells)}] {cell} {phase}"
