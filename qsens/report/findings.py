"""What a sweep says about itself: how sure its rankings are, and what moved since the last one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from qsens.analysis.provenance import Difference
from qsens.analysis.ranking import Row, normalise_name
from qsens.analysis.stability import compare_sizes
from qsens.analysis.statistic import Statistic, compared_by, value_of
from qsens.config.models import COVERAGES, SIZES, Coverage, Frozen, Modality, Size
from qsens.grid import Cell
from qsens.schema.manifest import Audit

if TYPE_CHECKING:
    from qsens.report.sweep import SummaryCell


class CellStability(Frozen):
    """How sure the ranking of one cell is, by the bootstrap over its samples."""

    statistic: Statistic = "sensitivity_per_token"
    """The score that intervals, positions and verdicts are of; sweeps published before this key
    was written have those of the score per token."""
    samples: int
    """Samples that were resampled: those scored."""
    resamples: int
    """How often they were resampled."""
    level: float
    """Level of the intervals, 0 to 1."""
    stable: int
    """Groups whose verdict is ``stable``."""
    undecided: int
    """Groups whose verdict is ``undecided``."""
    first: int
    """How many groups are looked at as those to protect."""
    first_stable: bool
    """Whether it is decided which groups these are."""
    samples_needed: int | None
    """An estimate of how many samples would decide it; none where it is, or cannot be told."""


class SizesCompared(Frozen):
    """How well two sizes of one pair agree, by their scores per token."""

    pair: str
    """Precision pair."""
    granularity: str
    """Granularity."""
    coverage: Coverage
    """Part of the model that may be quantized."""
    modality: Modality
    """What a sample is."""
    smaller: Size
    """The smaller size."""
    larger: Size
    """The larger size."""
    scored_smaller: int | None
    """Samples that the smaller one scored."""
    scored_larger: int | None
    """Samples that the larger one scored; the first of them are those of the smaller one."""
    independent: Literal["no", "in part", "unknown"]
    """``no`` where both scored the same samples; ``in part`` where the larger scored more."""
    groups: int
    """Groups that both score."""
    spearman: float | None
    """Spearman's rank correlation."""
    kendall: float | None
    """Kendall's tau-b."""
    overlap: dict[int, int]
    """How many of the first 5, 10, 20 groups are the same."""


class Moved(Frozen):
    """A group whose score moved beyond noise."""

    cell: str
    """Cell id."""
    layer: str
    """Name of the group."""
    before: float
    """Earlier score per token."""
    after: float
    """Later score per token."""
    half_width: float
    """Half of the 95 % interval of the change."""
    p_value: float
    """Of the test of this group alone."""

    @property
    def relative(self) -> float | None:
        """Return the change over the earlier score."""
        return (self.after - self.before) / self.before if self.before else None


class NotCompared(Frozen):
    """A cell that was not compared with the earlier sweep."""

    cell: str
    """Cell id."""
    reason: str
    """Why not."""


class Drift(Frozen):
    """A sweep against the one before it."""

    previous: str
    """Id of the sweep before."""
    identical: int
    """Cells with the same digest: the same inputs, and the same result."""
    compared: tuple[str, ...]
    """Cells that were tested, at the largest size of each pair."""
    paired: bool
    """Whether all tests were on the same samples."""
    tested: int
    """Groups tested, over all those cells."""
    rate: float
    """Chance of any false alarm, over all tests together, where nothing has changed."""
    moved: tuple[Moved, ...]
    """What moved beyond noise, clearest first."""
    differences: tuple[Difference, ...]
    """What differs in what went into the two sweeps."""
    not_compared: tuple[NotCompared, ...]
    """Cells at their largest size that could not be compared."""


def scores(rows: Iterable[Row], statistic: Statistic) -> dict[str, float]:
    """Return the score of every scored group by name, as names compare."""
    found = {normalise_name(row.layer): value_of(row, statistic) for row in rows}
    return {name: value for name, value in found.items() if value is not None}


def compare_all_sizes(cells: Sequence[SummaryCell]) -> tuple[SizesCompared, ...]:
    """Compare each size with the next one that has a result, pair by pair, per token."""
    series: dict[tuple[str, str, Coverage, Modality], list[SummaryCell]] = {}
    for cell in cells:
        if cell.done:
            series.setdefault(series_of(cell), []).append(cell)
    found = []
    for (pair, granularity, coverage, modality), members in series.items():
        members.sort(key=lambda cell: SIZES.index(cell.size))
        for one, other in itertools.pairwise(members):
            statistic = compared_by(one.rows, other.rows)
            agreed = compare_sizes(scores(one.rows, statistic), scores(other.rows, statistic))
            found.append(
                SizesCompared(
                    pair=pair,
                    granularity=granularity,
                    coverage=coverage,
                    modality=modality,
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
    return tuple(found)


def series_of(cell: SummaryCell | Cell | Audit) -> tuple[str, str, Coverage, Modality]:
    """Return what the cells that differ in size alone have in common, and their audit."""
    return cell.pair, cell.granularity, cell.coverage, cell.modality


def largest_cells(cells: Iterable[SummaryCell]) -> list[SummaryCell]:
    """Return of each pair the cell of the largest size that has a result."""
    found: dict[tuple[str, str, Coverage, Modality], SummaryCell] = {}
    for cell in cells:
        key = series_of(cell)
        if cell.done and (
            key not in found or SIZES.index(cell.size) > SIZES.index(found[key].size)
        ):
            found[key] = cell
    return list(found.values())


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
