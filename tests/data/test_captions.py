"""Caption files: encodings, nesting, files that are too short."""

from __future__ import annotations

import gzip
import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from qsens.config import DatasetConfig
from qsens.data.captions import identify_samples, read_captions
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


def write_as(file: Path, captions: list[str]) -> None:
    """Write a sample file as its suffix, in lower case, says."""
    suffix = file.suffix.lower()
    if suffix == ".txt":
        file.write_text("\n".join(captions) + "\n")
    elif suffix in (".jsonl", ".ndjson"):
        file.write_text("".join(f"{json.dumps({'caption': one})}\n" for one in captions))
    else:
        with closing(sqlite3.connect(file)) as opened, opened:
            opened.execute(
                "CREATE TABLE vlm_calib_samples "
                "(split, image_relpath, image_id, caption_id, caption)"
            )
            rows = [("small", "", 0, at, one) for at, one in enumerate(captions)]
            opened.executemany("INSERT INTO vlm_calib_samples VALUES (?, ?, ?, ?, ?)", rows)


@pytest.mark.parametrize(
    "suffix", [".TXT", ".Txt", ".JSONL", ".Jsonl", ".NDJSON", ".SQLite", ".SQLITE3", ".DB"]
)
def test_a_suffix_says_what_a_file_is_in_any_case(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"captions{suffix}"
    write_as(path, ["one", "two"])
    assert read_captions(path, "small") == ["one", "two"]


@pytest.mark.parametrize(
    "name",
    [
        "captions.csv",
        "captions.tsv",
        "captions.txt.gz",
        "captions.jsonl.bak",
        "captions",
        ".txt",
    ],
)
def test_another_suffix_is_refused_with_those_that_are_known(name: str, tmp_path: Path) -> None:
    """Whatever stands in it: brackets and keys are no captions."""
    content = b"one\ntwo\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    data = DatasetConfig(directory=tmp_path, files={"small": name}, size=("small",))
    with pytest.raises(UserError, match="is no file of samples that qsens knows") as caught:
        identify_samples(data, ("small",))
    assert name in caught.value.where
    for suffix in (".txt", ".jsonl", ".ndjson", ".sqlite", ".sqlite3", ".db"):
        assert suffix in caught.value.remedy


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".sqlite"])
def test_what_is_no_file_is_not_waited_for(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"captions{suffix}"
    os.mkfifo(path)
    with pytest.raises(UserError, match="is a pipe, and no file") as caught:
        read_captions(path)
    assert caught.value.where == f"captions file {path}"
    path.unlink()
    path.symlink_to("n" * 256)
    with pytest.raises(UserError, match="File name too long"):
        read_captions(path)
