"""How files are written: whole or not at all, every refusal in words."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from qsens.checksums import digest_file
from qsens.errors import DiskFull, QsensError, TryAgain, UserError
from qsens.reading import has_file, may_pass, open_file, shown

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Say in one message why a directory cannot be written to.

    Raises:
        UserError: Nobody may, or it is none.
        DiskFull: The disk is full.
        TryAgain: The disk fails.
    """
    try:
        yield
    except OSError as error:
        raise refusal(error, directory) from error


def refusal(error: OSError, directory: Path) -> QsensError:
    """Return in words why ``directory`` cannot be written to."""
    if error.errno in _FULL:
        return DiskFull(
            "no space left on the disk; nothing was written",
            where=shown(directory),
            remedy="Free some space, then run it again: what is done already is kept.",
        )
    words = f"cannot be written to: {error.strerror or error}"
    where = f"directory {shown(directory)}"
    if may_pass(error):
        return TryAgain(words, where=where, remedy="Try again; look after the disk if it stays.")
    return UserError(
        words,
        where=where,
        remedy="Choose another one, or mend its rights; results go below QSENS_RESULTS.",
    )


def make_directory(path: Path) -> None:
    """Make a directory with those above it, where it is not there.

    Raises:
        UserError: It cannot be made, such as below a file or on a read-only disk.
        DiskFull: The disk is full.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 with LF line ends, whole or not at all.

    Raises:
        DiskFull: The disk is full.
        UserError: The directory cannot be written to.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data``, whole or not at all; see :func:`write_file`."""
    with write_file(path) as temporary:
        temporary.write_bytes(data)


def copy_file(source: Path, target: Path, *, remedy: str) -> None:
    """Copy ``source`` to ``target``, whole or not at all; equal content is left alone.

    Args:
        source: A file.
        target: Where its content goes.
        remedy: What to do where one of them cannot be read.

    Raises:
        DiskFull: The disk is full.
        UserError: The directory cannot be written to, or one of them cannot be read.
    """
    if has_file(target, remedy=remedy):
        known = {digest_file(file, remedy=remedy) for file in (source, target)}
        if len(known) == 1:
            return
    with (
        open_file(source, remedy=remedy) as opened,
        write_file(target) as temporary,
        temporary.open("wb") as copy,
    ):
        shutil.copyfileobj(opened, copy)


@contextlib.contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is fsynced and renamed to ``path``.

    Nothing but that file is written, and nothing is read, while the context lasts: its errors are
    those of the directory.

    Raises:
        DiskFull: The disk is full; nothing is left behind.
        UserError: The directory cannot be written to.
    """
    make_directory(path.parent)
    with writing(path.parent):
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp"
        )
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _finish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _fsync_directory(path.parent)


@contextlib.contextmanager
def write_directory(
    path: Path, *, last: str, keep: Callable[[], bool] = lambda: True
) -> Iterator[Path]:
    """Yield a temporary directory; on success it becomes ``path``, the file ``last`` renamed last.

    A ``path`` that holds ``last`` already is kept and the new content dropped: results are never
    overwritten. Errors while the context lasts are those of the directory.

    Args:
        path: The directory.
        last: Name of the file that makes it whole.
        keep: Asked of a ``path`` that holds ``last`` already; where it returns false, it has moved
            that away.

    Raises:
        DiskFull: The disk is full; nothing is left behind.
        UserError: The directory cannot be written to.
    """
    make_directory(path.parent)
    with writing(path.parent):
        temporary = Path(
            tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
        )
        try:
            yield temporary
            if (path / last).is_file() and keep():
                return
            path.mkdir(exist_ok=True)
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == last):
                _finish(file, path / file.name)
            _fsync_directory(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _fsync_directory(path.parent)


def _finish(temporary: Path, path: Path) -> None:
    """Let what was written be there under its name, once it is on the disk."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.chmod(0o666 & ~_umask())
    temporary.replace(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
