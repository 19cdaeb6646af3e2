from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from qsens.analysis.drift import Change, changes, moved
from qsens.analysis.samples import SampleScores

NIGHTS = 200


def samples(scores: object) -> SampleScores:
    array = np.asarray(scores, dtype=float)
    names = tuple(f"g{index:03d}" for index in range(len(array)))
    return SampleScores(names, array, np.ones(array.shape[1]))


def night(rng: np.random.Generator, groups: int, count: int, factor: object = 1.0) -> SampleScores:
    """Return scores as real ones are: skewed, of many sizes, with samples that are hard for all."""
    hardness = rng.lognormal(sigma=0.8, size=count)
    own = rng.lognormal(sigma=0.8, size=(groups, count))
    return samples(np.logspace(0, -4, groups)[:, None] * np.asarray(factor) * hardness * own)


def test_paired_and_unpaired_tests_are_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(size=(3, 20)), rng.lognormal(size=(3, 20)) * 1.5
    paired, unpaired = changes(samples(a), samples(b), paired=True), None
    unpaired = changes(samples(a), samples(b), paired=False)
    for index, name in enumerate(("g000", "g001", "g002")):
        test = stats.ttest_rel(b[index], a[index])
        assert paired[name].p_value == pytest.approx(test.pvalue)
        interval = test.confidence_interval(0.95)
        assert paired[name].half_width == pytest.approx((interval.high - interval.low) / 2)
        assert paired[name].change == pytest.approx(b[index].mean() - a[index].mean())
        test = stats.ttest_ind(b[index], a[index], equal_var=False)
        assert unpaired[name].p_value == pytest.approx(test.pvalue)


@pytest.mark.parametrize("count", [16, 128])
def test_an_unchanged_model_is_silent_on_nearly_all_nights(count: int) -> None:
    rng = np.random.default_rng(count)
    loud = sum(
        bool(moved(changes(night(rng, 145, count), night(rng, 145, count), paired=False)))
        for _ in range(NIGHTS)
    )
    assert loud <= NIGHTS * 0.05


def test_the_same_samples_on_another_machine_are_silent() -> None:
    rng = np.random.default_rng(5)
    for _ in range(NIGHTS):
        before = night(rng, 145, 128)
        # Far beyond chance, and far below what matters: all of it 0.1 % larger.
        noise = 1.001 + rng.normal(scale=1e-6, size=before.scores.shape)
        after = samples(before.scores * noise)
        assert moved(changes(before, after, paired=True)) == {}


def test_a_group_that_moved_is_named_alone() -> None:
    rng = np.random.default_rng(2)
    factor = np.ones((145, 1))
    factor[7] = 4.0
    before = night(rng, 145, 128)
    paired = moved(changes(before, samples(before.scores * factor), paired=True))
    assert list(paired) == ["g007"]
    assert paired["g007"].relative == pytest.approx(3.0)
    unpaired = moved(changes(before, night(rng, 145, 128, factor), paired=False))
    assert list(unpaired) == ["g007"]
    assert unpaired["g007"].change > unpaired["g007"].half_width


def test_false_alarms_are_controlled_over_all_groups_together() -> None:
    # Benjamini-Hochberg at 1 %: sorted p below 0.01 k / m; alone, 0.004 would do, of 3 it needs
    # 0.0033 at the first place, and 0.0066 at the second.
    def change(p_value: float) -> Change:
        return Change(before=1.0, after=2.0, half_width=0.5, p_value=p_value)

    assert moved({"a": change(0.004)}) != {}
    assert moved({"a": change(0.004), "b": change(0.5), "c": change(0.6)}) == {}
    found = moved({"a": change(0.004), "b": change(0.005), "c": change(0.6)})
    assert set(found) == {"a", "b"}
    assert moved({}) == {}


def test_no_change_without_noise_is_no_change() -> None:
    flat = samples(np.ones((2, 8)))
    assert moved(changes(flat, flat, paired=True)) == {}
    assert moved(changes(flat, flat, paired=False)) == {}
    assert list(moved(changes(flat, samples(2 * np.ones((2, 8))), paired=True))) == ["g000", "g001"]
    assert changes(samples(np.ones((2, 1))), samples(np.ones((2, 1))), paired=True) == {}
