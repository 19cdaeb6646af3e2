from __future__ import annotations

from pathlib import Path
from typing import Any

from qsens.report import build_summary, write_model_index, write_sweep
from qsens.schema.summary import Summary
from tests.report.conftest import reports

CELL = "wint8_afp16-small"


def sweep(make: Any, root: Path, sweep_id: str, created: str, done: bool = True) -> Summary:
    manifests = {CELL: make.manifest({"a": make.group(1.0)})} if done else {}
    summary = build_summary(make.plan(pairs=("wint8_afp16",)), reports(manifests), {}, {}, None)
    summary = summary.model_copy(update={"sweep_id": sweep_id, "created": created})
    write_sweep(summary, root / "sweeps" / sweep_id)
    return summary


def test_sweeps_are_listed_newest_first(make: Any, tmp_path: Path) -> None:
    sweep(make, tmp_path, "20300101-aa", "2030-01-01T00:00:00.000+00:00")
    sweep(make, tmp_path, "20300103-bb", "2030-01-03T00:00:00.000+00:00", done=False)
    sweep(make, tmp_path, "20300102-cc", "2030-01-02T00:00:00.000+00:00")
    path = write_model_index(tmp_path)
    page = make.page(path)
    assert path == tmp_path / "index.html"
    assert page.links == [
        "sweeps/20300103-bb/index.html",
        "sweeps/20300102-cc/index.html",
        "sweeps/20300101-aa/index.html",
    ]
    assert "3 sweeps" in page.text
    assert page.text.count("1 of 2") == 2
    assert page.text.count("0 of 2") == 1
    assert page.text.count("PARTIAL") == 3
    assert all((tmp_path / link).is_file() for link in page.links)
    first = path.read_bytes()
    assert write_model_index(tmp_path).read_bytes() == first


def test_a_whole_sweep_is_complete(make: Any, tmp_path: Path) -> None:
    manifests = {
        cell: make.manifest({"a": make.group(1.0)}) for cell in (CELL, "wint8_afp16-medium")
    }
    plan = make.plan(pairs=("wint8_afp16",))
    summary = build_summary(plan, reports(manifests), {}, {}, None)
    write_sweep(summary, tmp_path / "sweeps" / plan.sweep_id)
    page = make.page(write_model_index(tmp_path))
    assert "complete" in page.text
    assert "PARTIAL" not in page.text
    assert "2 of 2" in page.text


def test_broken_and_foreign_directories_are_named_and_passed_over(
    make: Any, tmp_path: Path
) -> None:
    sweeps = tmp_path / "sweeps"
    sweep(make, tmp_path, "20300101-aa", "2030-01-01T00:00:00.000+00:00")
    good = (sweeps / "20300101-aa" / "summary.json").read_text(encoding="utf-8")
    for name, text in {
        "cut": good[: len(good) // 2],
        "foreign": "[1, 2]",
        "newer": good.replace('"schema_version": 2', '"schema_version": 99', 1),
        "flipped": good.replace('"done"', '"missing"', 1),
        "copied": good,
        "<script>x": "{}",
        ".half.tmp": "{}",
    }.items():
        (sweeps / name).mkdir()
        (sweeps / name / "summary.json").write_text(text, encoding="utf-8")
    (sweeps / "empty").mkdir()
    (sweeps / "binary").mkdir()
    (sweeps / "binary" / "summary.json").write_bytes(b"\xff\xfe\x00")
    (sweeps / "file").write_text("x", encoding="utf-8")
    page = make.page(write_model_index(tmp_path))
    assert page.links == ["sweeps/20300101-aa/index.html"]
    assert "9 entries" in page.text
    for line in (
        "cut its summary.json cannot be read",
        "foreign its summary.json is no summary of a sweep",
        "binary its summary.json cannot be read",
        "<script>x its summary.json is no summary of a sweep",
        "newer its summary.json is a summary of a sweep of schema version 99, and this qsens reads "
        "versions up to 2",
        "flipped its summary.json is damaged: its content does not match its checksum",
        "copied its summary.json is that of another sweep",
        "empty holds no summary.json",
        "file is not a directory",
    ):
        assert line in page.text
    assert page.foreign_scripts() == []
    assert ".half" not in page.text


def test_without_sweeps_the_page_says_so(make: Any, tmp_path: Path) -> None:
    page = make.page(write_model_index(tmp_path))
    assert "No sweep yet" in page.text
    assert "0 sweeps" in page.text
