"""Scores held against audits, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from qsens.recipes.format_choices import build_decision_groups
from qsens.recipes.score_correction import CorrectedScores, correct
from qsens.schema.audit import Audit, Judgement, Point, Verdict
from qsens.schema.summary import Row


def rows(*scores: float | None) -> list[Row]:
    return [
        Row.model_validate(
            {
                "layer": f"layers.{at}.down_proj",
                "members": (f"layers.{at}.down_proj",),
                "kind": "down",
                "depth": at,
                "status": "failed" if score is None else "scored",
                "num_bits": 8.0,
                "sensitivity": score,
                "sensitivity_per_token": score,
                "size_cost": 1.0,
                "position": None if score is None else at + 1,
                "share": None,
            }
        )
        for at, score in enumerate(scores)
    ]


def audit(verdict: Verdict, ratio: float | None, **more: Any) -> Audit:
    values = {
        "digest": "d" * 64,
        "cell": "a-small",
        "pair": "a",
        "granularity": "default",
        "size": "small",
        "cell_digest": "small",
        "method": "fisher",
        "mode": "sample",
        "samples": 16,
        "points": points(*[1.25] * 6),
        "judgement": Judgement(
            verdict=verdict,
            reason="why",
            rho=None,
            ratio=ratio,
            ratio_10=None,
            ratio_90=None,
            covered=None,
        ),
        "seconds": 1.0,
        "device": "cpu",
    }
    return Audit.model_validate({**values, **more})


def points(*truths: float) -> tuple[Point, ...]:
    return tuple(
        Point(
            layer=f"layers.{at}.down_proj",
            kind="down",
            estimate=1.0,
            standard_error=None,
            truth=truth,
        )
        for at, truth in enumerate(truths)
    )


def corrected(found: Audit | None, digest: str = "medium") -> CorrectedScores:
    return correct({"a": rows(0.4, None, 0.1)}, {"a": found} if found else {}, {"a": digest})


def scores(found: CorrectedScores) -> list[float | None]:
    return [row.sensitivity_per_token for row in found.rows["a"]]


def test_without_an_audit_scores_stay_as_they_are() -> None:
    found = corrected(None)
    assert scores(found) == [0.4, None, 0.1]
    assert found.corrections["a"].model_dump() == {
        "source": "estimates",
        "verdict": None,
        "ratio": None,
        "audit": None,
    }


@pytest.mark.parametrize("verdict", ["trust", "rank only"])
def test_estimates_are_divided_by_their_ratio(verdict: Verdict) -> None:
    found = corrected(audit(verdict, 0.8))
    # Estimates are 0.8 of the truth: 0.4 stands for 0.5, 0.1 for 0.125.
    assert scores(found) == [pytest.approx(0.5), None, pytest.approx(0.125)]
    assert found.corrections["a"].model_dump() == {
        "source": "corrected estimates",
        "verdict": verdict,
        "ratio": 0.8,
        "audit": "d" * 64,
    }


def test_but_not_where_that_may_be_chance() -> None:
    # Estimates are 1. Of 6 groups 5 above the truth have a chance of 14/64, and 6 one of 2/64.
    five = audit("trust", 1.1, points=points(0.9, 0.9, 0.9, 0.9, 0.9, 1.1))
    assert scores(corrected(five)) == [0.4, None, 0.1]
    assert corrected(five).corrections["a"].model_dump(exclude={"audit"}) == {
        "source": "estimates",
        "verdict": "trust",
        "ratio": None,
    }
    # Where a group has no divergence at all, there is no ratio.
    six = audit("trust", 1.1, points=points(0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.0))
    assert corrected(six).corrections["a"].ratio == 1.1


def test_a_proxy_has_no_ratio() -> None:
    found = corrected(audit("rank only", None, method="gradient"))
    assert scores(found) == [0.4, None, 0.1]
    assert found.corrections["a"].verdict == "rank only"


def test_what_is_not_to_be_trusted_is_no_option() -> None:
    found = corrected(audit("do not trust", 0.3))
    assert found.rows == found.corrections == {}
    assert found.refused == {"a": "its scores are not to be trusted: why"}
    # A proxy is no estimate of what was measured, even of all groups.
    proxy = audit("do not trust", None, method="gradient", mode="full", points=points(1, 2, 3))
    assert "a" in corrected(proxy).refused


def test_or_is_priced_by_its_measured_truth() -> None:
    # The second group has no score, so no format; the third one's truth could not be measured.
    found = corrected(audit("do not trust", 0.3, mode="full", points=points(2.0, 3.0)))
    assert scores(found) == [2.0, None, None]
    assert found.corrections["a"].source == "true divergences"
    assert found.corrections["a"].ratio is None
    # An unknown score is no option, and the others keep their unit.
    decisions = build_decision_groups(found.rows, "sensitivity_per_token")
    assert [[choice.score for choice in decision.choices] for decision in decisions] == [
        [0, 2.0],
        [0],
        [0],
    ]


def test_truths_of_the_very_cell_are_better_than_its_estimates() -> None:
    full = audit("trust", 0.8, mode="full", points=points(2.0, 3.0, 0.5, *[1.25] * 6))
    assert scores(corrected(full, digest="small")) == [2.0, None, 0.5]
    # Of another size, with fewer samples, they are not.
    assert scores(corrected(full)) == [pytest.approx(0.5), None, pytest.approx(0.125)]
