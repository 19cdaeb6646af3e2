from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from qsens.analysis.samples import SampleScores
from qsens.config import DatasetConfig
from qsens.report import build_summary, charts, write_sweep
from qsens.report.charts import pareto
from qsens.report.views import heat_table, protected
from qsens.results import read_manifest
from qsens.schema.summary import ParetoPoint, Summary
from tests.report.conftest import reports

A, B = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
CELLS = ["wint8_afp16-small", "wint8_afp16-medium", "wfp8_afp8-small", "wfp8_afp8-medium"]


def cells(make: Any, **partial: list[str]) -> dict[str, Any]:
    """Return manifests: A and B hold 3:1, 1:1, 1:3 and, in the last, B failed."""
    scores = [(3.0, 1.0), (2.0, 2.0), (10.0, 30.0), (8.0, None)]
    return {
        cell: make.manifest(
            {
                A: make.group(a),
                B: make.group(b) if b is not None else make.group(None, "failed"),
            },
            cell=cell,
            partial=partial.get(cell.replace("-", "_"), []),
        )
        for cell, (a, b) in zip(CELLS, scores, strict=True)
    }


def whole(make: Any, **more: Any) -> Summary:
    directories = {cell: f"weight/{cell}" for cell in CELLS}
    return build_summary(make.plan(**more), reports(cells(make)), {}, directories, None)


def test_the_summary_states_every_cell(make: Any) -> None:
    manifests = cells(make, wfp8_afp8_small=["8 of 16 samples"])
    del manifests["wint8_afp16-medium"]
    missing = {"wint8_afp16-medium": "out of memory"}
    plan = make.plan()
    summary = build_summary(plan, reports(manifests), missing, {CELLS[0]: "a/b"}, "earlier")
    assert summary.sweep_id == plan.sweep_id
    assert summary.created == "2030-01-02T03:04:05.678+00:00"
    assert (summary.preset, summary.model, summary.previous) == ("nightly", "tiny", "earlier")
    assert summary.checkpoint_digest == "cd" * 32
    assert [cell.cell for cell in summary.cells] == CELLS
    assert [cell.status for cell in summary.cells] == ["done", "missing", "done", "done"]
    assert [(cell.cell, cell.reason) for cell in summary.missing] == [
        ("wint8_afp16-medium", "out of memory")
    ]
    first, second, third, _ = summary.cells
    assert (first.total_sensitivity, first.effective_bits_reached) == (4.0, 8.25)
    assert (first.samples_used, first.samples_scored, first.directory) == (15, 14, "a/b")
    assert [(row.layer, row.position, row.share) for row in first.rows] == [
        (A, 1, 0.75),
        (B, 2, 0.25),
    ]
    assert first.digest == plan.cell(CELLS[0]).digest
    assert (second.total_sensitivity, second.directory, second.rows) == (None, None, ())
    assert third.partial == ("8 of 16 samples",)
    assert not summary.complete


def test_complete_means_all_there_and_all_whole(make: Any) -> None:
    assert whole(make).complete
    some = cells(make, wfp8_afp8_small=["8 of 16 samples"])
    assert not build_summary(make.plan(), reports(some), {}, {}, None).complete
    del some["wfp8_afp8-small"]
    summary = build_summary(make.plan(), reports(some), {}, {}, None)
    assert not summary.complete
    assert summary.missing[0].reason == "no result"


def test_lanes_change_nothing(make: Any, tmp_path: Path) -> None:
    one, two = whole(make, lanes=1), whole(make, lanes=2)
    assert make.plan(lanes=2).cells != make.plan(lanes=1).cells
    assert one == two
    first = [path.read_bytes() for path in write_sweep(one, tmp_path / "a")]
    assert first == [path.read_bytes() for path in write_sweep(two, tmp_path / "b")]


def test_summary_json_makes_the_same_pages_again(make: Any, tmp_path: Path) -> None:
    paths = write_sweep(whole(make), tmp_path / "a")
    assert [path.name for path in paths] == [
        "summary.md",
        "summary.json",
        "index.html",
        "summary.svg",
    ]
    read = Summary.model_validate_json(paths[1].read_bytes())
    # What is read has been checked, and says so.
    assert read.checksum is not None
    assert read.model_copy(update={"checksum": None}) == whole(make)
    again = write_sweep(read, tmp_path / "b")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    data = json.loads(paths[1].read_text(encoding="utf-8"))
    with pytest.raises(ValidationError):
        Summary.model_validate({**data, "surprise": 1})


def test_groups_to_protect_are_ranked_over_whole_cells(make: Any) -> None:
    # A: (3/4 + 1/2 + 1/4 + 1) / 4 = 5/8; B: (1/4 + 1/2 + 3/4) / 3 = 1/2.
    found = protected(whole(make))
    assert [(group.layer, group.share, group.cells) for group in found.groups] == [
        (A, 0.625, 4),
        (B, 0.5, 3),
    ]
    assert (found.cells, found.whole) == (4, True)
    # Without the partial first and last cell: A (1/2 + 1/4) / 2, B (1/2 + 3/4) / 2.
    some = cells(make, wint8_afp16_small=["x"], wfp8_afp8_medium=["x"])
    found = protected(build_summary(make.plan(), reports(some), {}, {}, None))
    assert [(group.layer, group.share) for group in found.groups] == [(B, 0.625), (A, 0.375)]
    assert (found.cells, found.whole) == (2, True)
    only = {CELLS[0]: some[CELLS[0]]}
    found = protected(build_summary(make.plan(), reports(only), {}, {}, None))
    assert (found.cells, found.whole) == (1, False)


def test_the_heat_table_is_of_the_largest_size_with_results(make: Any) -> None:
    heat = heat_table(whole(make))
    assert heat is not None
    assert (heat.size, heat.top) == ("medium", 1.0)
    assert [cell.cell for cell in heat.cells] == ["wint8_afp16-medium", "wfp8_afp8-medium"]
    assert [(layer, [row.share if row else None for row in rows]) for layer, rows in heat.rows] == [
        (A, [0.5, 1.0]),
        (B, [0.5, None]),
    ]
    small = {cell: found for cell, found in cells(make).items() if cell.endswith("small")}
    heat = heat_table(build_summary(make.plan(), reports(small), {}, {}, None))
    assert heat is not None
    assert heat.size == "small"
    assert heat_table(build_summary(make.plan(), {}, {}, {}, None)) is None


def test_missing_and_partial_cells_are_loud(make: Any, tmp_path: Path) -> None:
    manifests = cells(make, wfp8_afp8_small=["8 of 16 samples"])
    del manifests["wint8_afp16-medium"]
    summary = build_summary(
        make.plan(), reports(manifests), {"wint8_afp16-medium": "out of | memory"}, {}, None
    )
    md, _, html, *_ = write_sweep(summary, tmp_path)
    text = md.read_text(encoding="utf-8")
    head = text[: text.index("| | |")]
    assert "PARTIAL: 1 of 4 cells missing" in head
    assert "> - wint8_afp16-medium: out of \\| memory" in head
    assert "> - wfp8_afp8-small: 8 of 16 samples" in head
    page = make.page(html)
    head = page.text[: page.text.index("Cells done")]
    assert "PARTIAL: 1 of 4 cells missing" in head
    assert "wint8_afp16-medium: out of | memory" in head
    assert "wfp8_afp8-small: 8 of 16 samples" in head
    assert "✓ Complete" not in page.text
    lines = text[text.index("## Cells") :].split("\n")
    lines = [line for line in lines if line.startswith(("| wint8", "| wfp8"))]
    assert [line.replace("\\|", "").count("|") for line in lines] == [11] * 4
    assert "**MISSING**" in lines[1]
    assert "**PARTIAL**" in lines[2]


def test_a_whole_sweep_has_no_banner(make: Any, tmp_path: Path) -> None:
    md, _, html, *_ = write_sweep(whole(make), tmp_path)
    page = make.page(html)
    assert "✓ Complete" in page.text
    assert "PARTIAL" not in md.read_text(encoding="utf-8") + page.text
    assert not {"link", "img"} & set(page.tags)
    assert page.foreign_scripts() == []


def test_links_are_relative_to_where_the_sweep_lies(make: Any, tmp_path: Path) -> None:
    plan = make.plan()
    directories = {CELLS[0]: "weight-int8-act-fp16/run small"}
    summary = build_summary(
        plan, reports(cells(make)), {}, directories, "20291231T000000000Z-00000000"
    )
    nested = tmp_path / "sweeps" / plan.sweep_id
    md, _, html, *_ = write_sweep(summary, nested)
    link = "../../weight-int8-act-fp16/run%20small/per-layer-sensitivity.html"
    previous = "../20291231T000000000Z-00000000/index.html"
    assert set(make.page(html).links) == {link, previous, "../../index.html"}
    assert f"[report]({link})" in md.read_text(encoding="utf-8")
    assert f"({previous})" in md.read_text(encoding="utf-8")
    _, _, html, *_ = write_sweep(summary, tmp_path / "tmp" / plan.sweep_id)
    assert link.removeprefix("../../") in make.page(html).links
    assert "../../index.html" not in make.page(html).links


def test_hostile_text_is_text(make: Any, tmp_path: Path) -> None:
    bad = '<script>alert("1")</script>|\n# {{ 7 * 7 }}' + "n" * 10_000
    manifests = cells(make)
    manifests[CELLS[0]] = make.manifest({bad: make.group(3.0), B: make.group(1.0)}, cell=CELLS[0])
    del manifests[CELLS[1]]
    directories = {CELLS[0]: "javascript:alert(1)", CELLS[2]: '"><script>x</script>'}
    summary = build_summary(make.plan(), reports(manifests), {CELLS[1]: bad}, directories, bad)
    md, data, html, *_ = write_sweep(summary, tmp_path)
    page = make.page(html)
    assert page.foreign_scripts() == []
    assert all(":" not in link and "<" not in link for link in page.links)
    assert "<" not in md.read_text(encoding="utf-8")
    assert not any(
        line.startswith("# ") and "7" in line for line in md.read_text(encoding="utf-8").split("\n")
    )
    assert json.loads(data.read_text(encoding="utf-8"))["cells"][0]["rows"][0]["layer"] == bad


REFERENCE = Path(__file__).parents[3] / "shared" / "reference-manifests"


def int8_at_three_sizes(make: Any) -> tuple[Summary, dict[str, Any]]:
    dataset = DatasetConfig()
    plan = make.plan(pairs=("wint8_aint8",), dataset=dataset)
    files = {
        f"wint8_aint8-{size}": REFERENCE / f"qwen3_vl_4b-wint8_aint8-lm-{size}.json"
        for size in dataset.size
    }
    manifests = {cell: read_manifest(path) for cell, path in files.items()}
    raw = {cell: json.loads(path.read_text(encoding="utf-8")) for cell, path in files.items()}
    return build_summary(plan, reports(manifests), {}, {}, None), raw


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the published manifests are not here")
def test_the_published_sizes_give_the_stability_table(make: Any, tmp_path: Path) -> None:
    summary, raw = int8_at_three_sizes(make)
    scores = {
        cell: {
            key: row["scores"][0]
            for key, row in data["layer_sensitivity"].items()
            if key.startswith("language_model")
        }
        for cell, data in raw.items()
    }
    names = sorted(scores["wint8_aint8-small"])
    assert len(names) == 144
    found = {(entry.smaller, entry.larger): entry for entry in summary.sizes_compared}
    assert list(found) == [("small", "medium"), ("medium", "large")]
    for (one, other), entry in found.items():
        a, b = ([scores[f"wint8_aint8-{size}"][name] for name in names] for size in (one, other))
        assert entry.groups == 144
        assert entry.spearman == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
        assert entry.kendall == pytest.approx(stats.kendalltau(a, b).statistic, abs=1e-12)
        for cut in (5, 10, 20):
            tops = [{names[at] for at in np.argsort(values)[-cut:]} for values in (a, b)]
            assert entry.overlap[cut] == len(tops[0] & tops[1])
    # Large scored what medium scored: their agreement says nothing about samples.
    assert [entry.independent for entry in summary.sizes_compared] == ["in part", "no"]
    md, _, html, chart = write_sweep(summary, tmp_path)
    assert "no: both scored the same 128 samples" in md.read_text(encoding="utf-8")
    assert "no: both scored the same 128 samples" in make.page(html).text
    assert "not known" in md.read_text(encoding="utf-8")
    assert chart.read_text(encoding="utf-8").count("<rect") == 1 + 40


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the published manifests are not here")
def test_the_published_sizes_give_heat_map_and_profile(make: Any, tmp_path: Path) -> None:
    summary, raw = int8_at_three_sizes(make)
    page = make.page(write_sweep(summary, tmp_path)[2])
    (text,) = [script for script in page.scripts if script.startswith("{")]
    charts = json.loads(text)["charts"]
    assert set(charts) == {"heat", "pareto", "profiles", "sizes"}
    large = raw["wint8_aint8-large"]["layer_sensitivity"]
    total = sum(row["scores"][0] for row in large.values())
    heat = charts["heat"]
    assert heat["columns"] == ["wint8_aint8"]
    assert len(heat["names"]) == 144
    for name, (share,) in zip(heat["names"], heat["values"], strict=True):
        expected = large[f"{name}.quant_recipe"]["scores"][0] / total
        assert share == pytest.approx(expected, rel=1e-5)
    profile = charts["profiles"]["wint8_aint8"]
    assert profile["depths"] == list(range(36))
    (down,) = [line for line in profile["lines"] if line["name"] == "down"]
    key = "language_model.layers.4.mlp.down_proj.quant_recipe"
    assert down["values"][4] == pytest.approx(large[key]["scores"][0] / total, rel=1e-5)
    assert [size["size"] for size in charts["sizes"]["wint8_aint8"]["sizes"]] == [
        "small",
        "medium",
        "large",
    ]


def test_the_pareto_curve_marks_the_recipe_at_the_target() -> None:
    points = [ParetoPoint(bits=4.25, damage=2.0), ParetoPoint(bits=6.0, damage=0.5)]
    assert pareto([], 8.0) is None
    found = pareto(points, 5.5)
    assert found is not None
    assert (found["bits"], found["damage"]) == ([4.25, 6.0], [2.0, 0.5])
    assert found["chosen"] == [4.25, 2.0]
    for target, chosen in ((6.0, [6.0, 0.5]), (4.0, None), (None, None)):
        found = pareto(points, target)
        assert found is not None
        assert found["chosen"] == chosen


def test_charts_of_the_markdown_are_well_formed_whatever_the_names(
    make: Any, tmp_path: Path
) -> None:
    bad = '</text><script>alert("1")</script>&\x00\u2028' + "n" * 10_000
    manifests = cells(make)
    manifests[CELLS[1]] = make.manifest({bad: make.group(3.0), B: make.group(1.0)}, cell=CELLS[1])
    chart = write_sweep(build_summary(make.plan(), reports(manifests), {}, {}, None), tmp_path)[3]
    tree = ElementTree.parse(chart)
    tags = {element.tag.rpartition("}")[2] for element in tree.iter()}
    assert tags == {"svg", "title", "rect", "text"}
    assert chart.stat().st_size < 10_000


@pytest.mark.parametrize(
    ("method", "placed_by"), [("gradient", "sensitivity"), ("fisher", "score per token")]
)
def test_a_sweep_says_which_score_it_follows(
    make: Any, tmp_path: Path, method: str, placed_by: str
) -> None:
    manifests, samples = {}, {}
    for cell, manifest in list(cells(make).items())[:2]:
        scheme = manifest.scheme.model_copy(update={"auto_quantize_method": method})
        manifests[cell] = manifest.model_copy(update={"scheme": scheme})
        # 16 samples of 4 tokens, each a batch: v = sum_i s_i / 4^2, and v / 4 a token.
        steps = np.tile([0.5, 1.5], 8)
        values = [manifest.layer_sensitivity[f"{name}.quant_recipe"].sensitivity for name in (A, B)]
        scores = np.stack([value * steps for value in values])
        samples[cell] = SampleScores((A, B), scores, np.full(16, 4.0))
    plan = make.plan(("wint8_afp16",), autoquant={"method": method})
    summary = build_summary(plan, reports(manifests, samples), {}, {}, None)
    said = f"Shares and positions follow the {placed_by}, intervals the {placed_by}"
    texts = _texts(make, summary, tmp_path / "new")
    assert all(said in text for text in texts)
    (chart,) = charts.sizes(summary.cells).values()
    assert chart["per_token"] is True
    for size in chart["sizes"]:
        # Sizes are compared per token: the interval of another score has no place there.
        assert [low is None for low in size["low"]] == [method == "gradient"] * 2
    # Sweeps published before say nothing of it: their intervals are of the score per token.
    older = json.loads(summary.model_dump_json())
    for cell in older["cells"]:
        del cell["stability"]["statistic"]
    texts = _texts(make, Summary.model_validate(older), tmp_path / "older")
    said = f"Shares and positions follow the {placed_by}, intervals the score per token"
    assert all(said in text for text in texts)


def _texts(make: Any, summary: Summary, directory: Path) -> list[str]:
    """Return the Markdown and the words of the page."""
    markdown, _, page, *_ = write_sweep(summary, directory)
    return [markdown.read_text(encoding="utf-8"), make.page(page).text]
