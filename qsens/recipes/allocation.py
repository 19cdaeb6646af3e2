"""The format of each group at a target of effective bits: an exact 0/1 program.

A multiple-choice knapsack: one format choice a decision group, lowest total score, at most so many
bits. The convex hull of each group's choices gives the optimum of the linear relaxation, which
bounds the answer from below, and a good integer answer from above; options whose reduced cost
exceeds the gap between the two cannot be part of a better one. ``scipy.optimize.milp`` decides
among the few that are left.

Source: Kellerer, Pferschy, Pisinger, Knapsack Problems (2004), chapter 11.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from qsens.errors import AnswerIsNo
from qsens.recipes.format_choices import UNQUANTIZED, UNQUANTIZED_BITS, DecisionGroup, FormatChoice
from qsens.recipes.solver import silenced
from qsens.schema.summary import ParetoPoint

# Sums of whole numbers times few bits: this much is rounding only.
_ROUNDING = 1e-12
# A choice as the search sees it: 16-bit cost and score, and its place in
# ``DecisionGroup.choices``.
_Step = tuple[float, float, int]


@dataclass(frozen=True)
class Allocation:
    """The outcome of a search over formats.

    Attributes:
        choices: What each unit becomes, in the order given.
        chosen: Their places among the choices of each unit.
        bits: Bits a weight over all units.
        score: Sum of the scores.
    """

    choices: tuple[FormatChoice, ...]
    bits: float
    score: float
    chosen: tuple[int, ...]


@dataclass(frozen=True)
class Quantized:
    """The outcome of a search over one format.

    Attributes:
        quantized: Whether each group is quantized, in the order given.
        effective_bits: Bits a weight over all groups given.
        score: Sum of the scores of the quantized groups.
        satisfied: Whether the target is met.
    """

    quantized: tuple[bool, ...]
    effective_bits: float
    score: float
    satisfied: bool


def allocate(decisions: Sequence[DecisionGroup], target_bits: float) -> Allocation:
    """Choose a format for each group so that the total score is lowest and the target is met.

    Args:
        decisions: What may become what.
        target_bits: Bits a weight over all units, at most.

    Raises:
        AnswerIsNo: The target is out of reach; the remedy names the nearest one.
    """
    total = sum(decision.weights for decision in decisions)
    budget = target_bits * total * (1 + _ROUNDING)
    ladders = [_ladder(decision) for decision in decisions]
    cheapest = math.fsum(ladder[0][0] for ladder in ladders)
    if cheapest > budget:
        nearest = math.ceil(cheapest / total * 1e4) / 1e4
        raise AnswerIsNo(
            f"{target_bits:g} bits a weight are out of reach: the least is {nearest:g}",
            where="the target of effective bits",
            remedy=f"Ask for {nearest:g} bits or more, keep fewer groups at 16 bits, "
            "or sweep a smaller format.",
        )
    chosen = _solve(ladders, budget)
    return outcome(decisions, [ladder[at][2] for ladder, at in zip(ladders, chosen, strict=True)])


def allocate_least(decisions: Sequence[DecisionGroup], most: float) -> Allocation:
    """Choose a format for each group so that the bits are fewest within a total score.

    The same program with the roles of bits and score exchanged.

    Args:
        decisions: What may become what.
        most: The total score, at most.

    Raises:
        AnswerIsNo: It is below that of the gentlest choice; the remedy names that.
    """
    ladders = [
        [(score, cost, index) for cost, score, index in reversed(_ladder(decision))]
        for decision in decisions
    ]
    least = math.fsum(ladder[0][0] for ladder in ladders)
    budget = most + abs(most) * _ROUNDING
    if least > budget:
        raise AnswerIsNo(
            f"a total score of {most:g} is out of reach: the least is {least:g}",
            where="the largest predicted KL",
            remedy=f"Ask for {least:g} or more.",
        )
    chosen = _solve(ladders, budget)
    return outcome(decisions, [ladder[at][2] for ladder, at in zip(ladders, chosen, strict=True)])


def allocate_one(
    scores: Sequence[float | None],
    weights: Sequence[int],
    *,
    format_bits: float,
    target_bits: float,
) -> Quantized:
    """Choose the groups to quantize in one format so that the total score is lowest.

    Args:
        scores: Score of each group in the format; none where it is unknown: such a group stays
            unquantized, since an unknown score is not a score of 0.
        weights: Weight elements of each group.
        format_bits: Bits a weight in the format, block scales included.
        target_bits: Bits a weight over all groups, at most; a group left alone counts 16.

    Returns:
        The optimum; where the target is out of reach, every group with a score quantized and
        ``satisfied`` false.

    Source: the objective and constraint of ModelOpt's AutoQuantize search.
    """
    decisions = [
        DecisionGroup(
            groups=(str(index),),
            weights=count,
            choices=(UNQUANTIZED, FormatChoice("quantized", format_bits, score))
            if score is not None and math.isfinite(score)
            else (UNQUANTIZED,),
        )
        for index, (score, count) in enumerate(zip(scores, weights, strict=True))
    ]
    satisfied = True
    try:
        chosen = allocate(decisions, target_bits)
    except AnswerIsNo:
        chosen = outcome(decisions, [len(decision.choices) - 1 for decision in decisions])
        satisfied = False
    return Quantized(
        quantized=tuple(choice.format is not None for choice in chosen.choices),
        effective_bits=chosen.bits,
        score=chosen.score,
        satisfied=satisfied,
    )


def pareto(decisions: Sequence[DecisionGroup], points: int = 64) -> list[ParetoPoint]:
    """Return the lowest score against bits, from the cheapest to the lowest score of all.

    Every point is one that `allocate` reaches exactly: no choice has a lower score at its bits.
    Between two of them, the lowest score lies on or above their chord.

    Args:
        decisions: What may become what.
        points: Points at most; they are thinned out evenly over the bits.
    """
    total = sum(decision.weights for decision in decisions)
    if not total:
        return []
    ladders = [_ladder(decision) for decision in decisions]
    steps = _steps(ladders, [_hull(ladder) for ladder in ladders])
    at = [0] * len(ladders)
    # Equal savings are one stretch of the curve: only its ends are points.
    ends = [index for index, step in enumerate(steps) if step[0] != _saving(steps, index + 1)]
    used = math.fsum(ladder[0][0] for ladder in ladders)
    spent = [
        ladders[decision][end][0] - ladders[decision][start][0] for _, decision, start, end in steps
    ]
    bits = np.cumsum([used, *spent])[[0, *(end + 1 for end in ends)]] / total
    marks = np.linspace(bits[0], bits[-1], points) if len(bits) > points else bits
    kept = {int(np.abs(bits - mark).argmin()) for mark in marks}
    curve = []
    done = 0
    for index, end in enumerate([-1, *ends]):
        for _, decision, _, place in steps[done : end + 1]:
            at[decision] = place
        done = end + 1
        if index in kept:
            chosen = [ladder[place] for ladder, place in zip(ladders, at, strict=True)]
            cost, score = (math.fsum(step[part] for step in chosen) for part in (0, 1))
            curve.append(ParetoPoint(bits=cost / total, damage=score))
    return curve


def outcome(decisions: Sequence[DecisionGroup], chosen: Sequence[int]) -> Allocation:
    """Return what choices come to, given by their places among those of each unit."""
    choices = tuple(
        decision.choices[index] for decision, index in zip(decisions, chosen, strict=True)
    )
    total = sum(decision.weights for decision in decisions)
    used = math.fsum(
        decision.weights * choice.bits for decision, choice in zip(decisions, choices, strict=True)
    )
    return Allocation(
        choices=choices,
        bits=used / total if total else UNQUANTIZED_BITS,
        score=math.fsum(choice.score for choice in choices),
        chosen=tuple(chosen),
    )


def _ladder(decision: DecisionGroup) -> list[_Step]:
    """Return the options that no other beats in both, cheapest first: score falls all the way."""
    steps = sorted(
        (decision.weights * choice.bits, choice.score, index)
        for index, choice in enumerate(decision.choices)
    )
    ladder: list[_Step] = []
    for step in steps:
        if not ladder or step[1] < ladder[-1][1]:
            ladder.append(step)
    return ladder


def _hull(ladder: Sequence[_Step]) -> list[int]:
    """Return the places of the lower convex hull of a ladder: score over cost."""
    hull: list[int] = []
    for index, (cost, score, _) in enumerate(ladder):
        while len(hull) > 1:
            (cost_a, score_a, _), (cost_b, score_b, _) = (ladder[place] for place in hull[-2:])
            if (score_a - score_b) * (cost - cost_b) > (score_b - score) * (cost_b - cost_a):
                break
            hull.pop()
        hull.append(index)
    return hull


def _steps(
    ladders: Sequence[Sequence[_Step]], hulls: Sequence[Sequence[int]]
) -> list[tuple[float, int, int, int]]:
    """Return the steps up all hulls, the one that lowers the score most a bit first.

    Returns:
        Saving a bit, unit, places before and after.
    """
    steps = []
    for decision, (ladder, hull) in enumerate(zip(ladders, hulls, strict=True)):
        for start, end in itertools.pairwise(hull):
            saved = ladder[start][1] - ladder[end][1]
            steps.append((saved / (ladder[end][0] - ladder[start][0]), decision, start, end))
    return sorted(steps, key=lambda step: (-step[0], step[1], step[2]))


def _saving(steps: Sequence[tuple[float, int, int, int]], index: int) -> float | None:
    return steps[index][0] if index < len(steps) else None


def _solve(ladders: Sequence[Sequence[_Step]], budget: float) -> list[int]:
    """Return the place of each group on its ladder, at the lowest score within ``budget``."""
    costs = [np.array([step[0] for step in ladder]) for ladder in ladders]
    scores = [np.array([step[1] for step in ladder]) for ladder in ladders]
    at = [0] * len(ladders)
    left = budget - math.fsum(float(cost[0]) for cost in costs)
    steps = _steps(ladders, [_hull(ladder) for ladder in ladders])
    multiplier, stopped = 0.0, None
    for saving, decision, start, end in steps:
        cost = float(costs[decision][end] - costs[decision][start])
        if cost > left:
            multiplier, stopped = saving, (decision, end)
            break
        at[decision] = end
        left -= cost
    if stopped is None:
        return at
    # What the relaxation could still save with what is left of the budget bounds the gap.
    reduced = [
        score - score[place] + multiplier * (cost - cost[place])
        for score, cost, place in zip(scores, costs, at, strict=True)
    ]
    best = _filled(costs, scores, at, left)
    over = list(at)
    over[stopped[0]] = stopped[1]
    for other in _lowered(costs, scores, over, budget):
        filled = _filled(costs, scores, other, budget - _sum(costs, other))
        if _sum(scores, filled) < _sum(scores, best):
            best = filled
    gap = _sum(scores, best) - (_sum(scores, at) - multiplier * left)
    scale = max(float(np.abs(score).max()) for score in scores)
    open_ = [np.flatnonzero(values <= gap + _ROUNDING * scale) for values in reduced]
    if gap <= 0 or all(len(places) < 2 for places in open_):
        return best
    return _decided(costs, scores, at, open_, best, budget, gap)


def _filled(
    costs: Sequence[np.ndarray], scores: Sequence[np.ndarray], start: Sequence[int], left: float
) -> list[int]:
    """Spend what is left of the budget, step by step, each time on what saves most."""
    at = list(start)
    while True:
        best: tuple[float, int, int] | None = None
        for decision, place in enumerate(at):
            ladder = costs[decision]
            # The ladder is sorted: the furthest place that fits saves most.
            end = int(np.searchsorted(ladder, ladder[place] + left, side="right")) - 1
            if end > place:
                saved = float(scores[decision][place] - scores[decision][end])
                if best is None or saved > best[0]:
                    best = (saved, decision, end)
        if best is None:
            return at
        _, decision, end = best
        left -= float(costs[decision][end] - costs[decision][at[decision]])
        at[decision] = end


def _lowered(
    costs: Sequence[np.ndarray], scores: Sequence[np.ndarray], over: Sequence[int], budget: float
) -> list[list[int]]:
    """Return choices within the budget: ``over`` with one unit lowered; the best few."""
    excess = _sum(costs, over) - budget
    frontiers = []
    for decision, place in enumerate(over):
        end = (
            int(np.searchsorted(costs[decision], costs[decision][place] - excess, side="right")) - 1
        )
        if end >= 0:
            frontiers.append(
                (float(scores[decision][end] - scores[decision][place]), decision, end)
            )
    choices = []
    for _, decision, end in sorted(frontiers)[:8]:
        choice = list(over)
        choice[decision] = end
        choices.append(choice)
    return choices


def _decided(
    costs: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
    at: Sequence[int],
    open_: Sequence[np.ndarray],
    best: list[int],
    budget: float,
    gap: float,
) -> list[int]:
    """Decide among the places left open; ``best`` where nothing beats it."""
    decisions = [decision for decision, places in enumerate(open_) if len(places) > 1]
    fixed = [places[0] if len(places) == 1 else None for places in open_]
    used = math.fsum(
        float(cost[place]) for cost, place in zip(costs, fixed, strict=True) if place is not None
    )
    owner = np.concatenate(
        [np.full(len(open_[decision]), row) for row, decision in enumerate(decisions)]
    )
    cost = np.concatenate([costs[decision][open_[decision]] for decision in decisions])
    # Against the relaxation's choice and in units of the gap: the solver's tolerances are absolute.
    score = np.concatenate(
        [
            scores[decision][open_[decision]] - scores[decision][at[decision]]
            for decision in decisions
        ]
    )
    rows = [
        csr_array((np.ones(len(owner)), (owner, np.arange(len(owner))))),
        csr_array(cost[None, :] / cost.max()),
    ]
    limits = [*[1.0] * len(decisions), (budget - used) / float(cost.max())]
    while True:
        with silenced():
            solution = milp(
                score / gap * 1e3,
                constraints=LinearConstraint(
                    vstack(rows),
                    lb=[*[1.0] * len(decisions), *[-np.inf] * (len(limits) - len(decisions))],
                    ub=limits,
                ),
                integrality=np.ones(len(owner)),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": 0.0},
            )
        if solution.status == 2 and len(limits) > len(decisions) + 1:
            return best  # nothing else is left
        if solution.x is None:
            raise RuntimeError(f"the solver gave no answer: {solution.message}")
        chosen = [int(place) if place is not None else 0 for place in fixed]
        picked = np.zeros(len(owner))
        for row, decision in enumerate(decisions):
            mine = np.flatnonzero(owner == row)
            index = int(solution.x[mine].argmax())
            picked[mine[index]] = 1.0
            chosen[decision] = int(open_[decision][index])
        if _sum(costs, chosen) <= budget:
            return chosen if _sum(scores, chosen) < _sum(scores, best) else best
        # Over the budget by less than the solver's tolerance: anything but this.
        rows.append(csr_array(picked[None, :]))
        limits.append(len(decisions) - 1.0)


def _sum(values: Sequence[np.ndarray], places: Sequence[int]) -> float:
    return math.fsum(float(value[place]) for value, place in zip(values, places, strict=True))
