"""How files that others wrote are read: regular files alone, bounded, every refusal in words.

JSON that is held in memory takes up to thirty times its text: so much of it is read, and no more.
"""

from __future__ import annotations

import errno
import json
import os
import re
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qsens.errors import QsensError, TryAgain, UserError

# Bytes of a JSON file at most: the index of the largest checkpoints has ten million.
MOST_JSON = 1 << 24
# Bytes of a file that is read whole and is long by nature: samples, annotations, results.
MOST_BYTES = 1 << 28
# Levels that JSON nests at most: what walks over it by recursion gets to its end.
DEEPEST = 100
# What another try may find otherwise: no property of the file.
_PASSING = {
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SHOWN = 100
_SHORTENED = reprlib.Repr()
_SHORTENED.maxstring = _SHORTENED.maxother = _SHORTENED.maxlong = _SHOWN


@contextmanager
def open_file(
    path: Path, *, remedy: str, where: str = "", error: type[UserError] = UserError
) -> Iterator[BinaryIO]:
    """Open a regular file for reading.

    Args:
        path: The file.
        remedy: What to do where it cannot be read.
        where: What the message names; the path when not given.
        error: What is raised.

    Raises:
        UserError: It is missing, may not be read, or is no regular file; nothing else is waited
            for.
        TryAgain: It was changed while it was read, or the machine fails.
    """
    where = where or shown(path)
    try:
        # A pipe without a writer would be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as cause:
        raise _refused(cause, where, remedy, error) from cause
    try:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise error(_no_file(before.st_mode), where=where, remedy=remedy)
        with open(descriptor, "rb", closefd=False) as opened:
            try:
                yield opened
            finally:
                # Whatever was found in it says nothing then.
                _refuse_changed(before, os.fstat(descriptor), where)
    except OSError as cause:
        raise _refused(cause, where, remedy, error) from cause
    finally:
        os.close(descriptor)


def read_bytes(
    path: Path,
    *,
    remedy: str,
    most: int = MOST_BYTES,
    where: str = "",
    error: type[UserError] = UserError,
) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes; see :func:`open_file`."""
    with open_file(path, remedy=remedy, where=where, error=error) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > most:
            raise error(
                f"has {size} bytes, and at most {most} are read",
                where=where or shown(path),
                remedy=remedy,
            )
        return opened.read(size)


def read_json(
    path: Path,
    *,
    remedy: str,
    most: int = MOST_JSON,
    broken: str = "is broken",
    error: type[UserError] = UserError,
) -> Any:
    """Return what a JSON file holds.

    Args:
        path: The file, in UTF-8.
        remedy: What to do where it cannot be read.
        most: Bytes that it has at most.
        broken: What the message says where it is no JSON, before the reason.
        error: What is raised.

    Raises:
        UserError: It cannot be read, is no JSON, or none that can be worked with; see
            :func:`parse_json`.
        TryAgain: See :func:`open_file`.
    """
    data = read_bytes(path, remedy=remedy, most=most, error=error)
    try:
        return parse_json(data)
    except ValueError as cause:
        raise error(f"{broken}: {cause}", where=shown(path), remedy=remedy) from cause


def parse_json(data: bytes, *, strict: bool = False, halves: bool = False) -> Any:
    """Return what JSON in UTF-8 says.

    Args:
        data: The JSON; a byte-order mark before it is left out.
        strict: Whether a key that stands twice in an object, or a number that is none, is refused.
        halves: Whether half of a surrogate pair is taken, for the caller to say where.

    Raises:
        ValueError: It is no JSON, nests deeper than :data:`DEEPEST` levels, has an integer of
            thousands of digits, or holds half of a surrogate pair, which no file can be named by.
    """
    text = data.decode("utf-8-sig")
    try:
        parsed = (
            json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
            if strict
            else json.loads(text)
        )
    except RecursionError:
        raise ValueError(f"it nests deeper than {DEEPEST} levels") from None
    _check_depth(parsed)
    if not halves and _SURROGATE.search(text):
        try:
            json.dumps(parsed, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair") from None
    return parsed


def has_file(path: Path, *, remedy: str, error: type[UserError] = UserError) -> bool:
    """Return whether a file is there.

    Raises:
        UserError: Something else has its name, or nobody may look.
    """
    mode = _mode(path, remedy, error)
    if mode is not None and not stat.S_ISREG(mode):
        raise error(_no_file(mode), where=shown(path), remedy=remedy)
    return mode is not None


def has_directory(path: Path, *, remedy: str) -> bool:
    """Return whether a directory is there.

    Raises:
        UserError: Nobody may look.
    """
    mode = _mode(path, remedy, UserError)
    return mode is not None and stat.S_ISDIR(mode)


def entries_in(directory: Path, *, remedy: str) -> list[Path]:
    """Return what a directory holds, sorted; nothing where it is not there.

    Raises:
        UserError: The directory cannot be read.
    """
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _refused(error, shown(directory), remedy, UserError) from error


def files_in(directory: Path, *, remedy: str) -> list[Path]:
    """Return the regular files of a directory, sorted; what nobody can look at is none.

    Raises:
        UserError: The directory cannot be read.
    """
    return [file for file in entries_in(directory, remedy=remedy) if _is_file(file)]


def below(directory: Path) -> Iterator[Path]:
    """Yield all files and directories below a directory.

    What vanishes meanwhile, or cannot be looked into, is not there; no link is followed.
    """
    for parent, directories, files in os.walk(directory):
        for name in (*directories, *files):
            yield Path(parent, name)


def may_pass(error: OSError) -> bool:
    """Return whether another try may succeed: it is the machine that fails, not the file."""
    return error.errno in _PASSING


def shown(value: object) -> str:
    """Return what a file says, or a path, as a message shows it: on one line, not too long."""
    if isinstance(value, Path):
        text = str(value)
        return text if text.isprintable() else repr(text)
    if isinstance(value, str) and value.isprintable() and len(value) <= _SHOWN:
        return value
    return _SHORTENED.repr(value)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _mode(path: Path, remedy: str, error: type[UserError]) -> int | None:
    """Return what is at a path; none where nothing is."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as cause:
        raise _refused(cause, shown(path), remedy, error) from cause


def _refused(
    cause: OSError | ValueError, where: str, remedy: str, error: type[UserError]
) -> QsensError:
    if not isinstance(cause, OSError) or cause.errno is None:  # a name that no file can have
        return error(f"cannot be read: {cause}", where=where, remedy=remedy)
    words = f"cannot be read: {os.strerror(cause.errno)}"
    if may_pass(cause):
        return TryAgain(words, where=where, remedy="Try again; look after the disk if it stays.")
    return error(words, where=where, remedy=remedy)


def _refuse_changed(before: os.stat_result, after: os.stat_result, where: str) -> None:
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise TryAgain(
            "was changed while it was read",
            where=where,
            remedy="Try again when whatever writes to it is done.",
        )


def _no_file(mode: int) -> str:
    return f"is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, and no file"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"{shown(key)} stands there twice")
        unique[key] = value
    return unique


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    if level:
        raise ValueError(f"it nests deeper than {DEEPEST} levels")
