"""Caption files: encodings, nesting, files that are too short."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsens.config import DatasetConfig
from qsens.engine.captions import identify_samples, read_captions
from qsens.errors import UserError


def data_set(directory: Path, **files: str) -> DatasetConfig:
    for size, text in files.items():
        (directory / f"{size}.txt").write_text(text)
    return DatasetConfig(
        directory=directory,
        files={size: f"{size}.txt" for size in ("small", "medium", "large")},
        sizes={"small": 2, "medium": 4, "large": 6},
    )


@pytest.mark.parametrize(
    "data",
    [
        b"one\ntwo\n",
        b"one\r\ntwo\r\n",
        b"\xef\xbb\xbfone\ntwo",
        b"\n one \n\n\ttwo\n\n",
    ],
)
def test_the_same_captions_however_written(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes(data)
    assert read_captions(path) == ["one", "two"]


def test_a_unicode_line_separator_is_text(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("one\u2028still one\ntwo\n", encoding="utf-8")
    assert read_captions(path) == ["one\u2028still one", "two"]


def test_invalid_utf8_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes(b"one\ntwo\nthr\xe9e\n")
    with pytest.raises(UserError, match=r"line 3 is no UTF-8 \(byte 0xe9\)"):
        read_captions(path)


@pytest.mark.parametrize("data", [b"", b"\n\n  \r\n"])
def test_an_empty_file_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match="holds no caption"):
        read_captions(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.txt"):
        read_captions(tmp_path / "nothing.txt")


def test_nested_files_are_accepted(tmp_path: Path) -> None:
    data = data_set(tmp_path, small="a\nb\n", medium="a\nb\nc\nd\n", large="a\nb\nc\nd\ne\nf\n")
    found, notices = identify_samples(data, ("small", "medium", "large"))
    assert [found[size].available for size in ("small", "medium", "large")] == [2, 4, 6]
    assert notices == []


def test_files_that_are_not_nested_are_refused(tmp_path: Path) -> None:
    data = data_set(tmp_path, small="a\nb\n", medium="a\nX\nc\nd\n")
    with pytest.raises(UserError, match=r"not the head of medium\.txt: caption 2 differs"):
        identify_samples(data, ("small", "medium"))


def test_a_file_too_short_is_said(tmp_path: Path) -> None:
    data = data_set(tmp_path, small="a\nb\n", medium="a\nb\nc\n")
    found, notices = identify_samples(data, ("small", "medium"))
    assert found["medium"].available == 3
    assert len(notices) == 1
    assert "3 captions, fewer than the 4" in notices[0]
    assert "PARTIAL" in notices[0]
