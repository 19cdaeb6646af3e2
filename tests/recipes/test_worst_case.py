"""The least maximum over data sets, against every choice that there is."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from qsens.errors import AnswerIsNo
from qsens.recipes.domains import mixed, scaled
from qsens.recipes.format_choices import UNQUANTIZED, DecisionGroup, FormatChoice
from qsens.recipes.worst_case import allocate_worst_case
from qsens.schema.summary import Row


def instance(seed: int, domains: int) -> list[list[DecisionGroup]]:
    """Return five groups of three formats, with other scores in each data set."""
    rng = random.Random(seed)
    weights = [rng.randint(1, 9) for _ in range(5)]
    return [
        [
            DecisionGroup(
                groups=(f"g{at}",),
                weights=count,
                choices=(
                    UNQUANTIZED,
                    FormatChoice("int8", 8.0, rng.uniform(0, 1)),
                    FormatChoice("int4", 4.0, rng.uniform(1, 9)),
                ),
            )
            for at, count in enumerate(weights)
        ]
        for _ in range(domains)
    ]


@pytest.mark.parametrize("domains", [2, 3])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bits", [4.0, 6.0, 9.0])
def test_no_choice_has_a_smaller_maximum(seed: int, domains: int, bits: float) -> None:
    given = instance(seed, domains)
    weights = [each.weights for each in given[0]]
    places = [
        chosen
        for chosen in itertools.product(range(3), repeat=5)
        if sum(w * (16, 8, 4)[at] for w, at in zip(weights, chosen, strict=True))
        <= bits * sum(weights)
    ]

    def total(domain: list[DecisionGroup], chosen: tuple[int, ...]) -> float:
        return math.fsum(d.choices[at].score for d, at in zip(domain, chosen, strict=True))

    best = [min(total(domain, chosen) for chosen in places) for domain in given]
    least = min(
        max(total(d, chosen) / b for d, b in zip(given, best, strict=True)) for chosen in places
    )
    found = allocate_worst_case(given, bits)
    assert len({each.chosen for each in found}) == 1
    assert found[0].bits <= bits + 1e-9
    for domain, each in zip(given, found, strict=True):
        assert each.score == pytest.approx(total(domain, each.chosen))
    ratio = max(each.score / b for each, b in zip(found, best, strict=True))
    assert ratio <= least * (1 + 1e-3)


def test_what_costs_nothing_divides_nothing() -> None:
    given = instance(1, 2)
    found = allocate_worst_case(given, 16.0)
    assert [each.score for each in found] == [0.0, 0.0]


def test_out_of_reach() -> None:
    with pytest.raises(AnswerIsNo, match="the least is 4"):
        allocate_worst_case(instance(1, 2), 3.5)


def row(**more: object) -> Row:
    given = {
        "layer": "a", "members": ("a",), "kind": "other", "depth": None, "status": "scored",
        "num_bits": 8.0, "sensitivity": 5.0, "sensitivity_per_token": 0.5, "size_cost": 1.0,
        "position": 1, "share": 1.0,
    }  # fmt: skip
    return Row.model_validate({**given, **more})


def test_scores_of_a_mix() -> None:
    scored = row(by_domain={"a": 0.25, "b": 1.0})
    (half,) = mixed([scored], {"a": 0.5, "b": 0.5})
    assert (half.sensitivity, half.sensitivity_per_token) == (0.625, 0.625)
    disabled = row(status="disabled", sensitivity=None, sensitivity_per_token=None)
    assert mixed([disabled], {"a": 1.0, "b": 0.0}) == (disabled,)


def test_what_an_audit_corrects_it_corrects_in_every_data_set() -> None:
    corrected = scaled(row(by_domain={"a": 0.25, "b": 1.0}), 0.25)
    assert corrected.sensitivity_per_token == 0.25
    assert corrected.by_domain == {"a": 0.125, "b": 0.5}
    assert scaled(row(), 0.25).by_domain is None
    # Of an estimate of 0 nobody knows whose the truth is.
    nothing = row(sensitivity_per_token=0.0, by_domain={"a": 0.0, "b": 0.0})
    assert scaled(nothing, 0.25).by_domain == {"a": 0.25, "b": 0.25}
