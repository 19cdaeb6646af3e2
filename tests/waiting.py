"""Waiting for what other processes do, as long as a busy machine may need."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_for(ready: Callable[[], Any], *, seconds: float = 120, pause: float = 0.05) -> Any:
    """Ask ``ready`` until it says something true; return that."""
    last = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < last, "waited in vain"
        time.sleep(pause)
    return found
