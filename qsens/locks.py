"""Locks between processes: files that are locked by ``flock``, which ends with its process."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from qsens.errors import TryAgain, UserError
from qsens.reading import shown
from qsens.writing import make_directory, refusal

# What file systems without flock answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def lock_at(path: Path) -> FileLock:
    """Return the lock of that file; the directories above it are made.

    Raises:
        UserError: They cannot be made.
    """
    make_directory(path.parent)
    # A file that merely is there would outlive a process that is killed.
    return FileLock(path, fallback_to_soft=False)


@contextlib.contextmanager
def held(lock: FileLock, *, where: str, wait: bool) -> Iterator[None]:
    """Hold ``lock`` while the context lasts.

    Args:
        lock: The lock.
        where: What it protects, for the message.
        wait: Whether to wait for another process that holds it.

    Raises:
        TryAgain: Another process holds it, and ``wait`` is false.
        UserError: Its directory cannot be written to, or its file system has no locks.
        DiskFull: The disk is full.
    """
    if not _acquired(lock, -1 if wait else 0):
        raise TryAgain(
            "is being computed by another process",
            where=where,
            remedy="Run it again when that process has ended.",
        )
    try:
        yield
    finally:
        lock.release()


def try_lock(lock: FileLock) -> bool:
    """Take ``lock`` if nobody else holds it; the caller releases it. Raises as :func:`held`."""
    return _acquired(lock, 0)


def _acquired(lock: FileLock, timeout: float) -> bool:
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        return False
    except OSError as error:
        directory = Path(lock.lock_file).parent
        if error.errno not in _NO_LOCKS:
            raise refusal(error, directory) from error
        raise UserError(
            f"its file system has no locks (flock): {error.strerror}",
            where=f"directory {shown(directory)}",
            remedy="Set QSENS_RESULTS to a directory on one that has, such as a local disk or NFS "
            "with its lock service.",
        ) from error
    return True
