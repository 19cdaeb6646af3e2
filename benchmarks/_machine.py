"""The machine that a benchmark runs on: what it is, what it can do, what a run takes of it."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qsens.engine.host_memory import most_memory

_VERSIONS = ("torch", "transformers", "nvidia-modelopt")
# Matrix sizes that the rate is measured at: large enough to be the best that a device does.
_RATE_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
_RATE_SECONDS = 0.5


def describe(device: torch.device) -> dict[str, Any]:
    """Return what a reader must know about the machine to read seconds."""
    described: dict[str, Any] = {"cpu": _cpu_name(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        described["card"] = torch.cuda.get_device_name(device)
        described["cuda"] = torch.version.cuda
    return described


def versions() -> dict[str, str]:
    """Return the versions of Python and of what computes."""
    installed = {"python": platform.python_version()}
    return installed | {name: importlib.metadata.version(name) for name in _VERSIONS}


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best rate of a large matrix product, in operations a second."""
    best = 0.0
    for size in _RATE_SIZES[device.type]:
        left = torch.randn(size, size, device=device, dtype=dtype)
        right = torch.randn(size, size, device=device, dtype=dtype)
        started = time.monotonic()
        while time.monotonic() - started < _RATE_SECONDS:
            synchronize(device)
            begun = time.perf_counter()
            left @ right
            synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    return best


def synchronize(device: torch.device) -> None:
    """Wait for all that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Measured:
    """What a run took.

    Attributes:
        peak: Bytes at most above those that were taken when it began.
        seconds: Seconds by phase.
        cpu_seconds: Seconds of all processor cores, both phases together. On a CPU that others
            use at the same time, these say more than the clock.
    """

    peak: int = 0
    cpu_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Return the seconds of all phases."""
        return sum(self.seconds.values())


@contextmanager
def measure(device: torch.device) -> Iterator[Measured]:
    """Measure the peak of memory while the context lasts; phases are for the caller to fill in."""
    measured = Measured()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        before = _restart_peak()
    begun = time.process_time()
    yield measured
    measured.cpu_seconds = time.process_time() - begun
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        measured.peak = torch.cuda.max_memory_allocated(device) - before
    else:
        measured.peak = max(0, most_memory() - before)


def _restart_peak() -> int:
    """Forget the peak so far, where the system lets us; return the bytes that are taken now."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return most_memory()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "")
    return name or platform.machine()
