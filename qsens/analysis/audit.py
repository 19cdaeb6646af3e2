"""Whether a score may be believed: estimates against the true KL divergence of some groups."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from scipy.stats import binom, spearmanr

from qsens.names import kind_of
from qsens.schema.audit import Judgement, Point, Verdict
from qsens.schema.summary import Row

# Groups that are always audited: those that hurt most.
TOP = 5
# The least rank correlation with the truth, for numbers and for ranks.
TRUST_RHO = 0.95
RANK_RHO = 0.8
# Where the median of estimate over truth must lie.
TRUST_RATIO = (0.8, 1.25)
# Beyond these, the second order does not describe the perturbation: its ranks are luck.
BROKEN_RATIO = (0.5, 2.0)
# Share of truths that 90 % intervals must cover, unless chance can explain fewer of them.
COVERAGE = 0.8
_CHANCE = 0.05
Z90 = 1.6449  # of a normal distribution: 5 % lie above
# Fewer groups tell nothing about ranks.
_LEAST = 5


def choose_groups(rows: Sequence[Row], count: int, known: Collection[str] = ()) -> list[str]:
    """Choose the groups to audit: the top five, the head, and others from all over the ranking.

    Args:
        rows: The rows of a cell.
        count: Groups in all; the top five and the head come on top where it is smaller.
        known: Groups that are chosen for other pairs: preferred, since all pairs of a group are
            measured together.

    Returns:
        Names, most sensitive first.
    """
    ranked = sorted(
        (row for row in rows if row.position is not None), key=lambda row: row.position or 0
    )
    chosen = {row.layer for row in ranked[:TOP]}
    chosen |= {row.layer for row in ranked if row.kind == "head" or kind_of(row.layer) == "head"}
    others = [row.layer for row in ranked if row.layer not in chosen]
    wanted = min(len(others), max(0, count - len(chosen)))
    # One of each of as many strata of equal size: a known one, else that in the middle.
    for index in range(wanted):
        stratum = others[index * len(others) // wanted : (index + 1) * len(others) // wanted]
        shared = [layer for layer in stratum if layer in known]
        chosen.add((shared or [stratum[len(stratum) // 2]])[0])
    return [row.layer for row in ranked if row.layer in chosen]


def judge(points: Sequence[Point], *, in_nats: bool) -> Judgement:
    """Judge a score by some groups whose true divergence is known.

    ``trust`` needs a rank correlation of at least 0.95, a median ratio within 0.8 to 1.25, and 90 %
    intervals that cover the truth in 80 % of the groups, as far as so few can tell: a one-sided
    binomial test at the level of 5 %. ``rank only`` needs 0.8, and a ratio within 0.5 to 2: where
    the second order misses the size of the damage by more, its order is luck. A proxy gets ``rank
    only`` at best.

    Args:
        points: The groups.
        in_nats: Whether the estimate is one of the divergence itself, rather than a proxy.
    """
    estimate = np.array([point.estimate for point in points], dtype=float)
    truth = np.array([point.truth for point in points], dtype=float)
    rho = None
    if len(points) >= 2 and len(set(estimate)) > 1 and len(set(truth)) > 1:
        rho = float(spearmanr(estimate, truth).statistic)
    ratios = estimate[truth > 0] / truth[truth > 0] if in_nats else np.array([])
    ratio, low, high = (
        (float(np.quantile(ratios, q)) for q in (0.5, 0.1, 0.9))
        if len(ratios)
        else (None, None, None)
    )
    # An error of 0 is that of the head, which is not drawn: it has no interval to be in.
    with_errors = [point for point in points if point.standard_error]
    inside = sum(
        abs(point.estimate - point.truth) <= Z90 * (point.standard_error or 0.0)
        for point in with_errors
    )
    verdict, reason = _verdict(len(points), rho, ratio, inside, len(with_errors), in_nats=in_nats)
    return Judgement(
        verdict=verdict,
        reason=reason,
        rho=rho,
        ratio=ratio,
        ratio_10=low,
        ratio_90=high,
        covered=inside / len(with_errors) if with_errors else None,
    )


def _verdict(
    groups: int,
    rho: float | None,
    ratio: float | None,
    inside: int,
    with_errors: int,
    *,
    in_nats: bool,
) -> tuple[Verdict, str]:
    if groups < _LEAST:
        return "do not trust", f"{groups} groups are too few to tell"
    if rho is None:
        return "do not trust", "all groups are equal, in the score or in truth"
    if rho < RANK_RHO:
        return "do not trust", f"rank correlation {rho:.3f} is below {RANK_RHO}"
    if not in_nats:
        return "rank only", "the score is a proxy: its numbers are no nats"
    if ratio is None:
        return "do not trust", "no group has a true divergence above 0"
    if not BROKEN_RATIO[0] <= ratio <= BROKEN_RATIO[1]:
        return "do not trust", f"the estimate is {ratio:.2f} of the truth: beyond the second order"
    if rho < TRUST_RHO:
        return "rank only", f"rank correlation {rho:.3f} is below {TRUST_RHO}"
    if not TRUST_RATIO[0] <= ratio <= TRUST_RATIO[1]:
        return "rank only", f"the estimate is {ratio:.2f} of the truth"
    if with_errors and binom.cdf(inside, with_errors, COVERAGE) < _CHANCE:
        return "rank only", f"{inside} of {with_errors} intervals of 90 % cover the truth"
    return "trust", "ranks, numbers and intervals agree with the truth"
