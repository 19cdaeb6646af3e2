"""How well two engines, or two scores, agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import spearmanr


@dataclass(frozen=True)
class Agreement:
    """Two scores of the same groups, compared.

    Attributes:
        largest: The largest relative difference ``|a - b| / |b|``.
        median: The median of the relative differences.
        spearman: Spearman's rank correlation; none for fewer than two groups.
        worst: The groups that differ most: name, both scores, relative difference.
        only_in_one: Groups that just one of the two has a score for.
    """

    largest: float
    median: float
    spearman: float | None
    worst: tuple[tuple[str, float, float, float], ...]
    only_in_one: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)


def agreement(
    ours: Mapping[str, float], theirs: Mapping[str, float], *, count: int = 5
) -> Agreement:
    """Compare scores by group name.

    Args:
        ours: Scores under test.
        theirs: Scores to compare with; differences are relative to these.
        count: How many of the worst groups to name.

    Raises:
        ValueError: No group has both scores.
    """
    common = [name for name in ours if name in theirs]
    if not common:
        raise ValueError("no group has both scores")
    rows = sorted(
        ((name, ours[name], theirs[name], _relative(ours[name], theirs[name])) for name in common),
        key=lambda row: (-row[3], row[0]),
    )
    differences = sorted(row[3] for row in rows)
    middle = len(differences) // 2
    median = (
        differences[middle]
        if len(differences) % 2
        else (differences[middle - 1] + differences[middle]) / 2
    )
    rho = None
    if len(common) > 1:
        rho = float(
            spearmanr([ours[name] for name in common], [theirs[name] for name in common]).statistic
        )
    return Agreement(
        largest=rows[0][3],
        median=median,
        spearman=rho,
        worst=tuple(rows[:count]),
        only_in_one=tuple(sorted(set(ours) ^ set(theirs))),
    )


def _relative(ours: float, theirs: float) -> float:
    if ours == theirs:
        return 0.0
    return abs(ours - theirs) / abs(theirs) if theirs else float("inf")
