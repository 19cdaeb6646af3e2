"""The host's memory, from trees as kernels show them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qsens.engine.host_memory import available_memory, most_memory
from qsens.engine.memory import free_memory

MIB = 1 << 20
V1 = "9:name=systemd:/\n4:cpuset,memory:/docker/abc\n0::/\n"


def tree(root: Path, files: dict[str, str], *, cgroup: str) -> Path:
    """Write the files of a host with 1 GiB free, and 4 GiB available."""
    meminfo = "MemTotal: 9000000 kB\nMemFree: 1048576 kB\nMemAvailable: 4194304 kB\n"
    for name, text in {"proc/meminfo": meminfo, "proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(path: str, limit: str, used_mib: int, idle_mib: int = 0) -> dict[str, str]:
    """Return the files of a group of version 2."""
    at = f"sys/fs/cgroup{path}"
    return {
        f"{at}/memory.max": f"{limit}\n",
        f"{at}/memory.current": f"{used_mib * MIB}\n",
        f"{at}/memory.stat": f"anon 1\ninactive_file {idle_mib * MIB}\nactive_file 7\n",
    }


def group_v1(path: str, limit: int, used_mib: int, idle_mib: int = 0) -> dict[str, str]:
    """Return the files of a group of version 1."""
    at = f"sys/fs/cgroup/memory{path}"
    return {
        f"{at}/memory.limit_in_bytes": f"{limit}\n",
        f"{at}/memory.usage_in_bytes": f"{used_mib * MIB}\n",
        f"{at}/memory.stat": f"inactive_file 5\ntotal_inactive_file {idle_mib * MIB}\n",
    }


@pytest.mark.parametrize(
    ("cgroup", "files", "expected_mib"),
    [
        # No group at all, or none with a limit: what caches give back counts.
        ("", {}, 4096),
        ("0::/\n", {}, 4096),
        ("0::/a/b\n", group("/a/b", "max", 100), 4096),
        # 2,048 - 1,000 + 300
        ("0::/a/b\n", group("/a/b", str(2048 * MIB), 1000, 300), 1348),
        # A limit above holds as well: 1,500 - 1,200.
        (
            "0::/a/b\n",
            group("/a/b", str(2048 * MIB), 1000) | group("/a", str(1500 * MIB), 1200),
            300,
        ),
        # A container sees its own group at the mount, whatever path the host gave it.
        ("0::/\n", group("", str(600 * MIB), 100), 500),
        ("0::/../../init\n", group("", str(600 * MIB), 100), 500),
        # More is taken than a limit that was lowered allows.
        ("0::/\n", group("", str(100 * MIB), 200), 0),
        # A limit above what the host has left.
        ("0::/\n", group("", str(90_000 * MIB), 200), 4096),
        (V1, group_v1("/docker/abc", 1024 * MIB, 500, 100), 624),
        (V1, group_v1("", 1024 * MIB, 500), 524),
        (V1, group_v1("", 9223372036854771712, 500), 4096),
    ],
)
def test_the_least_of_host_and_groups_counts(
    cgroup: str, files: dict[str, str], expected_mib: int, tmp_path: Path
) -> None:
    assert available_memory(tree(tmp_path, files, cgroup=cgroup)) == expected_mib * MIB


def test_a_budget_on_a_cpu_is_of_what_this_host_has_available() -> None:
    """MemAvailable counts the page cache, which MemFree does not."""
    text = Path("/proc/meminfo").read_text(encoding="utf-8")
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    free = free_memory(torch.device("cpu"))
    assert free == pytest.approx(available_memory(), rel=0.2)
    assert 0 < free <= int(values["MemTotal"]) * 1024
    assert free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_what_a_process_took_is_not_what_its_parent_had() -> None:
    ballast = b"\1" * (400 * MIB)
    words = "from qsens.engine.host_memory import most_memory; print(most_memory())"
    child = subprocess.run([sys.executable, "-c", words], capture_output=True, check=True)
    assert 4 * MIB < int(child.stdout) < len(ballast)
    assert most_memory() > len(ballast)
