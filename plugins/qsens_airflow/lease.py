"""Leases of GPUs: on a host with several, each running task has a device of its own.

A lease is a ``flock`` on one file a device, in a directory of this host. The task process holds it
by an open descriptor that its child inherits: the kernel gives the device back when both are gone,
however they ended. Devices are counted without CUDA, which a forked process must not touch.

| ``CUDA_VISIBLE_DEVICES`` | what a task gets |
| --- | --- |
| not set | a free one of all devices that ``nvidia-smi`` lists (MIG devices where there are) |
| several devices | a free one of these |
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"
# Environment variable: directory of the lock files, one for all workers of a host.
DIRECTORY = "QSENS_LEASE_DIR"
_LIST_SECONDS = 60
_LISTED = re.compile(r"^\s*(?P<kind>GPU|MIG) .*\(UUID: (?P<uuid>[^)\s]+)\)", re.MULTILINE)


@dataclass(frozen=True)
class Lease:
    """A device that is held until both this process and its child have closed the descriptor.

    Attributes:
        device: The device, as ``CUDA_VISIBLE_DEVICES`` takes it.
        descriptor: The open lock file.
    """

    device: str
    descriptor: int

    def release(self) -> None:
        """Close this process's descriptor."""
        with contextlib.suppress(OSError):
            os.close(self.descriptor)


def devices_to_lease() -> list[str]:
    """Return the devices that tasks of this host share; empty where there is nothing to lease."""
    visible = os.environ.get(VISIBLE)
    if visible is None:
        return _listed()
    devices = [device.strip() for device in visible.split(",") if device.strip()]
    return devices if len(devices) > 1 else []


def take(devices: Sequence[str]) -> Lease | None:
    """Lease the first free one of ``devices``; none when all are taken."""
    directory = _directory()
    for device in devices:
        descriptor = _open(directory / _name(device))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        return Lease(device, descriptor)
    return None


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
