"""Which groups moved between two results of the same model, beyond the noise of their samples."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy.stats import false_discovery_control
from scipy.stats import t as student

from qsens.analysis.samples import SampleScores
from qsens.analysis.stability import LEVEL, residuals

Key = TypeVar("Key", bound=Hashable)

RATE = 0.01
"""Share of false alarms: nights on which an unchanged model is not silent."""
FLOOR = 0.01
"""Relative changes below this are those of other kernels and libraries, not of a model."""


@dataclass(frozen=True)
class Change:
    """How a group's score per token changed, with its noise.

    Attributes:
        before: The earlier score.
        after: The later score.
        half_width: Half of the 95 % interval of ``after - before``.
        p_value: Of a change at least this large between results that differ in samples only.
    """

    before: float
    after: float
    half_width: float
    p_value: float

    @property
    def change(self) -> float:
        """Return ``after - before``."""
        return self.after - self.before

    @property
    def relative(self) -> float | None:
        """Return the change over the earlier score; none where that is 0."""
        return self.change / self.before if self.before else None


def changes(before: SampleScores, after: SampleScores, *, paired: bool) -> dict[str, Change]:
    """Test every group that both results score.

    Args:
        before: The earlier result.
        after: The later result.
        paired: Whether both scored the same samples in the same order.

    Returns:
        A change a group, by name; nothing where a result has fewer than two samples.

    Source: Student's paired test and Welch's test, on the linearised ratio of score and tokens.
    """
    common = sorted(set(before.groups) & set(after.groups))
    if not common or min(before.count, after.count) < 2:
        return {}
    one, other = before.take(common), after.take(common)
    gap = other.per_token() - one.per_token()
    if paired:
        errors = residuals(other) - residuals(one)
        deviation = errors.std(axis=1, ddof=1) / math.sqrt(one.count)
        freedom = np.full(len(common), one.count - 1.0)
    else:
        parts = [residuals(part).var(axis=1, ddof=1) / part.count for part in (one, other)]
        deviation = np.sqrt(parts[0] + parts[1])
        freedom = _welch(parts[0], one.count, parts[1], other.count)
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = np.where(gap == 0, 0.0, np.abs(gap) / deviation)
    p_values = 2 * student.sf(statistic, freedom)
    widths = student.ppf((1 + LEVEL) / 2, freedom) * deviation
    return {
        name: Change(float(a), float(b), float(width), float(p))
        for name, a, b, width, p in zip(
            common, one.per_token(), other.per_token(), widths, p_values, strict=True
        )
    }


def moved(
    tested: Mapping[Key, Change], *, rate: float = RATE, floor: float = FLOOR
) -> dict[Key, Change]:
    """Return the changes beyond noise, largest relative to their interval first.

    The rate of false alarms holds over all of ``found`` together: where nothing has changed, the
    chance that anything at all is returned is at most ``rate``.

    Args:
        tested: All changes tested, of every cell.
        rate: Share of false alarms.
        floor: Relative changes below this are left out.

    Source: Benjamini and Hochberg's step-up procedure.
    """
    if not tested:
        return {}
    adjusted = false_discovery_control([change.p_value for change in tested.values()])
    kept = [
        (key, change)
        for (key, change), p_value in zip(tested.items(), adjusted, strict=True)
        if p_value <= rate
        and abs(change.change) >= floor * max(abs(change.before), abs(change.after))
        and change.change != 0
    ]
    kept.sort(key=lambda item: (-_clarity(item[1]), str(item[0])))
    return dict(kept)


def _welch(
    a: npt.NDArray[np.float64], n_a: int, b: npt.NDArray[np.float64], n_b: int
) -> npt.NDArray[np.float64]:
    """Return the degrees of freedom of Welch and Satterthwaite."""
    low = float(min(n_a, n_b) - 1)
    bottom = a**2 / (n_a - 1) + b**2 / (n_b - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom: npt.NDArray[np.float64] = np.where(bottom > 0, (a + b) ** 2 / bottom, low)
    return freedom


def _clarity(change: Change) -> float:
    return abs(change.change) / change.half_width if change.half_width else math.inf
