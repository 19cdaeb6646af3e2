"""The search against brute force and by hand."""

from __future__ import annotations

import itertools
import random

import pytest

from qsens.analysis.allocation import allocate


def brute_force(
    scores: list[float | None], weights: list[int], bits: float, target: float
) -> float | None:
    """Return the least total score that meets the target; none if nothing does."""
    total = sum(weights)
    best: float | None = None
    for chosen in itertools.product([False, True], repeat=len(scores)):
        if any(pick and score is None for pick, score in zip(chosen, scores, strict=True)):
            continue
        used = sum(w * (bits if pick else 16) for w, pick in zip(weights, chosen, strict=True))
        if used > target * total:
            continue
        value = sum(s or 0 for s, pick in zip(scores, chosen, strict=True) if pick)
        best = value if best is None else min(best, value)
    return best


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_equal_to_brute_force(seed: int, scale: float) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 8)
    scores: list[float | None] = [
        None if draw.random() < 0.1 else draw.uniform(0, 1) ** 3 * scale for _ in range(count)
    ]
    weights = [draw.choice([128, 256, 1024]) for _ in range(count)]
    bits, target = draw.choice([4.25, 8.0]), draw.choice([5.0, 8.0, 10.5, 16.0])
    found = allocate(scores, weights, format_bits=bits, target_bits=target)
    best = brute_force(scores, weights, bits, target)
    assert found.satisfied == (best is not None)
    if best is not None:
        assert found.score == pytest.approx(best, rel=1e-9, abs=1e-15)
        assert found.effective_bits <= target


def test_by_hand() -> None:
    # Equal weights at 8 bits of 16; a target of 12 wants half of them: the two cheapest.
    found = allocate([3.0, 1.0, 2.0, 9.0], [10, 10, 10, 10], format_bits=8.0, target_bits=12.0)
    assert found.quantized == (False, True, True, False)
    assert found.score == 3.0
    assert found.effective_bits == 12.0
    assert found.satisfied


def test_exactly_the_target_is_met_by_all() -> None:
    found = allocate([1.0, 2.0, 3.0], [7, 11, 13], format_bits=8.0, target_bits=8.0)
    assert found.quantized == (True, True, True)
    assert found.satisfied


def test_out_of_reach_is_said() -> None:
    found = allocate([1.0, 2.0], [5, 5], format_bits=8.0, target_bits=6.0)
    assert found.quantized == (True, True)
    assert found.effective_bits == 8.0
    assert not found.satisfied


def test_an_unknown_score_is_not_zero() -> None:
    found = allocate([None, float("nan"), 5.0], [10, 10, 20], format_bits=8.0, target_bits=12.0)
    assert found.quantized == (False, False, True)
    assert found.satisfied
