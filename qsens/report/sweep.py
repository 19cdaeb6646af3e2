"""The report of one sweep: ``summary.json`` holds every row; the pages are made from it alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qsens.analysis.ranking import Row, total_per_token
from qsens.analysis.samples import SampleScores
from qsens.analysis.statistic import statistic_of
from qsens.config.models import SIZES, Coverage, Frozen, Modality, Size
from qsens.documents import dump_document, read_document
from qsens.grid import Cell, Plan, refuse_another_sweep
from qsens.published import SUMMARY as SUMMARY
from qsens.published import SWEEPS as SWEEPS
from qsens.recipes.allocation import ParetoPoint, pareto
from qsens.recipes.format_choices import build_decision_groups
from qsens.recipes.score_correction import price
from qsens.report import charts
from qsens.report import format as look
from qsens.report.assets import ASSETS, embedded, linked, page_data
from qsens.report.cell import BASENAME, PROTECTED, build_cell
from qsens.report.findings import (
    CellStability,
    Drift,
    SizesCompared,
    compare_all_sizes,
    of_coverage,
    series_of,
)
from qsens.report.prose import statistic_words
from qsens.report.render import render_html, render_markdown
from qsens.report.svg import heat_svg
from qsens.report.views import heat_table, pair_lines, protected, stable_in
from qsens.schema.manifest import Audit, Manifest
from qsens.writing import write_text

SUMMARY_VERSION = 2
PAGE = "index.html"
CHART = "summary.svg"
_ROWS_IN_PAGE = 200


class SummaryCell(Frozen):
    """One cell of the sweep, with all its rows."""

    cell: str
    """Cell id, ``wfp8_afp8-small``."""
    pair: str
    """Precision pair."""
    granularity: str
    """Granularity."""
    coverage: Coverage
    """Part of the model that may be quantized."""
    modality: Modality
    """What a sample is."""
    size: Size
    """Calibration size."""
    digest: str
    """Digest of all that changes this cell's numbers."""
    status: Literal["done", "missing"]
    """Whether there is a result."""
    reason: str | None
    """Why there is none."""
    directory: str | None
    """Directory of its reports, relative to the model's directory, with ``/``."""
    partial: tuple[str, ...]
    """Why the result is partial; empty when it is whole or missing."""
    experimental: bool
    """Whether nobody is known to deploy the pair."""
    total_sensitivity: float | None
    """Sum of the sensitivities of the scored groups."""
    effective_bits_reached: float | None
    """What the search reached, in bits a weight."""
    constraint_met: bool | None
    """Whether the target of effective bits was met."""
    samples_used: int | None
    """Samples that calibration used."""
    samples_scored: int | None
    """Samples that the score used."""
    stability: CellStability | None = None
    """How sure the ranking is; none without scores of every sample."""
    rows: tuple[Row, ...]
    """All groups: the scored ones, most sensitive first; then the others."""

    @property
    def done(self) -> bool:
        """Return whether there is a result."""
        return self.status == "done"

    @property
    def whole(self) -> bool:
        """Return whether there is a result, and no partial one."""
        return self.done and not self.partial

    @property
    def total_per_token(self) -> float | None:
        """Return the sum of the sensitivities per token, where all scored groups have one."""
        return total_per_token(self.rows)

    @property
    def first(self) -> Row | None:
        """Return the most sensitive group."""
        return next((row for row in self.rows if row.position == 1), None)


class MissingCell(Frozen):
    """A cell without a result."""

    cell: str
    """Cell id."""
    reason: str
    """Why there is none."""


class Summary(Frozen):
    """``summary.json``: a sweep as it was published, nothing rounded."""

    schema_version: int = SUMMARY_VERSION
    """Version of this schema."""
    sweep_id: str
    """``<UTC time>-<first 8 hex digits of the plan's digest>``."""
    plan_id: str
    """First 12 hex digits of the plan's digest."""
    created: str
    """When the plan was made, ISO 8601, UTC."""
    preset: str
    """Name of the sweep file that the plan started from."""
    model: str
    """Directory of the model's results under ``models/``."""
    checkpoint_digest: str
    """SHA-256 over the contents of the checkpoint's configuration and weight files."""
    method: str = "gradient"
    """The score: ``gradient``, ``fisher``, ``kl_div``."""
    effective_bits_target: float | None = None
    """Target of effective bits, in bits a weight."""
    previous: str | None
    """Id of the sweep before this one; none where this is the first."""
    pareto: tuple[ParetoPoint, ...] = ()
    """The least damage at so many bits over all pairs at the largest size, from the cheapest to 16
    bits; a head tied to the embedding stays at 16. Damages are in the statistic of the method."""
    complete: bool
    """Whether every cell has a result and none of them is partial."""
    cells: tuple[SummaryCell, ...]
    """All cells, by pair, granularity, coverage and size in the order of the configuration."""
    missing: tuple[MissingCell, ...]
    """The cells without a result, in the same order."""
    sizes_compared: tuple[SizesCompared, ...] = ()
    """Each size of a pair against the next that has a result."""
    audit: tuple[Audit, ...] = ()
    """The scores of each pair against the true divergence of some groups, where measured."""
    drift: Drift | None = None
    """What changed since the sweep before; none where there is none."""
    notices: tuple[str, ...] = ()
    """What a reader should know of how its results were stored."""
    published: int = 0
    """Which of its model's sweeps it is, from 1, in the order of their publication; 0 where nobody
    counted."""
    checksum: str | None = None
    """SHA-256 over the canonical JSON of all other keys; null in summaries older than this key."""

    @property
    def done(self) -> tuple[SummaryCell, ...]:
        """Return the cells that have a result."""
        return tuple(cell for cell in self.cells if cell.done)

    @property
    def partial(self) -> tuple[SummaryCell, ...]:
        """Return the cells whose result is partial."""
        return tuple(cell for cell in self.cells if cell.partial)


def build_summary(
    plan: Plan,
    manifests: Mapping[str, Manifest],
    missing: Mapping[str, str],
    directories: Mapping[str, str],
    previous: str | None,
    samples: Mapping[str, SampleScores] | None = None,
    drift: Drift | None = None,
    audits: Sequence[Audit] = (),
) -> Summary:
    """Lay out what a sweep found; lanes have no influence on it.

    Args:
        plan: The sweep.
        manifests: The results that there are, by cell id.
        missing: Why there is no result, by cell id.
        directories: Where each cell's reports lie, relative to the model's directory, by cell id.
        previous: Id of the sweep before this one.
        samples: Scores of every sample, by cell id, where there are any.
        drift: What changed since the sweep before.
        audits: The audits that there are.
    """
    cells = tuple(
        _done(
            plan,
            cell,
            manifests[cell.cell],
            directories.get(cell.cell),
            (samples or {}).get(cell.cell),
        )
        if cell.cell in manifests
        else _missing(plan, cell, missing.get(cell.cell, "no result"))
        for cell in _in_order(plan)
    )
    return Summary(
        sweep_id=plan.sweep_id,
        plan_id=plan.plan_id,
        created=plan.created,
        preset=plan.config.preset,
        model=plan.config.model.name,
        checkpoint_digest=plan.checkpoint.digest,
        method=plan.config.autoquant.method,
        effective_bits_target=plan.config.autoquant.effective_bits,
        previous=previous,
        pareto=tuple(_pareto(plan, cells, audits)),
        complete=all(cell.whole for cell in cells),
        cells=cells,
        missing=tuple(
            MissingCell(cell=cell.cell, reason=cell.reason or "no result")
            for cell in cells
            if not cell.done
        ),
        sizes_compared=compare_all_sizes(cells),
        audit=tuple(audits),
        drift=drift,
    )


def write_sweep(summary: Summary, directory: Path, *, single_file: bool = False) -> list[Path]:
    """Write the reports of a sweep; equal summaries give equal bytes.

    Links to the cells' reports and to the scripts are relative: from ``sweeps/<sweep id>/`` they
    lead two levels up to the model's directory; any other directory is taken for the model's
    directory itself.

    Args:
        summary: The sweep.
        directory: Where the reports go.
        single_file: Whether the page holds its scripts, instead of sharing them.

    Returns:
        The Markdown, JSON and HTML file, and the chart of the Markdown where there is one.
    """
    nested = directory.name == summary.sweep_id and directory.parent.name == SWEEPS
    up = "../.." if nested else "."
    assets = (directory.parents[1] if nested else directory) / ASSETS
    groups = protected(summary)
    heat = heat_table(summary)
    data = look.plain(summary.model_dump())
    picture = heat_svg(heat)
    context: dict[str, Any] = {
        "summary": summary,
        "protected": groups,
        "protected_groups": groups.groups[:PROTECTED],
        "stable_in": {
            group.layer: stable_in(summary, group.layer) for group in groups.groups[:PROTECTED]
        },
        "pairs": pair_lines(summary, PROTECTED),
        "links": {
            cell.cell: look.link(up, cell.directory, f"{BASENAME}.html")
            for cell in summary.done
            if cell.directory is not None
        },
        "previous_link": look.link("..", summary.previous, PAGE) if summary.previous else None,
        "per_token": any(cell.total_per_token is not None for cell in summary.cells),
        "index_link": look.link(up, PAGE) if nested else None,
        "picture": CHART if picture else None,
        "placed_by": statistic_words(
            statistic_of(summary.method, (row for cell in summary.cells for row in cell.rows))
        ),
        "interval_of": next(
            (statistic_words(cell.stability.statistic) for cell in summary.done if cell.stability),
            None,
        ),
        "modalities": sorted({cell.modality for cell in summary.cells}),
    }
    drawn = {
        "heat": charts.heat(heat),
        "profiles": charts.profiles(summary.cells),
        "sizes": charts.sizes(summary.cells),
        "pareto": charts.pareto(summary.pareto, summary.effective_bits_target),
        "drift": charts.drift(summary.drift),
        "audits": charts.audits(summary.audit),
    }
    rest = heat.rows[_ROWS_IN_PAGE:] if heat else ()
    pages = {
        "summary.md": render_markdown("sweep.md", **context),
        SUMMARY: dump_document(data),
        PAGE: render_html(
            "sweep.html",
            **context,
            heat=heat,
            rows_in_page=_ROWS_IN_PAGE,
            drawn=drawn,
            scripts=embedded() if single_file else linked(directory, assets),
            data=page_data(
                {
                    "charts": {name: chart for name, chart in drawn.items() if chart},
                    "tables": {
                        "heat": [
                            [look.shown(name), *[row.share if row else None for row in cells]]
                            for name, cells in rest
                        ]
                    },
                }
            ),
        ),
    } | ({CHART: picture} if picture else {})
    paths = [directory / name for name in pages]
    for path, text in zip(paths, pages.values(), strict=True):
        write_text(path, text)
    return paths


def read_summary(path: Path) -> Summary:
    """Read ``summary.json``.

    Raises:
        Damaged: The file is no summary, or not as it was written.
        UserError: A newer qsens wrote it.
    """
    summary = read_document(
        Summary,
        path,
        what="summary of a sweep",
        version=SUMMARY_VERSION,
        name="Name the summary.json of a published sweep.",
        again="Publish the sweep again with `qsens publish`.",
    )
    refuse_another_sweep(path, summary.sweep_id)
    return summary


def _pareto(plan: Plan, cells: Sequence[SummaryCell], audits: Sequence[Audit]) -> list[ParetoPoint]:
    """Return the curve that recipes of this sweep lie on: those of the widest coverage."""
    done = of_coverage([cell for cell in cells if cell.done])
    size = max((cell.size for cell in done), key=SIZES.index, default=None)
    largest = {"-".join(series_of(cell)): cell for cell in done if cell.size == size}
    priced = price(
        {name: cell.rows for name, cell in largest.items()},
        {"-".join(series_of(audit)): audit for audit in audits},
        {name: cell.digest for name, cell in largest.items()},
    )
    rows = (row for each in priced.rows.values() for row in each)
    statistic = statistic_of(plan.config.autoquant.method, rows)
    keep_head = plan.checkpoint.tied_head is not False
    return pareto(build_decision_groups(priced.rows, statistic, keep_head=keep_head))


def _in_order(plan: Plan) -> list[Cell]:
    """Return the cells in the order of the configuration's axes."""
    config = plan.config
    axes: Sequence[Sequence[str]] = (
        [pair.name for pair in config.quant_pair],
        [granularity.name for granularity in config.quant_granularity],
        list(config.coverage),
        list(config.dataset.size),
    )

    def place(cell: Cell) -> tuple[int, ...]:
        values = (cell.pair, cell.granularity, cell.coverage, cell.size)
        return tuple(axis.index(value) for axis, value in zip(axes, values, strict=True))

    return sorted(plan.cells, key=place)


def _done(
    plan: Plan,
    cell: Cell,
    manifest: Manifest,
    directory: str | None,
    samples: SampleScores | None,
) -> SummaryCell:
    report = build_cell(manifest, samples)
    dataset, quantization = report.dataset, report.quantization
    # The older layout does not say how many samples it used.
    limits = (plan.config.dataset.limit(cell.size), report.scheme.auto_quantize_score_size)
    scored = min(limit for limit in limits if limit is not None)
    return SummaryCell(
        **_identity(cell),
        status="done",
        reason=None,
        directory=directory,
        partial=report.partial,
        experimental=report.experimental if quantization else plan.pair(cell).experimental,
        total_sensitivity=report.totals.sensitivity,
        effective_bits_reached=report.search.effective_bits_reached,
        constraint_met=report.search.constraint_met,
        samples_used=dataset.samples_used if dataset else None,
        samples_scored=dataset.samples_scored if dataset else scored,
        stability=report.stability,
        rows=report.rows,
    )


def _missing(plan: Plan, cell: Cell, reason: str) -> SummaryCell:
    return SummaryCell(
        **_identity(cell),
        status="missing",
        reason=reason,
        directory=None,
        partial=(),
        experimental=plan.pair(cell).experimental,
        total_sensitivity=None,
        effective_bits_reached=None,
        constraint_met=None,
        samples_used=None,
        samples_scored=None,
        rows=(),
    )


def _identity(cell: Cell) -> dict[str, Any]:
    return cell.model_dump(exclude={"lane"})
