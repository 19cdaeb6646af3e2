"""Files that others wrote: pipes, devices, names that none can have, JSON that is none."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsens.errors import Damaged, TryAgain, UserError
from qsens.reading import (
    DEEPEST,
    files_in,
    has_directory,
    has_file,
    open_file,
    parse_json,
    read_bytes,
    read_json,
    shown,
)

AGAIN = "Get it again."


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """What would wait for a pipe fails instead."""
    signal.alarm(20)
    yield
    signal.alarm(0)


def refusal(path: Path) -> str:
    """Return why a file is not read, whoever asks for it."""
    with pytest.raises(UserError) as caught:
        read_json(path, remedy=AGAIN)
    error = caught.value
    assert (error.remedy, type(error)) == (AGAIN, UserError)
    assert error.where.isprintable()
    assert "\n" not in error.what
    return error.what


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    said = {
        "pipe": "is a pipe, and no file",
        "link": "is a pipe, and no file",
        "directory": "is a directory, and no file",
    }
    for name, words in said.items():
        assert refusal(tmp_path / name) == words
        with pytest.raises(UserError, match=words):
            has_file(tmp_path / name, remedy=AGAIN)
    assert refusal(tmp_path / "socket") == "cannot be read: No such device or address"
    assert refusal(Path("/dev/zero")) == "is a device, and no file"


def test_what_cannot_be_opened_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name, words in {
        "nothing": "cannot be read: No such file or directory",
        "n" * 256: "cannot be read: File name too long",
        "loop": "cannot be read: Too many levels of symbolic links",
        "a\0b": "cannot be read: embedded null byte",
        "a\ud800b": "cannot be read: 'utf-8' codec can't encode",
    }.items():
        assert refusal(tmp_path / name).startswith(words)


def test_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to("nothing")
    assert has_file(tmp_path / "file", remedy=AGAIN)
    assert not has_file(tmp_path / "gone", remedy=AGAIN)
    assert not has_file(tmp_path / "file" / "below", remedy=AGAIN)
    assert has_directory(tmp_path, remedy=AGAIN)
    assert not has_directory(tmp_path / "file", remedy=AGAIN)
    assert files_in(tmp_path, remedy=AGAIN) == [tmp_path / "file"]
    for name in ("n" * 256, "a\0b"):
        with pytest.raises(UserError, match="cannot be read"):
            has_file(tmp_path / name, remedy=AGAIN)
        with pytest.raises(UserError, match="cannot be read"):
            has_directory(tmp_path / name, remedy=AGAIN)


AS_NOBODY = """
import os, sys
from pathlib import Path
from qsens.errors import UserError
from qsens.reading import files_in, has_file, read_json

if os.getuid() == 0:
    os.setuid(65534)
for read in (read_json, has_file, files_in):
    try:
        read(Path(sys.argv[1 + (read is not read_json)]), remedy="Mend it.")
    except UserError as error:
        print(error.where, error.what)
"""


def test_what_nobody_may_read_is_named(tmp_path: Path) -> None:
    """Root may read everything."""
    file, closed = tmp_path / "a.json", tmp_path / "closed"
    file.write_text("{}")
    file.chmod(0)
    closed.mkdir(mode=0)
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    ran = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(file), str(closed / "inner")],
        capture_output=True,
        text=True,
        check=True,
    )
    said = "cannot be read: Permission denied"
    inner = closed / "inner"
    assert ran.stdout.splitlines() == [f"{file} {said}", f"{inner} {said}", f"{inner} {said}"]


def test_what_is_too_long_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "long").open("wb") as file:
        file.truncate(1 << 40)
    assert refusal(tmp_path / "long") == "has 1099511627776 bytes, and at most 16777216 are read"
    (tmp_path / "short").write_bytes(b"123")
    assert read_bytes(tmp_path / "short", remedy=AGAIN, most=3) == b"123"
    with pytest.raises(Damaged, match="has 3 bytes, and at most 2 are read"):
        read_bytes(tmp_path / "short", remedy=AGAIN, most=2, error=Damaged)


def read_while_it_grows(file: Path, *, broken: bool) -> None:
    with open_file(file, remedy=AGAIN):
        file.write_bytes(file.read_bytes() + b"more")
        if broken:
            raise UserError("is broken")


@pytest.mark.parametrize("broken", [False, True])
def test_a_file_that_changes_may_be_read_another_time(broken: bool, tmp_path: Path) -> None:
    """Whatever was found in it."""
    (tmp_path / "file").write_bytes(b"one")
    with pytest.raises(TryAgain, match="was changed while it was read"):
        read_while_it_grows(tmp_path / "file", broken=broken)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff", "can't decode byte 0xff"),
        (b"[" * 100_000 + b"]" * 100_000, "nests deeper than 100 levels"),
        (b'{"a":' * 101 + b"0" + b"}" * 101, "nests deeper than 100 levels"),
        (b"9" * 5000, "4300 digits"),
        (rb'["\ud83d"]', "half of a surrogate pair"),
        (rb'{"\uDE00": 1}', "half of a surrogate pair"),
    ],
)
def test_what_is_no_json_is_refused(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    assert said in refusal(tmp_path / "file")


def test_json_is_what_it_says() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1, 1e308, null], "a": "\\ud83d\\ude00"}') == {"a": "😀"}
    deep = json.loads("[" * DEEPEST + "]" * DEEPEST)
    assert parse_json(json.dumps(deep).encode()) == deep
    for twice in (b'{"a": 1, "a": 1}', b'[{"b": {"a": 1, "a": 2}}]'):
        with pytest.raises(ValueError, match="a stands there twice"):
            parse_json(twice, strict=True)
    with pytest.raises(ValueError, match="NaN is no number"):
        parse_json(b"[NaN]", strict=True)


def test_what_a_file_says_is_shown_on_one_line() -> None:
    assert shown("model.layers.0") == "model.layers.0"
    assert shown("\x1b[2J\n") == r"'\x1b[2J\n'"
    assert shown(Path("/a\nb")) == r"'/a\nb'"
    for long in ("x" * 1000, [10**4000] * 1000, {"a": "\n" * 1000}):
        assert len(shown(long)) < 900
        assert shown(long).isprintable()
