from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsens.analysis.samples import SampleScores
from qsens.report import build_cell, write_cell
from qsens.report.charts import depth_map
from qsens.results import read_manifest
from qsens.schema.manifest import Manifest

REFERENCE = Path(__file__).parents[3] / "shared" / "reference-manifests"
HOSTILE = {
    "html": '<script>alert("x")</script><img src=x onerror=alert(1)>',
    "quotes": "a\"b'c",
    "path": "../../../etc/passwd",
    "pipes": "a|b|c\\|d",
    "lines": "a\n\n# b\r\n| c |\u2028d",
    "code": "`a` **b** [c](javascript:alert(1)) <!--",
    "template": "{{ 7 * 7 }}{% raw %}",
    "long": "n" * 10_000,
}


def table(markdown: str) -> list[list[str]]:
    """Return the cells of the last table, without its two head lines."""
    lines = markdown.rstrip().split("\n")
    start = max(i for i, line in enumerate(lines) if line.startswith("| Position"))
    rows = lines[start + 2 :]
    return [[cell.strip() for cell in re.split(r"(?<!\\)(?:\\\\)*\|", row)[1:-1]] for row in rows]


def written(manifest: Any, directory: Path) -> tuple[str, Any, Path]:
    md, data, html, *charts = write_cell(build_cell(manifest), directory)
    assert [path.name for path in charts] in ([], ["per-layer-sensitivity.svg"])
    assert [path.name for path in (md, data, html)] == [
        "per-layer-sensitivity.md",
        "per-layer-sensitivity.json",
        "per-layer-sensitivity.html",
    ]
    return md.read_text(encoding="utf-8"), json.loads(data.read_text(encoding="utf-8")), html


def three(make: Any, **more: Any) -> Any:
    rows = {
        "layers.1.mlp.down_proj": make.group(1.0, depth=1),
        "layers.0.mlp.gate_proj": make.group(
            3.0,
            kind="gate_up",
            members=["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"],
            size_cost=1048576.0,
        ),
        "visual.x": make.group(None, "disabled", kind="vision", depth=None, num_bits=16.0),
    }
    return make.manifest(rows, **more)


def test_the_table_holds_what_the_manifest_says(make: Any, tmp_path: Path) -> None:
    md, data, html = written(three(make), tmp_path)
    assert table(md) == [
        [
            "1",
            "layers.0.mlp.gate_proj",
            "gate_up",
            "8",
            "3.000e+00",
            "7.500e-01",
            "75.00 %",
            "2.00",
            "scored",
        ],
        [
            "2",
            "layers.1.mlp.down_proj",
            "down",
            "8",
            "1.000e+00",
            "2.500e-01",
            "25.00 %",
            "1.00",
            "scored",
        ],
        ["–", "visual.x", "vision", "16", "–", "–", "–", "1.00", "disabled"],
    ]
    assert [row["position"] for row in data["rows"]] == [1, 2, None]
    assert data["rows"][0]["share"] == 0.75
    assert data["totals"]["sensitivity"] == 4.0
    assert {kind: part["share"] for kind, part in data["by_kind"].items()} == {
        "gate_up": 0.75,
        "down": 0.25,
    }
    assert {depth: part["sensitivity"] for depth, part in data["by_depth"].items()} == {
        "0": 3.0,
        "1": 1.0,
    }
    assert data["totals"]["sensitivity_per_token"] == 1.0
    assert data["search"]["effective_bits_reached"] == 8.25
    page = make.page(html)
    assert page.table_rows[-1] == 4
    assert "layers.0.mlp.gate_proj + up_proj" in page.text
    assert "1. layers.0.mlp.gate_proj + up_proj (3.000e+00, 75.00 %)" in md


def test_the_header_states_what_was_measured(make: Any, tmp_path: Path) -> None:
    md, _, html = written(three(make), tmp_path)
    for line in (
        "| Model | tiny |",
        "| Checkpoint | Tiny, cdcdcdcdcdcd |",
        "| Dataset | captions, small |",
        "| Read as | captions alone (text) |",
        "| Samples | 16 asked, 15 used, 14 scored |",
        "| Effective bits | target 8.5, reached 8.25 |",
        "| Constraint met | yes |",
        "| Total sensitivity | 4.000e+00 |",
        "| Score of the groups quantized | 3.000e+00 |",
        "| Created | 2030-01-02T03:04:05.678+00:00 |",
    ):
        assert line in md
    page = make.page(html)
    assert "Complete" in page.text
    assert "PARTIAL" not in md + page.text
    assert "EXPERIMENTAL" not in md + page.text


def test_partial_and_experimental_are_loud(make: Any, tmp_path: Path) -> None:
    quantization = {
        "pair": "wint8_afp8",
        "granularity": "default",
        "experimental": True,
        "effective_bits": 8.0,
        "modelopt_config": {},
    }
    manifest = three(
        make, partial=["15 of 16 samples: max_calib_samples"], quantization=quantization
    )
    md, data, html = written(manifest, tmp_path)
    page = make.page(html)
    for text in (md, page.text):
        # Before any number.
        head = text[: text.index("Total sensitivity")]
        assert "PARTIAL" in head
        assert "15 of 16 samples: max_calib_samples" in head
        assert "EXPERIMENTAL" in head
    assert "Complete" not in page.text
    assert data["partial"] == ["15 of 16 samples: max_calib_samples"]


def test_groups_that_failed_are_said(make: Any, tmp_path: Path) -> None:
    rows = {
        "a": make.group(1.0),
        "b": make.group(None, "failed", reason="33 columns do not divide into blocks of 32"),
        "c": make.group(float("nan")),
    }
    md, data, html = written(make.manifest(rows), tmp_path)
    page = make.page(html)
    assert "2 groups could not be scored" in md
    assert "2 groups could not be scored" in page.text
    assert "Complete" not in page.text
    assert table(md)[1][-1] == "failed: 33 columns do not divide into blocks of 32"
    assert table(md)[2][-1] == "non_finite"
    assert data["rows"][2]["sensitivity"] is None


def test_without_any_score_there_is_still_a_report(make: Any, tmp_path: Path) -> None:
    md, data, html = written(make.manifest({"a": make.group(None, "disabled")}), tmp_path)
    assert "Protect first" not in md + make.page(html).text
    assert data["totals"]["sensitivity"] == 0.0
    assert table(md)[0][0] == "–"


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_names_are_text(make: Any, tmp_path: Path, name: str) -> None:
    plain_md, _, plain_html = written(
        make.manifest({"a": make.group(2.0), "b": make.group(1.0)}), tmp_path / "plain"
    )
    more = {
        "cell": name,
        "model": {"id": name, "name": name},
        "notices": [],
        "partial": [],
    }
    manifest = make.manifest({name: make.group(2.0, members=[name]), "b": make.group(1.0)}, **more)
    md, data, html = written(manifest, tmp_path / "hostile")
    page, plain = make.page(html), make.page(plain_html)
    assert page.tags == plain.tags
    assert page.attributes == plain.attributes
    assert page.links == []
    assert page.foreign_scripts() == []
    assert len(table(md)) == 2
    assert [len(row) for row in table(md)] == [9, 9]
    # Lines start alike: no name opens a heading, a list or a table.
    starts = [line[:2] for line in md.split("\n")]
    plain_starts = [line[:2] for line in plain_md.split("\n")]
    assert [s for s in starts if s[:1] in "#|->"] == [s for s in plain_starts if s[:1] in "#|->"]
    assert "<" not in md.replace("&lt;", "")
    assert data["rows"][0]["layer"] == name
    assert data["cell"] == name
    assert sorted(path.name for path in (tmp_path / "hostile").iterdir()) == [
        "assets",
        "per-layer-sensitivity.html",
        "per-layer-sensitivity.json",
        "per-layer-sensitivity.md",
    ]
    if len(name) == 10_000:
        assert "n" * 120 not in md + page.text
        assert "n" * 119 + "…" in md


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())
def test_markdown_renders_hostile_names_as_text(make: Any, tmp_path: Path, name: str) -> None:
    render = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table").render

    def tags(directory: Path, name: str) -> list[str]:
        rows = {name: make.group(2.0, members=[name, "x.up"]), "b": make.group(1.0)}
        more = {"cell": name, "partial": [name], "notices": [name], "model": {"id": name}}
        md, *_ = written(make.manifest(rows, **more), directory)
        html = directory / "rendered.html"
        html.write_text(render(md), encoding="utf-8")
        return list(make.page(html).tags)

    assert tags(tmp_path / "hostile", name) == tags(tmp_path / "plain", "a")


def test_hostile_reasons_are_text(make: Any, tmp_path: Path) -> None:
    reason = "<script>x</script>\n# heading | `a` {{ 7 * 7 }}"
    md, _, html = written(three(make, partial=[reason], notices=[reason]), tmp_path)
    page = make.page(html)
    assert page.foreign_scripts() == []
    assert page.text.count("<script>x</script> # heading | `a` {{ 7 * 7 }}") == 2
    assert "> - &lt;script&gt;x&lt;/script&gt; # heading \\| \\`a\\`" in md


def test_equal_manifests_give_equal_bytes(make: Any, tmp_path: Path) -> None:
    first = [path.read_bytes() for path in write_cell(build_cell(three(make)), tmp_path / "a")]
    again = [path.read_bytes() for path in write_cell(build_cell(three(make)), tmp_path / "b")]
    over = [path.read_bytes() for path in write_cell(build_cell(three(make)), tmp_path / "a")]
    assert first == again == over


def test_pages_need_nothing_but_the_scripts_beside_them(make: Any, tmp_path: Path) -> None:
    *_, html = written(three(make), tmp_path / "run")
    page = make.page(html)
    assert page.links == []
    assert not {"link", "img", "iframe"} & set(page.tags)
    (script,) = [name for name in page.scripts if name.startswith("assets/")]
    assert (tmp_path / "run" / script).is_file()
    text = html.read_text(encoding="utf-8")
    assert "://" not in text
    assert "url(" not in text
    shared = tmp_path / "assets"
    *_, html = write_cell(build_cell(three(make)), tmp_path / "other", assets=shared)[:3]
    assert "../assets/report-" in html.read_text(encoding="utf-8")
    assert sorted(path.name.partition("-")[0] for path in shared.iterdir()) == ["plotly", "report"]


def test_a_single_file_holds_its_scripts(make: Any, tmp_path: Path) -> None:
    *_, html = write_cell(build_cell(three(make)), tmp_path, single_file=True)[:3]
    text = html.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 3
    assert "plotly.js v" in text
    assert "src=" not in text[: text.index("<body>")]
    assert not (tmp_path / "assets").exists()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("gradient", "gradient x output error"),
        ("fisher", "estimate of the KL"),
        ("kl_div", "measured"),
    ],
)
def test_how_to_read_it_speaks_of_the_method_used(
    make: Any, tmp_path: Path, method: str, words: str
) -> None:
    scheme = make.manifest({"a": make.group(1.0)}).scheme
    scheme = scheme.model_copy(update={"auto_quantize_method": method})
    md, _, html = written(three(make, scheme=scheme.model_dump()), tmp_path)
    others = {"gradient x output error", "estimate of the KL", "measured, and summed"} - {words}
    for text in (md, make.page(html).text):
        assert words in text
        assert not [other for other in others if words not in other and other in text]
        assert ("Sensitivity (nats²)" in text) == (method == "gradient")


def test_samples_say_how_sure_each_row_is(make: Any, tmp_path: Path) -> None:
    steps = np.tile([0.5, 1.5], 8)
    scores = 4 * np.stack([steps * 3, steps, 5 * steps])
    samples = SampleScores(("b", "a", "c"), scores, np.full(16, 4.0))
    manifest = make.manifest({"a": make.group(4.0), "b": make.group(12.0), "c": make.group(20.0)})
    paths = write_cell(build_cell(manifest, samples), tmp_path)
    data = json.loads(paths[1].read_text(encoding="utf-8"))
    assert [row["layer"] for row in data["rows"]] == ["c", "b", "a"]
    assert [row["positions"] for row in data["rows"]] == [[1, 1], [2, 2], [3, 3]]
    low, high = data["rows"][2]["interval"]
    # A batch is one sample of 4 tokens: 16 of them at 4 x 0.5 or 4 x 1.5, over 4^2.
    assert 2.4 < low < data["rows"][2]["sensitivity"] == 4.0 < high < 5.6
    assert data["stability"]["statistic"] == "sensitivity"
    assert data["stability"]["first_stable"] is True
    assert {row["verdict"] for row in data["rows"]} == {"stable"}
    rows = table(paths[0].read_text(encoding="utf-8"))
    assert rows[0][7:] == [f"{100 * 20 / 36:.2f} %", "1", "1.00", "stable"]
    without = json.loads(write_cell(build_cell(manifest), tmp_path)[1].read_text(encoding="utf-8"))
    assert "stability" not in without
    assert "interval" not in without["rows"][0]


def two_batches(make: Any, method: str, **scheme: Any) -> tuple[Manifest, SampleScores]:
    """Return two groups, the one first by the batches' sum and the other first per token.

    Eight samples of 10 tokens are one batch, eight of 100 the other. Each group has its scores in
    one of them: 8 x 100 / 80^2 = 0.125 against 8 x 1000 / 800^2 = 0.0125; over all 880 tokens,
    800 / 880 against 8000 / 880.
    """
    tokens = np.repeat([10.0, 100.0], 8)
    short, long = np.repeat([[100.0, 0.0], [0.0, 1000.0]], 8, axis=1)
    rows = {
        "short": make.group(0.125, sensitivity_per_token=800 / 880),
        "long": make.group(0.0125, sensitivity_per_token=8000 / 880),
    }
    found = make.manifest(rows)
    changed = {"auto_quantize_method": method, **scheme}
    found = found.model_copy(update={"scheme": found.scheme.model_copy(update=changed)})
    return found, SampleScores(("short", "long"), np.stack([short, long]), tokens)


@pytest.mark.parametrize("batch_size", [None, 8])
def test_place_share_and_interval_follow_one_statistic(make: Any, batch_size: int | None) -> None:
    report = build_cell(*two_batches(make, "gradient", auto_quantize_batch_size=batch_size))
    first, second = report.rows
    assert (first.layer, first.position, first.positions) == ("short", 1, (1, 1))
    assert (second.layer, second.position, second.positions) == ("long", 2, (2, 2))
    assert first.share == pytest.approx(10 / 11)
    assert report.stability is not None
    assert report.stability.statistic == "sensitivity"
    # k of 16 draws are short ones; 4 to 12 of them in 95 % of resamples, each 100 / 80^2.
    assert first.interval == pytest.approx((4 / 64, 12 / 64))
    assert second.interval == pytest.approx((4 / 640, 12 / 640))


def test_nats_a_token_place_groups_by_fisher(make: Any) -> None:
    manifest, samples = two_batches(make, "fisher")
    rows = {
        key: row.model_copy(update={"sensitivity": (row.sensitivity_per_token or 0.0) * 880})
        for key, row in manifest.layer_sensitivity.items()
    }
    report = build_cell(manifest.model_copy(update={"layer_sensitivity": rows}), samples)
    assert [(row.layer, row.positions) for row in report.rows] == [
        ("long", (1, 1)),
        ("short", (2, 2)),
    ]
    assert report.stability is not None
    assert report.stability.statistic == "sensitivity_per_token"
    low, high = report.rows[0].interval or (0.0, 0.0)
    # 4 to 12 of 16 draws are long ones: 4000 / 520 to 12000 / 1240 a token.
    assert (low, high) == pytest.approx((4000 / 520, 12000 / 1240))


def test_pages_say_which_score_intervals_are_of(make: Any, tmp_path: Path) -> None:
    for method, words in (("gradient", "sensitivity"), ("fisher", "score per token")):
        manifest, samples = two_batches(make, method)
        if method == "fisher":
            rows = {
                key: row.model_copy(update={"sensitivity": (row.sensitivity_per_token or 0) * 880})
                for key, row in manifest.layer_sensitivity.items()
            }
            manifest = manifest.model_copy(update={"layer_sensitivity": rows})
        paths = write_cell(build_cell(manifest, samples), tmp_path / method)
        text, page = paths[0].read_text(encoding="utf-8"), make.page(paths[2])
        assert f"| {words.capitalize()}, 95 % |" in text
        for said in (text, page.text):
            assert f"Intervals are of the {words}, which positions follow." in said
        assert f"95 % intervals of their {words}" in page.text
        data = next(json.loads(script) for script in page.scripts if script.startswith("{"))
        chart = data["charts"]["first"]
        assert chart["per_token"] == (method == "fisher")
        for at, row in enumerate(json.loads(paths[1].read_text(encoding="utf-8"))["rows"]):
            assert [chart["low"][at], chart["high"][at]] == row["interval"]
            assert chart["low"][at] < chart["scores"][at] < chart["high"][at]


@pytest.mark.parametrize(
    ("change", "batch_size"),
    [(1.0, 4), (1.0, 3), (1.001, None), (1.001, 8)],
)
def test_no_interval_where_samples_do_not_give_the_stated_scores(
    make: Any, change: float, batch_size: int | None
) -> None:
    manifest, samples = two_batches(make, "gradient", auto_quantize_batch_size=batch_size)
    samples = SampleScores(samples.groups, samples.scores * change, samples.tokens)
    report = build_cell(manifest, samples)
    assert report.stability is None
    assert [(row.position, row.interval, row.verdict) for row in report.rows] == [
        (1, None, None),
        (2, None, None),
    ]


def test_groups_without_a_score_take_no_place_in_the_bootstrap(make: Any) -> None:
    manifest, samples = two_batches(make, "gradient")
    rows = dict(manifest.layer_sensitivity)
    rows["lost.quant_recipe"] = rows["short.quant_recipe"].model_copy(
        update={"status": "no_gradient", "sensitivity": None, "sensitivity_per_token": None}
    )
    held = SampleScores(
        (*samples.groups, "lost"), np.vstack([samples.scores, np.zeros(16)]), samples.tokens
    )
    report = build_cell(manifest.model_copy(update={"layer_sensitivity": rows}), held)
    assert report.stability is not None
    assert report.stability.stable + report.stability.undecided == 2


def test_the_depth_map_adds_up(make: Any) -> None:
    rows = {
        "layers.0.mlp.down_proj": make.group(2.0, depth=0),
        "layers.7.mlp.down_proj": make.group(1.0, depth=7),
        "layers.7.mlp.gate_proj": make.group(1.0, kind="gate_up", depth=7),
        "lm_head": make.group(4.0, kind="head", depth=None),
    }
    found = depth_map(build_cell(make.manifest(rows)).ranked)
    assert found is not None
    assert found.depths == (0, 7)
    assert found.kinds == (("gate_up", (None, 0.125)), ("down", (0.25, 0.125)))
    assert found.top == 0.25
    assert found.left_out == 1
    far = {"a": make.group(1.0, depth=0), "b": make.group(1.0, depth=10**12)}
    assert depth_map(build_cell(make.manifest(far)).ranked) is not None


needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="the published manifests are not here"
)


@needs_reference
def test_the_published_wfp8_afp8_report(make: Any, tmp_path: Path) -> None:
    path = REFERENCE / "qwen3_vl_4b-wfp8_afp8-lm-medium.json"
    md, data, html = written(read_manifest(path), tmp_path)
    rows = table(md)
    assert rows[0][:2] == ["1", "model.language_model.layers.4.mlp.gate_proj"]
    assert rows[0][4] == "3.424e-01"
    assert rows[1][:2] == ["2", "model.language_model.layers.0.mlp.down_proj"]
    assert rows[1][4] == "2.728e-01"
    assert data["totals"]["statuses"] == {"disabled": 105, "scored": 145}
    text = make.page(html).text
    # The older layout says nothing of samples, versions or time: nothing is made up.
    for absent in ("None", "null", "Dataset", "Versions", "Created", "Per token"):
        assert absent not in md + text
    assert not {"dataset", "quantization", "versions", "cell", "created"} & data.keys()


@needs_reference
@pytest.mark.parametrize("path", sorted(REFERENCE.glob("*.json")), ids=lambda path: path.stem)
def test_published_tables_start_with_the_highest_scores(
    make: Any, tmp_path: Path, path: Path
) -> None:
    raw = json.loads(path.read_text(encoding="utf-8"))["layer_sensitivity"]
    top = sorted(raw.items(), key=lambda item: item[1]["scores"][0], reverse=True)[:5]
    expected = [[key.removesuffix(".quant_recipe"), f"{row['scores'][0]:.3e}"] for key, row in top]
    md, _, html = written(read_manifest(path), tmp_path)
    rows = table(md)
    assert [[row[1], row[4]] for row in rows[:5]] == expected
    assert len(rows) == len(raw)
    assert make.page(html).table_rows[-1] == len(raw) + 1
