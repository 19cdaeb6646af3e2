"""The report of one sweep: ``summary.json`` holds every row; the pages are made from it alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from qsens.analysis.allocation import ParetoPoint, pareto
from qsens.analysis.options import build_units
from qsens.analysis.ranking import MeanShare, Row, mean_shares, normalise_name, total_per_token
from qsens.config.models import SIZES, Coverage, Frozen, Modality, Size
from qsens.errors import UserError
from qsens.grid import Cell, Plan
from qsens.manifest import Manifest, dump_json
from qsens.report import format as look
from qsens.report.cell import BASENAME, PROTECTED, build_cell
from qsens.report.render import render_html, render_markdown
from qsens.store import write_text

SUMMARY_VERSION = 1
SUMMARY = "summary.json"
PAGE = "index.html"
SWEEPS = "sweeps"


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
    previous: str | None
    """Id of the sweep before this one; none where this is the first."""
    pareto: tuple[ParetoPoint, ...] = ()
    """The least damage at so many bits over all pairs at the largest size, from the cheapest to 16
    bits; a head tied to the embedding stays at 16."""
    complete: bool
    """Whether every cell has a result and none of them is partial."""
    cells: tuple[SummaryCell, ...]
    """All cells, by pair, granularity, coverage and size in the order of the configuration."""
    missing: tuple[MissingCell, ...]
    """The cells without a result, in the same order."""

    @property
    def done(self) -> tuple[SummaryCell, ...]:
        """Return the cells that have a result."""
        return tuple(cell for cell in self.cells if cell.done)

    @property
    def partial(self) -> tuple[SummaryCell, ...]:
        """Return the cells whose result is partial."""
        return tuple(cell for cell in self.cells if cell.partial)


@dataclass(frozen=True)
class Protected:
    """The groups to protect first, and what they were ranked over.

    Attributes:
        groups: Groups by the mean of their shares, largest first; all of them.
        cells: How many cells the mean is over.
        whole: Whether those cells are whole; partial ones are used only where no cell is whole.
    """

    groups: tuple[MeanShare, ...]
    cells: int
    whole: bool


@dataclass(frozen=True)
class Heat:
    """Groups by cells at one size, for the heat table.

    Attributes:
        size: The largest size that has a result.
        cells: The cells at that size.
        rows: Each group with its row in each of the cells, none where the cell lacks it.
        top: The largest share in the table.
    """

    size: Size
    cells: tuple[SummaryCell, ...]
    rows: tuple[tuple[str, tuple[Row | None, ...]], ...]
    top: float


def build_summary(
    plan: Plan,
    manifests: Mapping[str, Manifest],
    missing: Mapping[str, str],
    directories: Mapping[str, str],
    previous: str | None,
) -> Summary:
    """Lay out what a sweep found; lanes have no influence on it.

    Args:
        plan: The sweep.
        manifests: The results that there are, by cell id.
        missing: Why there is no result, by cell id.
        directories: Where each cell's reports lie, relative to the model's directory, by cell id.
        previous: Id of the sweep before this one.
    """
    cells = tuple(
        _done(plan, cell, manifests[cell.cell], directories.get(cell.cell))
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
        previous=previous,
        pareto=tuple(_pareto(plan, cells)),
        complete=all(cell.whole for cell in cells),
        cells=cells,
        missing=tuple(
            MissingCell(cell=cell.cell, reason=cell.reason or "no result")
            for cell in cells
            if not cell.done
        ),
    )


def write_sweep(summary: Summary, directory: Path) -> list[Path]:
    """Write the three reports of a sweep; equal summaries give equal bytes.

    Links to the cells' reports are relative: from ``sweeps/<sweep id>/`` they lead two levels up
    to the model's directory; any other directory is taken for the model's directory itself.

    Args:
        summary: The sweep.
        directory: Where the reports go.

    Returns:
        The Markdown, JSON and HTML file.
    """
    nested = directory.name == summary.sweep_id and directory.parent.name == SWEEPS
    up = "../.." if nested else "."
    context: dict[str, Any] = {
        "summary": summary,
        "protected": protected(summary),
        "protected_groups": protected(summary).groups[:PROTECTED],
        "links": {
            cell.cell: look.link(up, cell.directory, f"{BASENAME}.html")
            for cell in summary.done
            if cell.directory is not None
        },
        "previous_link": look.link("..", summary.previous, PAGE) if summary.previous else None,
        "per_token": any(cell.total_per_token is not None for cell in summary.cells),
        "index_link": look.link(up, PAGE) if nested else None,
    }
    pages = {
        "summary.md": render_markdown("sweep.md", **context),
        SUMMARY: dump_json(look.plain(summary.model_dump())),
        PAGE: render_html("sweep.html", **context, heat=heat_table(summary)),
    }
    paths = [directory / name for name in pages]
    for path, text in zip(paths, pages.values(), strict=True):
        write_text(path, text)
    return paths


def read_summary(path: Path) -> Summary:
    """Read ``summary.json``.

    Raises:
        UserError: The file is no summary.
    """
    try:
        return Summary.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror}",
            where=str(path),
            remedy="Name the summary.json of a published sweep.",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"is no summary of a sweep: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            where=str(path),
            remedy="Publish the sweep again with `qsens publish`.",
        ) from error


def protected(summary: Summary) -> Protected:
    """Rank the groups by the mean of their shares of the total, over the whole cells.

    Where no cell is whole, the partial ones are used. The mean is over the cells that score the
    group.
    """
    whole = [cell.rows for cell in summary.cells if cell.whole]
    used = whole or [cell.rows for cell in summary.done]
    return Protected(groups=tuple(mean_shares(used)), cells=len(used), whole=bool(whole))


def heat_table(summary: Summary) -> Heat | None:
    """Return the groups by cells at the largest size that has a result; none without results."""
    sizes = {cell.size for cell in summary.done}
    if not sizes:
        return None
    size = max(sizes, key=SIZES.index)
    cells = tuple(cell for cell in summary.done if cell.size == size)
    by_name = [{normalise_name(row.layer): row for row in cell.rows} for cell in cells]
    means = mean_shares(cell.rows for cell in cells)
    shares = [row.share for cell in cells for row in cell.rows if row.share is not None]
    return Heat(
        size=size,
        cells=cells,
        rows=tuple(
            (mean.layer, tuple(rows.get(normalise_name(mean.layer)) for rows in by_name))
            for mean in means
        ),
        top=max(shares, default=0.0),
    )


def _pareto(plan: Plan, cells: Sequence[SummaryCell]) -> list[ParetoPoint]:
    """Return the curve that recipes of this sweep lie on."""
    done = [cell for cell in cells if cell.done]
    size = max((cell.size for cell in done), key=SIZES.index, default=None)
    rows = {f"{cell.pair}-{cell.granularity}": cell.rows for cell in done if cell.size == size}
    return pareto(build_units(rows, keep_head=plan.checkpoint.tied_head is not False))


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


def _done(plan: Plan, cell: Cell, manifest: Manifest, directory: str | None) -> SummaryCell:
    report = build_cell(manifest)
    dataset, quantization = report.dataset, report.quantization
    return SummaryCell(
        **_identity(cell),
        status="done",
        reason=None,
        directory=directory,
        partial=report.partial,
        experimental=quantization.experimental if quantization else plan.pair(cell).experimental,
        total_sensitivity=report.totals.sensitivity,
        effective_bits_reached=report.search.effective_bits_reached,
        constraint_met=report.search.constraint_met,
        samples_used=dataset.samples_used if dataset else None,
        samples_scored=dataset.samples_scored if dataset else None,
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
