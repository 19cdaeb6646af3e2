"""The tree of errors, and the exit code that each one means.

```
QsensError
├── Fault              1   something else went wrong in one of many cells; it may pass
├── UserError          2   the user must mend it: configuration, paths, the checkpoint
│   └── Damaged        2   a file that qsens wrote cannot be read, or is not what was written
├── AnswerIsNo         3   it ran, and the answer is no: verify, audit, an infeasible recipe
├── OutOfMemory       74   the device or the host has no memory left for this budget
└── TryAgain          75   it may pass: a lock held elsewhere
    └── DiskFull      75   it passes when somebody has made room
```

A fault shows the traceback of its cause; anything else that reaches the command line is a bug and
shows its own.
"""

from __future__ import annotations

from typing import ClassVar

from qsens.visible import visible


class QsensError(Exception):
    """Base of all errors that qsens raises on purpose.

    Args:
        what: The thing and the rule that it broke, in one line.
        where: The key, file, layer or cell concerned.
        remedy: What to do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        """Return what, where and remedy as one or two lines, whatever the names in them hold."""
        head = visible(f"{self.where}: {self.what}" if self.where else self.what)
        return f"{head}\n{visible(self.remedy)}" if self.remedy else head

    def as_dict(self) -> dict[str, str]:
        """Return the error as the command line prints it under ``--json``."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "remedy": self.remedy,
        }


class Fault(QsensError):
    """What went wrong in one of many cells for no reason that qsens knows; the others go on.

    A passing fault of the machine, or a bug: its cause is the error itself, and is shown with its
    traceback.
    """


class UserError(QsensError):
    """Something that the user must mend before a retry makes sense."""

    exit_code = 2


class Damaged(UserError):
    """A file that qsens wrote cannot be read, or its content is not what was written."""


class AnswerIsNo(QsensError):
    """The work was done and its result is negative."""

    exit_code = 3


class OutOfMemory(QsensError):
    """The device ran out of memory; a smaller memory budget may work."""

    exit_code = 74


class TryAgain(QsensError):
    """A condition that may pass by itself."""

    exit_code = 75


class DiskFull(TryAgain):
    """There is no space left; nothing was half-written."""
