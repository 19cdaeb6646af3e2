"""Which score places groups, and what each sample counts in it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from qsens.analysis.samples import SampleScores
from qsens.analysis.stability import bootstrap, residuals
from qsens.analysis.statistic import compared_by, sample_weights, statistic_of, value_of


def row(sensitivity: float | None, per_token: float | None) -> SimpleNamespace:
    return SimpleNamespace(sensitivity=sensitivity, sensitivity_per_token=per_token)


def test_gradient_is_placed_by_modelopts_number_and_nats_by_the_token() -> None:
    whole, without = [row(2.0, 0.5), row(None, None)], [row(2.0, 0.5), row(1.0, None)]
    assert statistic_of("gradient", whole) == "sensitivity"
    for method in ("fisher", "kl_div"):
        assert statistic_of(method, whole) == "sensitivity_per_token"
        # The sum orders them alike where an older result holds nothing else.
        assert statistic_of(method, without) == "sensitivity"
    assert statistic_of("another", whole) == "sensitivity"
    assert value_of(whole[0], "sensitivity") == 2.0
    assert value_of(whole[0], "sensitivity_per_token") == 0.5


def test_sizes_are_compared_per_token_where_all_rows_have_it() -> None:
    whole, without = [row(2.0, 0.5), row(None, None)], [row(2.0, 0.5), row(1.0, None)]
    assert compared_by(whole, whole) == "sensitivity_per_token"
    assert compared_by(whole, without) == "sensitivity"
    assert compared_by() == "sensitivity"


def samples(count: int = 10) -> SampleScores:
    rng = np.random.default_rng(0)
    scores = rng.lognormal(size=(3, count))
    return SampleScores(("a", "b", "c"), scores, rng.integers(0, 30, count).astype(float))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 10, 64])
def test_the_batch_size_is_the_one_that_gives_what_is_stated(batch_size: int) -> None:
    found = samples()
    expected, stated = [], dict.fromkeys(found.groups, 0.0)
    for index in range(found.count):
        start = index // batch_size * batch_size
        batch = sum(found.tokens[start : start + batch_size]) or 1.0
        expected.append(1 / batch**2)
        for name, scores in zip(found.groups, found.scores, strict=True):
            stated[name] += scores[index] / batch**2
    for said in (None, batch_size):
        weights = sample_weights(found, stated, "sensitivity", said)
        assert weights == pytest.approx(expected, rel=1e-12)
    other = 5 if batch_size != 5 else 4
    assert sample_weights(found, stated, "sensitivity", other) is None
    for name in stated:
        wrong = stated | {name: stated[name] * (1 + 1e-6)}
        assert sample_weights(found, wrong, "sensitivity") is None


def test_samples_of_nats_must_give_the_nats_a_token() -> None:
    found = samples()
    stated = dict(zip(found.groups, found.per_token().tolist(), strict=True))
    weights = sample_weights(found, stated, "sensitivity_per_token")
    assert weights == pytest.approx([1 / found.tokens.sum()] * found.count)
    assert sample_weights(found, stated | {"b": 1.0}, "sensitivity_per_token") is None


def test_a_weighted_sum_is_resampled_as_the_sum_that_it_is() -> None:
    found, weights = samples(40), np.random.default_rng(1).lognormal(size=40)
    spread = bootstrap(found, weights, resamples=4000)
    for name, terms in zip(found.groups, found.scores * weights, strict=True):
        theirs = stats.bootstrap(
            (terms,), np.sum, n_resamples=4000, method="percentile", rng=np.random.default_rng(7)
        ).confidence_interval
        assert spread[name].low == pytest.approx(theirs.low, rel=0.03)
        assert spread[name].high == pytest.approx(theirs.high, rel=0.03)
        assert spread[name].low < terms.sum() < spread[name].high


def test_residuals_give_the_standard_error_of_a_weighted_sum() -> None:
    found = SampleScores(("a",), np.array([[1.0, 2.0, 6.0]]), np.ones(3))
    # Terms 4, 4, 6 with the mean 14 / 3: three times their distance from it.
    errors = residuals(found, np.array([4.0, 2.0, 1.0]))
    assert errors.tolist() == [pytest.approx([-2.0, -2.0, 4.0])]
    assert errors.std(ddof=1) / np.sqrt(3) == pytest.approx(3 * stats.sem([4.0, 4.0, 6.0]))
