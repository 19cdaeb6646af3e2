"""Verdicts and choices, by hand."""

from __future__ import annotations

import pytest

from qsens.analysis.audit import choose_groups, judge
from qsens.schema.audit import Audit, Point, digest_of
from qsens.schema.summary import Row


def row(position: int | None, kind: str = "o") -> Row:
    name = f"layers.{position}.o_proj" if kind == "o" else "lm_head"
    return Row.model_validate(
        {
            "layer": name,
            "members": (name,),
            "kind": kind,
            "depth": None,
            "status": "scored" if position else "failed",
            "num_bits": 8.0,
            "sensitivity": 1.0 / position if position else None,
            "sensitivity_per_token": None,
            "size_cost": 1.0,
            "position": position,
            "share": 0.0,
        }
    )


def points(estimates: list[float], truths: list[float], error: float | None = None) -> list[Point]:
    return [
        Point(layer=str(index), kind="o", estimate=e, standard_error=error, truth=t)
        for index, (e, t) in enumerate(zip(estimates, truths, strict=True))
    ]


def test_the_top_the_head_and_strata_of_the_rest() -> None:
    rows = [row(index) for index in range(1, 100)] + [row(100, "head"), row(None)]
    # 94 others (ranks 6 to 99) in 6 strata; the middle of each: 6 + (2 i + 1) * 94 // 12.
    expected = [1, 2, 3, 4, 5, 13, 29, 45, 60, 76, 92]
    names = [f"layers.{rank}.o_proj" for rank in expected] + ["lm_head"]
    assert choose_groups(rows, 12) == names
    assert choose_groups(rows[::-1], 12) == names
    # Of a stratum, what is measured for another pair: ranks 20 and 21 lie in two strata.
    known = {"layers.20.o_proj", "layers.21.o_proj", "layers.50.o_proj"}
    shared = (1, 2, 3, 4, 5, 20, 21, 50, 60, 76, 92)
    assert choose_groups(rows, 12, known)[:-1] == [f"layers.{rank}.o_proj" for rank in shared]
    assert len(choose_groups(rows, 1)) == 6
    assert len(choose_groups(rows, 1000)) == 100


TRUTH = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]


def test_right_in_everything_is_trusted() -> None:
    found = judge(points([t * 1.1 for t in TRUTH], TRUTH, 0.7), in_nats=True)
    assert found.verdict == "trust"
    assert found.rho == pytest.approx(1)
    assert found.ratio == pytest.approx(1.1)
    # 1.6449 * 0.7 = 1.15 covers a tenth of every truth.
    assert found.covered == 1.0


def test_what_is_not_drawn_has_no_interval() -> None:
    # The head's estimate is exact to the second order: its error is 0, and tells nothing.
    measured = points([t * 1.1 for t in TRUTH], TRUTH, 0.7)
    measured[0] = measured[0].model_copy(update={"standard_error": 0.0})
    assert judge(measured, in_nats=True).covered == 1.0


def test_a_proxy_gives_ranks_at_best() -> None:
    found = judge(points([t**3 for t in TRUTH], TRUTH), in_nats=False)
    assert (found.verdict, found.ratio, found.covered) == ("rank only", None, None)
    assert found.rho == pytest.approx(1)


@pytest.mark.parametrize(
    ("estimates", "error", "verdict", "words"),
    [
        ([t * 0.7 for t in TRUTH], None, "rank only", "0.70 of the truth"),
        ([t * 0.4 for t in TRUTH], None, "do not trust", "beyond the second order"),
        ([t * 2.5 for t in TRUTH], None, "do not trust", "beyond the second order"),
        # Swapping two neighbours at distance 3: rho = 1 - 6 * (9 + 9) / 990 = 0.89.
        ([4.0, 2.0, 3.0, 1.0, *TRUTH[4:]], None, "rank only", "0.891 is below 0.95"),
        (TRUTH[::-1], None, "do not trust", "-1.000 is below 0.8"),
        ([1.0] * 10, None, "do not trust", "equal"),
        # Of ten intervals none covers; if 80 % should, that is a chance of 1e-7.
        ([t * 1.1 for t in TRUTH], 0.001, "rank only", "0 of 10 intervals"),
        # Estimates are off by 0.1, 0.2, ... 1: five are within 1.6449 * 0.334 = 0.55, and no more
        # than five have a chance of 0.033; six, within 0.61, of 0.12.
        ([t * 1.1 for t in TRUTH], 0.334, "rank only", "5 of 10 intervals"),
        ([t * 1.1 for t in TRUTH], 0.371, "trust", "agree"),
    ],
)
def test_what_is_wrong_is_said(
    estimates: list[float], error: float | None, verdict: str, words: str
) -> None:
    found = judge(points(estimates, TRUTH, error), in_nats=True)
    assert found.verdict == verdict
    assert words in found.reason


def test_few_groups_tell_nothing() -> None:
    found = judge(points([1.0, 2.0], [1.0, 2.0]), in_nats=True)
    assert found.verdict == "do not trust"
    assert judge([], in_nats=True).rho is None


def test_the_digest_is_of_what_was_measured() -> None:
    measured = points([1.0, 2.0], [1.5, 2.5], 0.1)
    one = Audit(
        cell="wint8_afp16-small",
        pair="wint8_afp16",
        granularity="default",
        size="small",
        cell_digest="ab" * 32,
        method="fisher",
        mode="full",
        samples=16,
        points=tuple(measured),
        judgement=judge(measured, in_nats=True),
        seconds=1.0,
        device="cpu",
    )
    assert digest_of(one) == digest_of(one.model_copy(update={"seconds": 2.0, "digest": "x"}))
    for change in (
        {"cell_digest": "cd" * 32},
        {"samples": 15},
        {"points": tuple(points([1.0, 2.0], [1.5, 2.6], 0.1))},
        {"failures": {"2": "no finite truth"}},
    ):
        assert digest_of(one) != digest_of(one.model_copy(update=change))
