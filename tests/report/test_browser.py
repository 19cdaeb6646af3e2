"""Every page in a real browser, from a disk: charts drawn, tables used, nothing fetched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsens.analysis.samples import SampleScores
from qsens.config.models import SIZES
from qsens.report import build_cell, build_summary, write_cell, write_model_index, write_sweep
from qsens.report import format as look
from qsens.report.cell import CellReport
from qsens.report.compare import ComparedCell, ComparedGroup, Comparison, write_comparison
from qsens.schema.manifest import Manifest
from qsens.schema.summary import Difference, Drift, Moved
from tests.browser import PHONE, Watched, chromium
from tests.report.conftest import Make, reports
from tests.report.test_cell_report import HOSTILE

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
NAMES = ("qkv", "o", "gate_up", "down")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


def scored(names: list[str], seed: int, cell: str) -> tuple[Manifest, SampleScores]:
    """Return a manifest and the scores of 24 samples of these groups."""
    rng = np.random.default_rng(seed)
    scores = rng.lognormal(sigma=1.5, size=(len(names), 1)) * rng.lognormal(size=(len(names), 24))
    samples = SampleScores(tuple(names), scores, np.full(24, 10.0))
    rows = {}
    for index, (name, row) in enumerate(zip(names, samples.per_token(), strict=True)):
        kind = next((k for part, k in zip(KINDS, NAMES, strict=True) if part in name), "other")
        # A batch is one sample of 10 tokens.
        value, per_token = float(scores[index].sum()) / 100, float(row)
        rows[name] = Make.group(value, kind=kind, depth=index // 4, sensitivity_per_token=per_token)
    return Make.manifest(rows, cell=cell), samples


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of one sweep, its names hostile here and there."""
    root = tmp_path_factory.mktemp("model")
    names = [f"model.layers.{depth}.{part}" for depth in range(14) for part in KINDS]
    names[4:4] = HOSTILE.values()
    plan = Make.plan()
    manifests, samples, directories = {}, {}, {}
    for seed, cell in enumerate(plan.cells):
        manifest, samples[cell.cell] = scored(names, seed, cell.cell)
        manifests[cell.cell] = manifest.model_copy(update={"audit": Make.audit("gradient")})
        directories[cell.cell] = f"weight/{cell.cell}"
        write_cell(
            build_cell(manifests[cell.cell], samples[cell.cell]),
            root / directories[cell.cell],
            assets=root / "assets",
        )
    drift = Drift(
        previous="earlier",
        identical=0,
        compared=("wint8_afp16-medium",),
        paired=True,
        tested=len(names),
        rate=0.01,
        moved=tuple(
            Moved(
                cell="wint8_afp16-medium",
                layer=name,
                before=1e-3 * (at + 1),
                after=2e-3 * (at + 1),
                half_width=1e-4,
                p_value=1e-9,
            )
            for at, name in enumerate(names[:12])
        ),
        differences=(
            Difference(cause="checkpoint", what="digest", before="a" * 64, after=HOSTILE["html"]),
        ),
        not_compared=(),
    )
    summary = build_summary(
        plan, reports(manifests, samples), {}, directories, "earlier", drift, [Make.audit()]
    )
    directory = root / "sweeps" / plan.sweep_id
    write_sweep(summary, directory)
    single = write_cell(
        build_cell(manifests["wint8_afp16-small"], samples["wint8_afp16-small"]),
        root / "single",
        single_file=True,
    )
    comparison = Comparison(
        before="one",
        after=HOSTILE["html"],
        method="gradient",
        differences=drift.differences,
        cells=(
            ComparedCell(
                before="wint8_afp16-small",
                after="wint8_afp16-small",
                per_token=True,
                samples="the same",
                total_before=1.0,
                total_after=2.0,
                spearman=0.9,
                kendall=0.8,
                overlap={5: 4},
                groups=tuple(
                    ComparedGroup(
                        layer=name,
                        before=1.0,
                        after=2.0,
                        share_before=0.1,
                        share_after=0.2,
                        position_before=1,
                        position_after=2,
                        half_width=0.1,
                        moved=True,
                    )
                    # More than the page holds as elements: the rest is made by the script.
                    for name in (names * 6)[:310]
                ),
            ),
        ),
        only_in_one=(HOSTILE["quotes"],),
    )
    return {
        "compare": write_comparison(comparison, root / "compare" / "page.html"),
        "sweep": directory / "index.html",
        "cell": root / "weight" / "wfp8_afp8-medium" / "per-layer-sensitivity.html",
        "model": write_model_index(root),
        "single": single[2],
    }


CHARTS = {
    "sweep": {"audits", "drift", "heat", "pareto", "profiles", "sizes"},
    "cell": {"audit", "profile", "first"},
    "model": set(),
    "compare": set(),
    "single": {"audit", "profile", "first"},
}


@pytest.mark.parametrize("name", CHARTS)
@pytest.mark.parametrize(
    "look",
    [{}, {"viewport": PHONE, "is_mobile": True}, {"color_scheme": "dark"}],
    ids=["wide", "phone", "dark"],
)
def test_pages_open_draw_and_fetch_nothing(
    browser: Any, pages: dict[str, Path], name: str, look: dict[str, Any]
) -> None:
    watched = Watched(browser, **look)
    watched.page.goto(pages[name].as_uri())
    watched.scroll()
    drawn = watched.drawn()
    assert set(drawn) == CHARTS[name]
    assert all(drawn.values()), drawn
    assert watched.errors == []
    assert watched.outside(pages["model"].parent.as_uri()) == []
    wide, body = watched.page.evaluate("[innerWidth, document.documentElement.scrollWidth]")
    assert body <= wide
    # Names are text: what stands in them has made no element, and run nothing.
    assert watched.page.locator("img[src=x], b").count() == 0
    watched.context.close()


def columns(watched: Watched, table: str, column: int) -> list[str]:
    cells = watched.page.locator(f"{table} tbody tr td:nth-child({column})")
    return [text.strip() for text in cells.all_inner_texts()]


def test_tables_sort_and_filter(browser: Any, pages: dict[str, Path]) -> None:
    watched = Watched(browser)
    watched.page.goto(pages["cell"].as_uri())
    table = "table[data-rest=groups]"
    button = watched.page.locator(f"{table} th button", has_text="Share")
    button.click()
    shares = [float(text.rstrip(" %").lstrip("<")) for text in columns(watched, table, 8)]
    assert len(shares) == 64
    assert shares == sorted(shares, reverse=True)
    button.click()
    rising = [float(text.rstrip(" %").lstrip("<")) for text in columns(watched, table, 8)]
    assert rising == sorted(shares)
    assert watched.page.locator(f"{table} th[aria-sort=ascending]").inner_text().startswith("Share")
    search = watched.page.locator(".tools input").last
    search.fill("layers.1. down")
    watched.page.locator(f"{table} tbody tr").nth(1).wait_for(state="detached")
    assert "layers.1.mlp.down_proj" in columns(watched, table, 2)[0]
    search.fill("<script>")
    watched.page.wait_for_timeout(200)
    assert len(columns(watched, table, 2)) == 1
    assert watched.errors == []
    watched.context.close()


def test_pages_have_no_serious_accessibility_findings(browser: Any, pages: dict[str, Path]) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for name, path in pages.items():
        for scheme in ("light", "dark"):
            watched = Watched(browser, color_scheme=scheme)
            watched.page.goto(path.as_uri())
            watched.scroll()
            found = axe.run(watched.page).response["violations"]
            serious = [
                (name, scheme, entry["id"], entry["nodes"][0]["html"][:200])
                for entry in found
                if entry["impact"] in ("serious", "critical")
            ]
            assert serious == []
            watched.context.close()


def test_a_page_prints_light_with_all_its_rows(
    browser: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    watched = Watched(browser, color_scheme="dark")
    watched.page.goto(pages["cell"].as_uri())
    watched.scroll()
    pdf = watched.page.pdf(path=str(tmp_path / "page.pdf"))
    assert pdf.startswith(b"%PDF")
    watched.page.emulate_media(media="print")
    assert watched.page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)"
    )
    assert watched.page.locator("table[data-rest=groups] tbody tr").count() == 64
    watched.context.close()


def test_94_layers_of_128_experts_stay_small_and_quick(browser: Any, tmp_path: Path) -> None:
    names = [
        name
        for depth in range(94)
        for name in (
            f"model.language_model.layers.{depth}.self_attn.q_proj",
            f"model.language_model.layers.{depth}.self_attn.o_proj",
            *(f"model.language_model.layers.{depth}.mlp.experts.{at}" for at in range(128)),
        )
    ]
    manifest, samples = scored(names, 0, "wint8_afp16-small")
    report = build_cell(manifest, samples)
    cell = write_cell(report, tmp_path / "weight", assets=tmp_path / "assets")[2]
    plan = Make.plan()
    manifests = {entry.cell: manifest for entry in plan.cells}
    assert [entry.size for entry in plan.cells][:2] == list(SIZES[:2])
    summary = build_summary(plan, reports(manifests, {"wint8_afp16-small": samples}), {}, {}, None)
    sweep = write_sweep(summary, tmp_path / "sweeps" / plan.sweep_id)[2]
    for path in (cell, sweep):
        assert path.stat().st_size < 3_000_000
        watched = Watched(browser)
        watched.page.goto(path.as_uri())
        watched.page.locator("th button").first.wait_for()
        # Of 12,220 groups: a page that builds all its rows is slow on any machine.
        assert watched.page.locator("tr").count() < 500
        watched.scroll()
        search = watched.page.locator(".tools input").last
        search.fill("layers.93. experts.127")
        found = watched.page.locator("table[data-rest] tbody tr", has_text="experts.127")
        found.first.wait_for()
        assert watched.errors == []
        watched.context.close()
    assert_the_script_writes_numbers_as_python_does(browser, cell, report)


def assert_the_script_writes_numbers_as_python_does(
    browser: Any, page: Path, report: CellReport
) -> None:
    watched = Watched(browser)
    watched.page.goto(page.as_uri())
    # The last rows, and some between: of the first ones the page holds the elements.
    for row in (report.rows[400], report.rows[5000], report.rows[-1]):
        name = row.layer.removeprefix("model.language_model.")
        watched.page.locator(".tools input").last.fill(name)
        rows = watched.page.locator("table[data-rest=groups] tbody tr")
        made = rows.filter(has_text=re.compile(rf"{re.escape(name)}(?!\d)"))
        made.first.wait_for()
        texts = [text.strip() for text in made.first.locator("td").all_inner_texts()]
        assert texts[0] == str(row.position)
        assert texts[3:10] == [
            look.bits(row.num_bits),
            look.scientific(row.sensitivity),
            look.scientific(row.sensitivity_per_token),
            look.span(row.interval),
            look.percent(row.share),
            look.places(row.positions),
            look.mebibytes(row.size_cost),
        ]
    watched.context.close()
