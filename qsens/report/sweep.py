"""The report of one sweep: ``summary.json`` holds every row; the pages are made from it alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsens.analysis.domains import alone_in_domain, compare_domains
from qsens.analysis.series import compare_all_sizes, of_coverage
from qsens.analysis.statistic import statistic_of
from qsens.cells import Cell, CellSpec
from qsens.config.models import SIZES
from qsens.documents import dump_document
from qsens.grid import Plan
from qsens.recipes.allocation import pareto
from qsens.recipes.format_choices import build_decision_groups
from qsens.recipes.score_correction import correct
from qsens.report import charts
from qsens.report import format as look
from qsens.report.assets import embedded, linked, page_data
from qsens.report.cell import BASENAME, PROTECTED, CellReport
from qsens.report.charts import column_name
from qsens.report.prose import statistic_words
from qsens.report.render import render_html, render_markdown
from qsens.report.svg import heat_svg
from qsens.report.views import heat_table, pair_lines, protected, stable_in
from qsens.schema.audit import Audit
from qsens.schema.summary import (
    Drift,
    MissingCell,
    ParetoPoint,
    Summary,
    SummaryCell,
)
from qsens.store import ASSETS, PAGE, SUMMARY, SWEEPS
from qsens.writing import write_text

CHART = "summary.svg"
_ROWS_IN_PAGE = 200


def build_summary(
    plan: Plan,
    reports: Mapping[str, CellReport],
    missing: Mapping[str, str],
    directories: Mapping[str, str],
    previous: str | None,
    drift: Drift | None = None,
    audits: Sequence[Audit] = (),
) -> Summary:
    """Lay out what a sweep found; lanes have no influence on it.

    Args:
        plan: The sweep.
        reports: What there is to say of each cell that has a result, by cell id.
        missing: Why there is no result, by cell id.
        directories: Where each cell's reports lie, relative to the model's directory, by cell id.
        previous: Id of the sweep before this one.
        drift: What changed since the sweep before.
        audits: The audits that there are.
    """
    cells = tuple(
        _done(plan, cell, reports[cell.cell], directories.get(cell.cell))
        if cell.cell in reports
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
        domains_compared=compare_domains(cells),
        alone_in_domain=alone_in_domain(cells),
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


def _pareto(plan: Plan, cells: Sequence[SummaryCell], audits: Sequence[Audit]) -> list[ParetoPoint]:
    """Return the curve that recipes of this sweep lie on: those of the widest coverage."""
    done = of_coverage([cell for cell in cells if cell.done and cell.domain is None])
    size = max((cell.size for cell in done), key=SIZES.index, default=None)
    largest = {column_name(cell): cell for cell in done if cell.size == size}
    corrected = correct(
        {name: cell.rows for name, cell in largest.items()},
        {column_name(audit): audit for audit in audits},
        {name: cell.digest for name, cell in largest.items()},
    )
    rows = (row for each in corrected.rows.values() for row in each)
    statistic = statistic_of(plan.config.autoquant.method, rows)
    keep_head = plan.checkpoint.tied_head is not False
    return pareto(build_decision_groups(corrected.rows, statistic, keep_head=keep_head))


def _in_order(plan: Plan) -> list[CellSpec]:
    """Return the cells in the order of the configuration's axes."""
    config = plan.config
    axes: Sequence[Sequence[str | None]] = (
        [pair.name for pair in config.quant_pair],
        [granularity.name for granularity in config.quant_granularity],
        list(config.coverage),
        list(config.domains),
        list(config.sizes),
    )

    def place(cell: CellSpec) -> tuple[int, ...]:
        values = (cell.pair, cell.granularity, cell.coverage, cell.domain, cell.size)
        return tuple(axis.index(value) for axis, value in zip(axes, values, strict=True))

    return sorted(plan.cells, key=place)


def _done(
    plan: Plan,
    cell: CellSpec,
    report: CellReport,
    directory: str | None,
) -> SummaryCell:
    dataset, quantization = report.dataset, report.quantization
    # The older layout does not say how many samples it used.
    limits = (cell.sets[0].taken, report.scheme.auto_quantize_score_size)
    scored = min(limit for limit in limits if limit is not None)
    return SummaryCell(
        **_identity(cell),
        status="done",
        reason=None,
        directory=directory,
        partial=report.partial,
        experimental=report.experimental if quantization else cell.precision.experimental,
        total_sensitivity=report.totals.sensitivity,
        effective_bits_reached=report.search.effective_bits_reached,
        constraint_met=report.search.constraint_met,
        samples_used=dataset.samples_used if dataset else None,
        samples_scored=dataset.samples_scored if dataset else scored,
        stability=report.stability,
        rows=report.rows,
    )


def _missing(plan: Plan, cell: CellSpec, reason: str) -> SummaryCell:
    return SummaryCell(
        **_identity(cell),
        status="missing",
        reason=reason,
        directory=None,
        partial=(),
        experimental=cell.precision.experimental,
        total_sensitivity=None,
        effective_bits_reached=None,
        constraint_met=None,
        samples_used=None,
        samples_scored=None,
        rows=(),
    )


def _identity(cell: CellSpec) -> dict[str, Any]:
    return cell.model_dump(include=Cell.model_fields.keys() - {"lane"})
