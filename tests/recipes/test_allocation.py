"""The search against brute force and by hand."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsens.errors import AnswerIsNo
from qsens.recipes.allocation import allocate, allocate_least, allocate_one, pareto
from qsens.recipes.format_choices import UNQUANTIZED, DecisionGroup, FormatChoice
from qsens.schema.summary import ParetoPoint


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
    found = allocate_one(scores, weights, format_bits=bits, target_bits=target)
    best = brute_force(scores, weights, bits, target)
    assert found.satisfied == (best is not None)
    if best is not None:
        assert found.score == pytest.approx(best, rel=1e-9, abs=1e-15)
        assert found.effective_bits <= target


@pytest.mark.parametrize("seed", range(120))
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_the_fewest_bits_within_a_score_are_those_of_brute_force(seed: int, scale: float) -> None:
    draw = random.Random(seed)
    decisions = []
    for at in range(draw.randint(1, 6)):
        bits = draw.sample([4.125, 4.25, 4.5, 8.0, 8.25], draw.randint(1, 3))
        own = [FormatChoice(str(b), b, draw.uniform(0, 1) ** 3 * scale) for b in bits]
        weights = draw.choice([128, 256, 1024, 4096])
        decisions.append(DecisionGroup((str(at),), weights, (UNQUANTIZED, *own)))
    most = draw.choice([0.0, 0.05, 0.3, 1.0, 9.0]) * scale
    found = allocate_least(decisions, most)
    total = sum(decision.weights for decision in decisions)
    best = math.inf
    for chosen in itertools.product(*(decision.choices for decision in decisions)):
        if math.fsum(choice.score for choice in chosen) <= most:
            pairs = zip(decisions, chosen, strict=True)
            best = min(best, sum(decision.weights * choice.bits for decision, choice in pairs))
    assert found.bits == pytest.approx(best / total, rel=1e-12)
    assert found.score <= most * (1 + 1e-9)


def test_a_score_that_no_choice_has_is_out_of_reach() -> None:
    forced = DecisionGroup(("a",), 10, (FormatChoice("int8", 8.0, 0.5),))
    with pytest.raises(
        AnswerIsNo, match=r"a total score of 0\.25 is out of reach: the least is 0\.5"
    ):
        allocate_least([forced], 0.25)


def test_by_hand() -> None:
    # Equal weights at 8 bits of 16; a target of 12 wants half of them: the two cheapest.
    found = allocate_one([3.0, 1.0, 2.0, 9.0], [10, 10, 10, 10], format_bits=8.0, target_bits=12.0)
    assert found.quantized == (False, True, True, False)
    assert found.score == 3.0
    assert found.effective_bits == 12.0
    assert found.satisfied


def test_exactly_the_target_is_met_by_all() -> None:
    found = allocate_one([1.0, 2.0, 3.0], [7, 11, 13], format_bits=8.0, target_bits=8.0)
    assert found.quantized == (True, True, True)
    assert found.satisfied


def test_out_of_reach_is_said() -> None:
    found = allocate_one([1.0, 2.0], [5, 5], format_bits=8.0, target_bits=6.0)
    assert found.quantized == (True, True)
    assert found.effective_bits == 8.0
    assert not found.satisfied


def test_an_unknown_score_is_not_zero() -> None:
    found = allocate_one([None, float("nan"), 5.0], [10, 10, 20], format_bits=8.0, target_bits=12.0)
    assert found.quantized == (False, False, True)
    assert found.satisfied


FORMATS = {"a": 4.125, "b": 4.5, "c": 6.0, "d": 8.0}


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[DecisionGroup], float]:
    """Up to 8 groups with up to 4 formats, at a target anywhere between 4 and 16 bits."""
    scale = 10.0 ** draw(st.integers(-9, 3))
    names = draw(st.lists(st.sampled_from(sorted(FORMATS)), min_size=1, max_size=4, unique=True))
    decisions = []
    for index in range(draw(st.integers(1, 8))):
        known = draw(st.lists(st.sampled_from(names), max_size=4, unique=True))
        choices = [
            FormatChoice(name, FORMATS[name], draw(st.integers(0, 10**6)) / 10**6 * scale)
            for name in known
        ]
        weights = draw(st.sampled_from([64, 128, 192, 1024, 4096, 50_000]))
        decisions.append(DecisionGroup((f"g{index}",), weights, (UNQUANTIZED, *choices)))
    return decisions, draw(st.integers(4 * 64, 16 * 64)) / 64


@given(instances())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_many_formats_equal_brute_force(instance: tuple[list[DecisionGroup], float]) -> None:
    """All choices at once, as sums of outer products: nothing of the search is in it."""
    decisions, target = instance
    used, damage = np.zeros(1), np.zeros(1)
    for decision in decisions:
        bits = np.array([choice.bits * decision.weights for choice in decision.choices])
        hurt = np.array([choice.score for choice in decision.choices])
        used = np.add.outer(used, bits).ravel()
        damage = np.add.outer(damage, hurt).ravel()
    total = sum(decision.weights for decision in decisions)
    within = used <= target * total
    if not within.any():
        with pytest.raises(AnswerIsNo, match="out of reach") as caught:
            allocate(decisions, target)
        nearest = float(used.min()) / total
        named = float(caught.value.remedy.split()[2])
        assert nearest <= named <= nearest + 1e-4
        assert allocate(decisions, named).bits == pytest.approx(nearest)
        return
    found = allocate(decisions, target)
    assert found.bits <= target
    assert found.score == pytest.approx(damage[within].min(), rel=1e-9, abs=1e-18)
    assert all(
        choice in decision.choices
        for choice, decision in zip(found.choices, decisions, strict=True)
    )
    assert found.score == pytest.approx(math.fsum(choice.score for choice in found.choices))


@given(instances())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_no_choice_lies_below_the_curve(instance: tuple[list[DecisionGroup], float]) -> None:
    decisions, target = instance
    curve = pareto(decisions)
    bits = [point.bits for point in curve]
    assert bits == sorted(set(bits))
    assert curve[-1].damage == 0
    for point in curve:
        assert allocate(decisions, point.bits).score == pytest.approx(point.damage, rel=1e-9)
    if target >= bits[0]:
        below = allocate(decisions, target)
        chord = np.interp(below.bits, bits, [point.damage for point in curve])
        assert below.score >= chord * (1 - 1e-9)


def test_two_formats_by_hand() -> None:
    """Three equal groups share 20 bits a weight: one of them is at 4 bits, two are at 8."""
    names = (("w4", 4.0), ("w8", 8.0))
    hurt = {"x": (9.0, 1.0), "y": (3.0, 2.0), "z": (7.0, 1.0)}
    decisions = [
        DecisionGroup(
            (name,),
            10,
            (UNQUANTIZED, *(FormatChoice(f, b, d) for (f, b), d in zip(names, each, strict=True))),
        )
        for name, each in hurt.items()
    ]
    found = allocate(decisions, 20 / 3)
    # 4 bits cost x 9, y 3, z 7; 8 bits cost x and z 1 each.
    assert [choice.format for choice in found.choices] == ["w8", "w4", "w8"]
    assert found.score == 5.0
    assert found.bits == 20 / 3


def test_the_curve_is_thinned_out() -> None:
    decisions = [
        DecisionGroup((str(index),), 10, (UNQUANTIZED, FormatChoice("w8", 8.0, 1.0 + index)))
        for index in range(200)
    ]
    curve = pareto(decisions, points=11)
    assert len(curve) == 11
    assert curve[0] == ParetoPoint(bits=8.0, damage=sum(range(1, 201)))
    assert curve[-1] == ParetoPoint(bits=16.0, damage=0.0)
    # Half way, the 100 that hurt most are at 16 bits.
    assert curve[5] == ParetoPoint(bits=12.0, damage=sum(range(1, 101)))


def test_nothing_but_the_answer_reaches_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(3)
    decisions = [
        DecisionGroup(
            (str(index),),
            draw.randint(10**5, 10**8),
            (UNQUANTIZED, *(FormatChoice(str(b), b, draw.random() * 2**-b) for b in (4, 5, 6, 8))),
        )
        for index in range(150)
    ]
    for target in (4.6, 5.0, 6.0):
        assert allocate(decisions, target).bits <= target
    assert capfd.readouterr() == ("", "")
