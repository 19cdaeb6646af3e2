"""Leases of GPUs: on a host with several, each running task has devices of its own.

A lease is a ``flock`` on one file a device, in a directory of this host. The task process holds it
by open descriptors that its child inherits: the kernel gives the devices back when both are gone,
however they ended. A task that needs several takes all or none, one task of a host at a time: no
two wait for what the other holds. Devices are counted without CUDA, which a forked process must not
touch.

| ``CUDA_VISIBLE_DEVICES`` | what a task gets |
| --- | --- |
| not set | free ones of all devices that ``nvidia-smi`` lists (MIG devices where there are) |
| several devices | free ones of these |
| one device, or none | what is set, without a lease |
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"
# Environment variable: directory of the lock files, one for all workers of a host.
DIRECTORY = "QSENS_LEASE_DIR"
# Held while a task looks which devices are free.
_TURN = "turn.lock"
_LIST_SECONDS = 60
_LISTED = re.compile(r"^\s*(?P<kind>GPU|MIG) .*\(UUID: (?P<uuid>[^)\s]+)\)", re.MULTILINE)


@dataclass(frozen=True)
class Lease:
    """Devices that are held until both this process and its child have closed the descriptors.

    Attributes:
        devices: The devices, as ``CUDA_VISIBLE_DEVICES`` takes them, by commas.
        descriptors: The open lock files.
    """

    devices: str
    descriptors: tuple[int, ...]

    def release(self) -> None:
        """Close this process's descriptors."""
        _close(self.descriptors)


def devices_to_lease() -> list[str]:
    """Return the devices that tasks of this host share; empty where there is nothing to lease."""
    visible = os.environ.get(VISIBLE)
    if visible is None:
        return _listed()
    devices = [device.strip() for device in visible.split(",") if device.strip()]
    return devices if len(devices) > 1 else []


def take(devices: Sequence[str], count: int = 1) -> Lease | None:
    """Lease the first ``count`` free ones of ``devices``; none when fewer are free."""
    directory = _directory()
    turn = _open(directory / _TURN)
    held: dict[str, int] = {}
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for device in devices:
            descriptor = _open(directory / _name(device))
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            held[device] = descriptor
            if len(held) == count:
                return Lease(",".join(held), tuple(held.values()))
    finally:
        os.close(turn)
    _close(held.values())
    return None


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _listed() -> list[str]:
    """Return the UUIDs that ``nvidia-smi -L`` lists; a GPU cut up by MIG gives its parts."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        listed = subprocess.run(
            [program, "-L"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LIST_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return _parse(listed.stdout) if listed.returncode == 0 else []


def _parse(text: str) -> list[str]:
    devices: list[str] = []
    whole = False
    for match in _LISTED.finditer(text):
        if match["kind"] == "MIG" and whole:
            devices.pop()
        whole = match["kind"] == "GPU"
        devices.append(match["uuid"])
    return devices


def _directory() -> Path:
    given = os.environ.get(DIRECTORY)
    directory = Path(given or Path(tempfile.gettempdir()) / f"qsens-leases-{os.getuid()}")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def _name(device: str) -> str:
    readable = re.sub(r"[^A-Za-z0-9-]+", "_", device)[:60]
    return f"{readable}-{hashlib.sha256(device.encode()).hexdigest()[:8]}.lock"


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
