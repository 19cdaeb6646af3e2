"""What a process asks of the kernel about itself; Linux only, elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import sys

SET_DEATH_SIGNAL = 1
SET_DUMPABLE = 4
# Loaded once: a forked process may not load anything.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def prctl(option: int, value: int) -> None:
    """Set an option of this process (prctl(2)).

    Raises:
        OSError: The kernel refuses it.
    """
    if _LIBC is not None and _LIBC.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")
