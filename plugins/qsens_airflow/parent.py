"""Processes that end with the one that started them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from qsens_airflow.prctl import SET_DEATH_SIGNAL, prctl


def end_with_parent() -> Callable[[], None]:
    """Return a ``preexec_fn``: the kernel stops the process when this one is killed; Linux only."""
    parent = os.getpid()

    def prepare() -> None:
        prctl(SET_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the kernel was told
            os._exit(128 + signal.SIGTERM)

    return prepare
