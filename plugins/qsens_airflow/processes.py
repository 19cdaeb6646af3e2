"""Processes on this machine: ports to listen on, and families that end together."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Collection

import psutil  # type: ignore[import-untyped]


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def descendants(processes: Collection[subprocess.Popen[bytes]]) -> set[psutil.Process]:
    """Return all that ``processes`` have started and that is alive."""
    known: set[psutil.Process] = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            known |= set(psutil.Process(process.pid).children(recursive=True))
    return known


def end(processes: Collection[subprocess.Popen[bytes]], *, grace: float) -> None:
    """End ``processes`` and all that they have started: SIGTERM, then SIGKILL.

    Args:
        processes: Children of this process.
        grace: Seconds that they have to end by themselves.
    """
    alive = [process for process in processes if process.poll() is None]
    # Tasks have process groups of their own, and outlive a scheduler that is killed.
    family: set[psutil.Process] = descendants(alive)
    for process in alive:
        process.terminate()
    last = time.monotonic() + grace
    while time.monotonic() < last:
        family |= descendants(alive)
        if all(process.poll() is not None for process in alive):
            break
        time.sleep(0.1)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    for process in alive:
        process.kill()
        process.wait()
