"""Which groups to quantize at a target of effective bits: an exact 0/1 program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

_UNQUANTIZED_BITS = 16.0


@dataclass(frozen=True)
class Allocation:
    """The outcome of a search.

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


def allocate(
    scores: Sequence[float | None],
    weights: Sequence[int],
    *,
    format_bits: float,
    target_bits: float,
) -> Allocation:
    """Choose the groups to quantize so that the total score is least and the target is met.

    Args:
        scores: Score of each group in the format; none where it is unknown: such a group stays
            unquantized, since an unknown score is not a score of 0.
        weights: Weight elements of each group.
        format_bits: Bits a weight in the format, block scales included.
        target_bits: Bits a weight over all groups, at most; a group left alone counts 16.

    Returns:
        The optimum; where the target is out of reach, every group with a score quantized and
        ``satisfied`` false.

    Source: the objective and constraint of ModelOpt's AutoQuantize search, solved by
    ``scipy.optimize.milp`` to a gap of 0 with scores scaled to a maximum of 1.
    """
    total = sum(weights)
    known = [score is not None and math.isfinite(score) for score in scores]
    saved = np.array([count * (_UNQUANTIZED_BITS - format_bits) for count in weights], dtype=float)
    needed = total * (_UNQUANTIZED_BITS - target_bits)
    reachable = float(saved[np.array(known, dtype=bool)].sum()) if weights else 0.0
    # The sums are of whole numbers times few bits: this much slack is rounding only.
    slack = 1e-9 * max(1.0, total)
    if not total or reachable + slack < needed:
        return _outcome(known, scores, weights, format_bits, target_bits)
    if needed <= 0:
        return _outcome([False] * len(weights), scores, weights, format_bits, target_bits)

    cost = np.array([score if ok else 0.0 for score, ok in zip(scores, known, strict=True)])
    largest = cost.max(initial=0.0)
    solution = milp(
        cost / largest if largest > 0 else cost,
        constraints=LinearConstraint(saved[None, :] / total, lb=(needed - slack) / total),
        integrality=np.ones(len(weights)),
        bounds=Bounds(0, np.array(known, dtype=float)),
        options={"mip_rel_gap": 0.0},
    )
    if solution.x is None:
        raise RuntimeError(f"the solver gave no answer: {solution.message}")
    chosen = [bool(value > 0.5) for value in solution.x]
    return _outcome(chosen, scores, weights, format_bits, target_bits)


def _outcome(
    chosen: Sequence[bool],
    scores: Sequence[float | None],
    weights: Sequence[int],
    format_bits: float,
    target_bits: float,
) -> Allocation:
    total = sum(weights)
    bits = math.fsum(
        count * (format_bits if quantized else _UNQUANTIZED_BITS)
        for count, quantized in zip(weights, chosen, strict=True)
    )
    reached = bits / total if total else _UNQUANTIZED_BITS
    return Allocation(
        quantized=tuple(chosen),
        effective_bits=reached,
        score=math.fsum(
            score or 0.0 for score, quantized in zip(scores, chosen, strict=True) if quantized
        ),
        satisfied=reached <= target_bits * (1 + 1e-12),
    )
