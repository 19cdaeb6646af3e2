"""Two results side by side: what went in differently, how rankings agree, which groups changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from qsens.config.base import Frozen
from qsens.report import format as look
from qsens.report.assets import embedded, linked, page_data
from qsens.report.render import render_html
from qsens.schema.summary import Difference
from qsens.store import ASSETS
from qsens.writing import write_text

_ROWS_IN_PAGE = 300


class ComparedGroup(Frozen):
    """One group in both results; none where a result does not score it."""

    layer: str
    """Name of the group, as the first result that has it spells it."""
    before: float | None
    """Score in the first result: per token where both results have that."""
    after: float | None
    """Score in the second result."""
    share_before: float | None
    """Share of the total in the first result, 0 to 1."""
    share_after: float | None
    """Share of the total in the second result, 0 to 1."""
    position_before: int | None
    """Position in the first result, 1 the most sensitive, by its method's own statistic."""
    position_after: int | None
    """Position in the second result."""
    half_width: float | None
    """Half of the 95 % interval of the change; none where the noise is unknown."""
    moved: bool | None
    """Whether it moved beyond noise; none where the noise is unknown."""

    @property
    def relative(self) -> float | None:
        """Return the change over the first score."""
        if self.before is None or self.after is None or not self.before:
            return None
        return (self.after - self.before) / self.before

    @property
    def status(self) -> str:
        """Say whether it moved."""
        if self.before is None or self.after is None:
            return "in one only"
        return "noise unknown" if self.moved is None else "moved" if self.moved else "noise"


class ComparedCell(Frozen):
    """One cell in both results."""

    before: str
    """Name of the first result's cell."""
    after: str
    """Name of the second result's cell."""
    per_token: bool
    """Whether scores are per token; else they are sums, of the same number of batches or not."""
    samples: Literal["the same", "different", "noise unknown"]
    """Whether both scored the same samples."""
    total_before: float
    """Sum of the scores in the first result."""
    total_after: float
    """Sum of the scores in the second result."""
    spearman: float | None
    """Spearman's rank correlation."""
    kendall: float | None
    """Kendall's tau-b."""
    overlap: dict[int, int]
    """How many of the first 5, 10, 20 groups are the same."""
    groups: tuple[ComparedGroup, ...]
    """All groups, those that changed by most first."""

    @property
    def name(self) -> str:
        """Return the cell's name, or both where they differ."""
        return self.before if self.before == self.after else f"{self.before} / {self.after}"

    @property
    def moved(self) -> int:
        """Return how many groups moved beyond noise."""
        return sum(bool(group.moved) for group in self.groups)


class Comparison(Frozen):
    """Two sweeps, or two cells."""

    before: str
    """Name of the first."""
    after: str
    """Name of the second."""
    method: str
    """The score's method in both; ``different`` where they differ."""
    differences: tuple[Difference, ...]
    """What differs in what went in."""
    cells: tuple[ComparedCell, ...]
    """The cells that both have."""
    only_in_one: tuple[str, ...]
    """Cells that one of the two has a result for."""


def write_comparison(comparison: Comparison, path: Path, *, single_file: bool = False) -> Path:
    """Write a comparison as one page; equal comparisons give equal bytes.

    Args:
        comparison: The comparison.
        path: The page; its scripts go into ``assets`` beside it.
        single_file: Whether the page holds its scripts instead.
    """
    rows = [(cell, group) for cell in comparison.cells for group in cell.groups]
    page = render_html(
        "compare.html",
        comparison=comparison,
        rows=rows[:_ROWS_IN_PAGE],
        scripts=embedded()
        if single_file
        else linked(path.parent.resolve(), path.parent.resolve() / ASSETS),
        data=page_data({"tables": {"groups": [_row(*row) for row in rows[_ROWS_IN_PAGE:]]}}),
    )
    write_text(path, page)
    return path


def _row(cell: ComparedCell, group: ComparedGroup) -> list[Any]:
    return [
        look.shown(cell.name),
        look.shown(group.layer),
        group.before,
        group.after,
        group.relative,
        group.half_width,
        group.position_before,
        group.position_after,
        group.status,
    ]
