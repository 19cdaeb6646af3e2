"""What the pages of a sweep show of its summary: groups to protect, pairs, groups by pairs."""

from __future__ import annotations

from dataclasses import dataclass

from qsens.analysis.ranking import MeanShare, mean_shares, normalise_name
from qsens.analysis.series import largest_cells, series_of
from qsens.config.models import SIZES, Size
from qsens.schema.audit import Audit
from qsens.schema.summary import Row, Summary, SummaryCell


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


@dataclass(frozen=True)
class PairLine:
    """One pair in one line, at its largest size.

    Attributes:
        cell: The cell.
        shares_first: How many of the first groups it has in common with all pairs together.
        stable: Whether its first groups are sure; none where that is not known.
        audit: Its audit, whose verdict holds at every size; none where there is none.
    """

    cell: SummaryCell
    shares_first: int
    stable: bool | None
    audit: Audit | None


def protected(summary: Summary) -> Protected:
    """Rank the groups by the mean of their shares of the total, over the whole cells.

    Where no cell is whole, the partial ones are used. The mean is over the cells that score the
    group; of several data sets, over those that score all of them together.
    """
    together = [cell for cell in summary.done if cell.domain is None] or list(summary.done)
    whole = [cell.rows for cell in together if cell.whole]
    used = whole or [cell.rows for cell in together]
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


def pair_lines(summary: Summary, first: int) -> list[PairLine]:
    """Return a line a pair.

    Args:
        summary: The sweep.
        first: How many groups are looked at as those to protect.
    """
    common = {normalise_name(group.layer) for group in protected(summary).groups[:first]}
    audits = {series_of(audit): audit for audit in summary.audit}
    lines = []
    for cell in largest_cells(summary.cells):
        own = {
            normalise_name(row.layer)
            for row in cell.rows
            if row.position is not None and row.position <= first
        }
        stable = cell.stability.first_stable if cell.stability else None
        lines.append(
            PairLine(
                cell=cell,
                shares_first=len(own & common),
                stable=stable,
                audit=audits.get(series_of(cell)),
            )
        )
    return lines


def stable_in(summary: Summary, layer: str) -> tuple[int, int]:
    """Return in how many pairs a group's verdict is ``stable``, and in how many it has one."""
    name = normalise_name(layer)
    verdicts = [
        row.verdict
        for cell in largest_cells(summary.cells)
        for row in cell.rows
        if row.verdict is not None and normalise_name(row.layer) == name
    ]
    return sum(verdict == "stable" for verdict in verdicts), len(verdicts)
