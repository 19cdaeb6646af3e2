from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from qsens.analysis.samples import SampleScores
from qsens.analysis.stability import Settled, bootstrap, compare_sizes, residuals, settled


def samples(scores: object, tokens: object = None) -> SampleScores:
    array = np.asarray(scores, dtype=float)
    names = tuple(f"g{index:02d}" for index in range(len(array)))
    ones = np.ones(array.shape[1]) if tokens is None else np.asarray(tokens, dtype=float)
    return SampleScores(names, array, ones)


def test_intervals_are_those_of_scipys_bootstrap() -> None:
    values = np.random.default_rng(1).lognormal(size=(2, 200))
    found = bootstrap(samples(values), resamples=4000)
    for name, row in zip(("g00", "g01"), values, strict=True):
        theirs = stats.bootstrap(
            (row,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(7)
        ).confidence_interval
        assert found[name].low == pytest.approx(theirs.low, rel=0.02)
        assert found[name].high == pytest.approx(theirs.high, rel=0.02)


def test_scores_are_per_token() -> None:
    # Every sample has a score of 3 a token: nothing is uncertain, whatever the lengths.
    tokens = np.array([1.0, 5.0, 2.0, 9.0])
    spread = bootstrap(samples([3 * tokens], tokens))["g00"]
    assert (spread.low, spread.high) == (3.0, 3.0)
    assert (spread.first, spread.last, spread.verdict) == (1, 1, "stable")


def test_positions_that_samples_agree_on_are_stable_and_others_undecided() -> None:
    rng = np.random.default_rng(0)
    clear = [np.full(64, 100.0 - index) + rng.normal(size=64) * 1e-3 for index in range(5)]
    # The sixth and seventh are the same on average, and noisy; nothing else is near.
    noisy = [10 + rng.normal(size=64), 10 + rng.normal(size=64), np.full(64, 1.0)]
    found = bootstrap(samples(clear + noisy), cuts=(6,))
    assert [found[f"g{i:02d}"].verdict for i in range(8)] == [
        *["stable"] * 5,
        "undecided",
        "undecided",
        "stable",
    ]
    assert (found["g00"].first, found["g00"].last) == (1, 1)
    assert (found["g05"].first, found["g05"].last) == (6, 7)
    assert found["g00"].samples_needed is None
    # Clear of the cut, order within a side does not matter.
    assert {spread.verdict for spread in bootstrap(samples(clear + noisy), cuts=(7,)).values()} == {
        "stable"
    }


def test_samples_needed_follow_the_square_root_law() -> None:
    # g00 - g01 is +1 or -0.8, half each: mean 0.1, standard deviation 0.9 sqrt(n / (n - 1)).
    n = 100
    one = np.where(np.arange(n) % 2, 1.0, 0.0)
    other = np.where(np.arange(n) % 2, 0.0, 0.8)
    found = bootstrap(samples([one, other]), cuts=(1,))
    assert found["g00"].verdict == found["g01"].verdict == "undecided"
    expected = int(np.ceil((stats.norm.ppf(0.975) * 0.9 / 0.1) ** 2 * n / (n - 1)))
    assert found["g00"].samples_needed == found["g01"].samples_needed == expected == 315
    assert settled(found, 1) == Settled(1, False, 2, 315)
    assert settled(bootstrap(samples([one + 9, other]), cuts=(1,)), 1) == Settled(1, True, 0, None)


def test_equal_scores_are_never_parted_and_no_number_of_samples_is_claimed() -> None:
    row = np.random.default_rng(3).lognormal(size=40)
    found = bootstrap(samples([row, row]), cuts=(1,))
    # Equal in every resample: the order of names decides, always alike.
    assert (found["g00"].first, found["g00"].last) == (1, 1)
    assert (found["g01"].first, found["g01"].last) == (2, 2)
    mirrored = bootstrap(samples([np.tile([0.0, 1.0], 20), np.tile([1.0, 0.0], 20)]), cuts=(1,))
    assert mirrored["g00"].verdict == "undecided"
    assert mirrored["g00"].samples_needed is None


def test_a_seed_gives_the_same_and_too_little_gives_nothing() -> None:
    values = np.random.default_rng(1).lognormal(size=(6, 30))
    assert bootstrap(samples(values)) == bootstrap(samples(values))
    assert bootstrap(samples(values[:, :1])) == {}
    assert bootstrap(samples(values, np.zeros(30))) == {}


def test_residuals_give_the_standard_error_of_a_mean() -> None:
    row = np.array([1.0, 2.0, 6.0])
    found = residuals(samples([row]))
    assert found.tolist() == [[-2.0, -1.0, 3.0]]
    assert found.std(ddof=1) / np.sqrt(3) == pytest.approx(stats.sem(row))


def test_sizes_are_compared_by_rank() -> None:
    # Ranks 1 2 3 4 and 2 1 3 4: rho = 1 - 6 * 2 / 60, tau = (5 - 1) / 6.
    one = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0, "only": 9.0}
    other = {"a": 30.0, "b": 40.0, "c": 20.0, "d": 10.0}
    found = compare_sizes(one, other)
    assert found.groups == 4
    assert found.spearman == pytest.approx(0.8)
    assert found.kendall == pytest.approx(2 / 3)
    assert found.overlap == {}
    many = {f"g{index}": float(index) for index in range(8)}
    # The first five are 7 6 5 4 3 against 0 1 2 3 4.
    assert compare_sizes(many, {name: -value for name, value in many.items()}).overlap == {5: 2}
    assert compare_sizes({"a": 1.0}, {"a": 2.0}).spearman is None
    assert compare_sizes({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 2.0}).kendall is None
