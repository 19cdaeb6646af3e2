"""Verdicts and points of audits, as the pages show them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qsens.analysis.audit import Z90
from qsens.report import build_cell, build_summary, write_cell, write_sweep
from tests.report.conftest import reports


def charts_of(page: Any) -> dict[str, Any]:
    """Return the data of a page's charts."""
    (data,) = [text for text in page.scripts if text.startswith("{")]
    found: dict[str, Any] = json.loads(data)["charts"]
    return found


@pytest.mark.parametrize("method", ["fisher", "gradient"])
def test_the_pages_draw_estimate_against_truth(make: Any, tmp_path: Path, method: str) -> None:
    audited = make.manifest({"a": make.group(1.0)}, audit=make.audit(method).model_dump())
    write_cell(build_cell(audited), tmp_path)
    drawn = charts_of(make.page(tmp_path / "per-layer-sensitivity.html"))["audit"]
    if method == "gradient":
        assert drawn["estimate"] == [1, 2, 3, 4, 5, 6]
        assert drawn["truth"] == [1, 2, 3, 4, 6, 5]
        assert drawn["left_out"] == 0
        assert set(drawn["half_width"]) == {None}
    else:
        # A truth of 0 has no place on a logarithmic axis.
        assert drawn["estimate"] == [8e-3, 4e-3, 2e-3, 1e-3, 2e-4]
        assert drawn["truth"] == [1e-2, 4e-3, 2e-3, 1e-3, 5e-4]
        assert drawn["left_out"] == 1
        assert drawn["half_width"] == pytest.approx([Z90 * 1e-4] * 5, rel=1e-5)
    said = (tmp_path / "per-layer-sensitivity.md").read_text()
    row = next(line for line in said.splitlines() if line.startswith("| layers.0.&lt;b&gt; "))
    ratio = "0.80" if method == "fisher" else "–"
    assert row.split(" | ")[1:] == ["8.000e-03", "1.000e-04", "1.000e-02", f"{ratio} |"]


def test_a_pair_has_its_verdict_on_its_line(make: Any, tmp_path: Path) -> None:
    cells = ["wint8_afp16-small", "wint8_afp16-medium", "wfp8_afp8-small", "wfp8_afp8-medium"]
    manifests = {cell: make.manifest({"a": make.group(1.0)}, cell=cell) for cell in cells}
    audits = [make.audit()]
    assert audits[0].judgement.verdict == "rank only"
    summary = build_summary(make.plan(), reports(manifests), {}, {}, None, audits=audits)
    write_sweep(summary, tmp_path)
    before = (tmp_path / "index.html").read_bytes()
    page = make.page(tmp_path / "index.html")
    assert list(charts_of(page)["audits"]) == ["wint8_afp16"]
    lines = (tmp_path / "summary.md").read_text().splitlines()
    pairs = lines[lines.index("## Pairs") : lines.index("## Audits")]
    columns = [line.split(" | ") for line in pairs if line.startswith("| ")]
    at = columns[0].index("Audit")
    verdicts = {row[0].strip("| "): row[at] for row in columns if row[0].startswith("| w")}
    assert verdicts == {"wint8_afp16": "rank only", "wfp8_afp8": "–"}
    write_sweep(summary, tmp_path)
    assert (tmp_path / "index.html").read_bytes() == before


def test_without_audits_nothing_speaks_of_them(make: Any, tmp_path: Path) -> None:
    cells = ["wint8_afp16-small", "wint8_afp16-medium", "wfp8_afp8-small", "wfp8_afp8-medium"]
    manifests = {cell: make.manifest({"a": make.group(1.0)}, cell=cell) for cell in cells}
    write_sweep(build_summary(make.plan(), reports(manifests), {}, {}, None), tmp_path)
    assert "Audit" not in (tmp_path / "summary.md").read_text()
    assert "Audit" not in make.page(tmp_path / "index.html").text
