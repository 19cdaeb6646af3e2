"""Cells of one pair at several sizes: which are largest, and how well sizes agree."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, TypeAlias

from qsens.analysis.ranking import normalise_name
from qsens.analysis.stability import compare_sizes
from qsens.analysis.statistic import compared_by, value_of
from qsens.config.models import COVERAGES, SIZES, Coverage, Modality
from qsens.schema.summary import Row, SizesCompared, Statistic, SummaryCell

Series: TypeAlias = tuple[str, str, Coverage, Modality, str | None]
"""Pair, granularity, coverage, modality and data set."""


class OfSeries(Protocol):
    """What belongs to a pair: a cell of a plan or of a summary, an audit."""

    @property
    def pair(self) -> str:
        """Return the precision pair."""

    @property
    def granularity(self) -> str:
        """Return the granularity."""

    @property
    def coverage(self) -> Coverage:
        """Return the part of the model that may be quantized."""

    @property
    def modality(self) -> Modality:
        """Return what a sample is."""

    @property
    def domain(self) -> str | None:
        """Return the data set; none for all of the sweep's together."""


def scores(rows: Iterable[Row], statistic: Statistic) -> dict[str, float]:
    """Return the score of every scored group by name, as names compare."""
    values = {normalise_name(row.layer): value_of(row, statistic) for row in rows}
    return {name: value for name, value in values.items() if value is not None}


def compare_all_sizes(cells: Sequence[SummaryCell]) -> tuple[SizesCompared, ...]:
    """Compare each size with the next one that has a result, pair by pair, per token."""
    series: dict[Series, list[SummaryCell]] = {}
    for cell in cells:
        if cell.done:
            series.setdefault(series_of(cell), []).append(cell)
    compared = []
    for (pair, granularity, coverage, modality, domain), members in series.items():
        members.sort(key=lambda cell: SIZES.index(cell.size))
        for one, other in itertools.pairwise(members):
            statistic = compared_by(one.rows, other.rows)
            agreed = compare_sizes(scores(one.rows, statistic), scores(other.rows, statistic))
            compared.append(
                SizesCompared(
                    pair=pair,
                    granularity=granularity,
                    coverage=coverage,
                    modality=modality,
                    domain=domain,
                    smaller=one.size,
                    larger=other.size,
                    scored_smaller=one.samples_scored,
                    scored_larger=other.samples_scored,
                    independent=_independent(one.samples_scored, other.samples_scored),
                    groups=agreed.groups,
                    spearman=agreed.spearman,
                    kendall=agreed.kendall,
                    overlap=agreed.overlap,
                )
            )
    return tuple(compared)


def series_of(cell: OfSeries) -> Series:
    """Return what the cells that differ in size alone have in common, and their audit."""
    return cell.pair, cell.granularity, cell.coverage, cell.modality, cell.domain


def largest_cells(cells: Iterable[SummaryCell]) -> list[SummaryCell]:
    """Return of each pair the cell of the largest size that has a result."""
    largest: dict[Series, SummaryCell] = {}
    for cell in cells:
        key = series_of(cell)
        if cell.done and (
            key not in largest or SIZES.index(cell.size) > SIZES.index(largest[key].size)
        ):
            largest[key] = cell
    return list(largest.values())


def of_coverage(
    cells: Sequence[SummaryCell], coverage: Coverage | None = None
) -> list[SummaryCell]:
    """Return the cells of one coverage, the widest that there is when not given."""
    covered = {cell.coverage for cell in cells}
    wanted = coverage or max(covered, key=COVERAGES.index, default=None)
    return [cell for cell in cells if cell.coverage == wanted]


def _independent(one: int | None, other: int | None) -> Literal["no", "in part", "unknown"]:
    if one is None or other is None:
        return "unknown"
    return "no" if one == other else "in part"
