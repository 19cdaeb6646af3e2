"""Atomic writes: whole or not at all, and nothing overwritten."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qsens.errors import TryAgain, UserError
from qsens.store import set_aside
from qsens.writing import copy_file, make_directory, write_directory, write_file, write_text


def test_write_text_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "one\n")
    write_text(path, "zwölf\n")
    assert path.read_bytes() == "zwölf\n".encode()
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_a_failure_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail() -> None:
        with write_file(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"

    def fail() -> None:
        with write_file(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(TryAgain, match="no space left"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    below = tmp_path / "file" / "below"
    with pytest.raises(UserError, match="cannot be written to: Not a directory") as caught:
        write_text(below / "a.txt", "x")
    assert caught.value.where == f"directory {below}"
    with pytest.raises(UserError, match="cannot be written to: File exists"):
        make_directory(tmp_path / "file")
    with (
        pytest.raises(UserError, match="cannot be written to"),
        write_directory(below / "result", last="manifest.json"),
    ):
        pass
    assert (tmp_path / "file").read_text() == "kept"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_directory_appears_with_its_last_file_last(tmp_path: Path) -> None:
    path = tmp_path / "result"
    with write_directory(path, last="manifest.json") as directory:
        (directory / "manifest.json").write_text("{}")
        (directory / "state").write_text("s")
        assert not path.exists()
    assert sorted(entry.name for entry in path.iterdir()) == ["manifest.json", "state"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]


def test_a_result_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "result"
    for text in ("first", "second"):
        with write_directory(path, last="manifest.json") as directory:
            (directory / "manifest.json").write_text(text)
    assert (path / "manifest.json").read_text() == "first"


def test_a_failed_directory_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with write_directory(tmp_path / "result", last="manifest.json") as directory:
            (directory / "manifest.json").write_text("{}")
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_copy_leaves_equal_content_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("x")
    copy_file(source, target, remedy="")
    os.utime(target, (1, 1))
    copy_file(source, target, remedy="")
    assert target.stat().st_mtime == 1
    source.write_text("y")
    copy_file(source, target, remedy="")
    assert target.read_text() == "y"


def test_what_is_not_to_be_kept_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "results" / "cell"
    for text in ("damaged", "second"):

        def keep() -> bool:
            set_aside(path, "sweep")
            return False

        with write_directory(path, last="manifest.json", keep=keep) as directory:
            (directory / "manifest.json").write_text(text)
    assert (path / "manifest.json").read_text() == "second"
    aside = tmp_path / ".damaged" / "sweep" / "results-cell"
    assert (aside / "manifest.json").read_text() == "damaged"
    # What is set aside is never overwritten either.
    set_aside(path, "sweep")
    assert (aside.with_name("results-cell.1") / "manifest.json").read_text() == "second"
    assert (aside / "manifest.json").read_text() == "damaged"
