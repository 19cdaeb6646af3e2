"""The format of each group so that no data set is served much worse than it could be.

``min t`` so that each data set's total is at most ``t`` times the lowest total that it could have
at the same bits by itself: a 0/1 program, which ``scipy.optimize.milp`` decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack, vstack

from qsens.recipes.allocation import Allocation, allocate, outcome
from qsens.recipes.format_choices import DecisionGroup
from qsens.recipes.solver import silenced

# How far above the least maximum a choice may be: predictions are not better than that.
_GAP = 1e-4
_SECONDS = 120.0
_ROUNDING = 1e-12


def allocate_worst_case(
    domains: Sequence[Sequence[DecisionGroup]], target_bits: float
) -> list[Allocation]:
    """Choose a format for each group so that the largest of the data sets' ratios is least.

    The ratio of a data set is its total over the least that it could be at the target.

    Args:
        domains: What may become what, once for each data set: the same groups with the same
            choices, each with the scores of that data set.
        target_bits: Bits a weight over all groups, at most.

    Returns:
        The one choice as each data set scores it.

    Raises:
        AnswerIsNo: The target is out of reach; the remedy names the nearest one.
    """
    alone = [allocate(decisions, target_bits) for decisions in domains]
    first = domains[0]
    owner = np.array([row for row, each in enumerate(first) for _ in each.choices])
    bits = np.array([each.weights * choice.bits for each in first for choice in each.choices])
    budget = target_bits * sum(each.weights for each in first) * (1 + _ROUNDING)
    ratios = [
        np.array([choice.score for each in decisions for choice in each.choices])
        / _scale(decisions, best.score)
        for decisions, best in zip(domains, alone, strict=True)
    ]
    # The last column is t.
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    rows = [
        hstack([one_each, csr_array((len(first), 1))]),
        csr_array([[*(bits / bits.max()), 0.0]]),
        *(csr_array([[*ratio, -1.0]]) for ratio in ratios),
    ]
    ones = [1.0] * len(first)
    unlimited = [-np.inf] * (1 + len(ratios))
    with silenced():
        solution = milp(
            np.array([*[0.0] * len(owner), 1.0]),
            constraints=LinearConstraint(
                vstack(rows),
                lb=[*ones, *unlimited],
                ub=[*ones, budget / float(bits.max()), *[0.0] * len(ratios)],
            ),
            integrality=np.array([*[1] * len(owner), 0]),
            bounds=Bounds(0, [*[1.0] * len(owner), np.inf]),
            options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
        )
    candidates = [best.chosen for best in alone]
    if solution.x is not None:
        places = [np.flatnonzero(owner == row) for row in range(len(first))]
        candidates.append(tuple(int(solution.x[place].argmax()) for place in places))
    fitting = [
        [outcome(decisions, chosen) for decisions in domains]
        for chosen in candidates
        if math.fsum(
            each.weights * each.choices[place].bits
            for each, place in zip(first, chosen, strict=True)
        )
        <= budget
    ]
    scales = [_scale(each, best.score) for each, best in zip(domains, alone, strict=True)]
    return min(
        fitting,
        key=lambda outcomes: max(
            each.score / scale for each, scale in zip(outcomes, scales, strict=True)
        ),
    )


def _scale(decisions: Sequence[DecisionGroup], best: float) -> float:
    """Return what a data set's totals are compared with; nothing can be divided by a best of 0."""
    if best > 0:
        return best
    largest = max((choice.score for each in decisions for choice in each.choices), default=0.0)
    return largest * 1e-6 or 1.0
