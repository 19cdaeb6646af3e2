"""How much memory of the host a process may still take, within its cgroups, and what it took."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class _Hierarchy:
    """Where a version of cgroups keeps what.

    Attributes:
        controllers: Its second field in ``/proc/self/cgroup``.
        mounts: Where it is mounted, below ``/sys/fs/cgroup``.
        limit: File of the limit, bytes.
        usage: File of what is taken, bytes, the page cache included.
        idle: Key in ``memory.stat`` of cached files that nobody used lately: they give way first.
    """

    controllers: str
    mounts: tuple[str, ...]
    limit: str
    usage: str
    idle: str


_V2 = _Hierarchy("", ("", "unified"), "memory.max", "memory.current", "inactive_file")
_V1 = _Hierarchy(
    "memory",
    ("memory",),
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
)


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process may take before the host, or its container, has no more.

    Memory that the kernel takes back from caches when somebody asks for it counts as available.

    Args:
        root: Directory that holds ``proc`` and ``sys``.
    """
    return max(0, min([_of_host(root), *_of_cgroups(root)]))


def _of_host(root: Path) -> int:
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # an old kernel


def _of_cgroups(root: Path) -> Iterator[int]:
    """Yield what is left of each limit: those of all groups above hold as well."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for hierarchy in (_V2, _V1):
            if hierarchy.controllers not in controllers.split(","):
                continue
            group = PurePosixPath(path.lstrip("/"))
            # In a container the path may be the host's, and the mount the container's own group.
            for mount in hierarchy.mounts:
                for part in (group, *group.parents):
                    directory = root / "sys/fs/cgroup" / mount / part
                    left = _left(directory, hierarchy)
                    if left is not None:
                        yield left


def _left(directory: Path, hierarchy: _Hierarchy) -> int | None:
    limit = _read(directory / hierarchy.limit).strip()
    usage = _read(directory / hierarchy.usage).strip()
    if not limit.isdecimal() or not usage.isdecimal():  # "max", or no such file
        return None
    stat = dict(line.split(" ", 1) for line in _read(directory / "memory.stat").splitlines())
    return int(limit) - int(usage) + int(stat.get(hierarchy.idle, 0))


def most_memory() -> int:
    """Return the bytes that this process has taken at most.

    ``getrusage`` would count what its parent had before this program was started.
    """
    status = _read(Path("/proc/self/status"))
    match = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
