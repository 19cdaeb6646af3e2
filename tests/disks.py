"""Disks as they may be: read-only, and full. What needs a mount is skipped where nobody may."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Let nobody write below a directory while this lasts."""
    if os.geteuid() == 0:  # who may write whatever the rights are
        with _mounted("--bind", str(directory), str(directory)):
            _run("mount", "-o", "remount,ro,bind", str(directory))
            yield
        return
    modes = {path: path.stat().st_mode for path in (directory, *directory.rglob("*"))}
    try:
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@contextmanager
def small(directory: Path, size: str) -> Iterator[None]:
    """Let a directory be a disk of that size, ``64k``, and empty."""
    directory.mkdir()
    with _mounted("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)):
        yield


@contextmanager
def _mounted(*words: str) -> Iterator[None]:
    try:
        _run("mount", *words)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("nobody may mount here")
    try:
        yield
    finally:
        _run("umount", words[-1])


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)
