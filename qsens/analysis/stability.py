"""How sure a ranking is: within a size by the bootstrap over samples, and across sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import kendalltau, norm, spearmanr

from qsens.analysis.samples import Floats, SampleScores
from qsens.analysis.statistic import sample_weights
from qsens.schema.summary import Statistic, Verdict

CUTS = (5, 10, 20)
LEVEL = 0.95
RESAMPLES = 1000
_SEED = 0
_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Spread:
    """How far a group's score and position may be off, from the samples alone.

    Attributes:
        low: Lower end of the 95 % interval of the score.
        high: Its upper end.
        first: Upper end of the 95 % interval of the position: 1 is the most sensitive.
        last: Its lower end.
        needed: An estimate of how many samples would decide on which side of a cut it is, for
            each cut that its interval of the position crosses; none where the scores beside the
            cut are equal.
    """

    low: float
    high: float
    first: int
    last: int
    needed: dict[int, int | None]

    @property
    def verdict(self) -> Verdict:
        """Return ``stable`` where the interval of the position stays on one side of every cut."""
        return "undecided" if self.needed else "stable"

    @property
    def samples_needed(self) -> int | None:
        """Return an estimate of how many samples would make it stable; none where it is."""
        return _most(self.needed.values())


@dataclass(frozen=True)
class Settled:
    """Whether it is decided which groups come before a cut.

    Attributes:
        cut: The first groups are those at positions 1 to ``cut``.
        stable: Whether no group's interval of the position crosses the cut.
        undecided: How many groups' intervals do.
        samples_needed: An estimate of how many samples would settle it; none where it is settled,
            or where scores beside the cut are equal.
    """

    cut: int
    stable: bool
    undecided: int
    samples_needed: int | None


@dataclass(frozen=True)
class SizeAgreement:
    """How well two sizes agree on the ranking.

    Attributes:
        groups: Groups that both score.
        spearman: Spearman's rank correlation; none where it is not defined.
        kendall: Kendall's tau-b; none where it is not defined.
        overlap: How many of the first 5, 10, 20 groups are the same, for cuts below ``groups``.
    """

    groups: int
    spearman: float | None
    kendall: float | None
    overlap: dict[int, int]


def spread(
    samples: SampleScores,
    stated: Mapping[str, float],
    statistic: Statistic,
    batch_size: int | None = None,
) -> dict[str, Spread]:
    """Return the spread of every group in the statistic that places it.

    Args:
        samples: Scores of every sample.
        stated: The statistic of every scored group, by name, as the manifest has it.
        statistic: Which one that is.
        batch_size: Samples of a nominal batch, where the manifest says it.

    Returns:
        A spread a group; nothing where the samples do not give what is stated: no interval rather
        than that of another number.
    """
    if not stated or not set(stated) <= set(samples.groups):
        return {}
    scored = samples.take(list(stated))
    weights = sample_weights(scored, stated, statistic, batch_size)
    if weights is None:
        return {}
    return bootstrap(scored, None if statistic == "sensitivity_per_token" else weights)


def bootstrap(
    samples: SampleScores,
    weights: Floats | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = _SEED,
    cuts: Sequence[int] = CUTS,
) -> dict[str, Spread]:
    """Return the spread of every group, by resampling the samples with replacement.

    A resample has as many samples as there are. Its score per token is the ratio of two sums,
    ``sum_i s_i / sum_i T_i`` over the samples drawn. Its weighted sum, ``sum_i w_i s_i``, takes
    each sample with its own weight, that of the batch it was scored in, and is not normalised
    further: over as many samples as the score itself, its mean is the score, and whatever factor
    all groups of a resample share would move no position.

    All groups see the same resamples, so positions are those of whole rankings. Intervals are the
    2.5 % and 97.5 % percentiles; ends of scores are kept to 6 significant digits, well below what
    the number of resamples leaves open, so that they do not depend on the order of additions.

    Args:
        samples: Scores of every sample; two samples at least, else nothing is returned.
        weights: What each sample counts in a weighted sum; none for the score per token.
        resamples: How often to resample.
        seed: Seed of the resampling.
        cuts: Positions after which a list of groups to protect may end.

    Source: the percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap,
    chapter 13).
    """
    count = samples.count
    if count < 2 or not samples.groups or not samples.tokens.any():
        return {}
    # By name, so that equal scores are placed as `rank` places them.
    ordered = samples.take(sorted(samples.groups))
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
    terms = ordered.scores if weights is None else ordered.scores * weights
    # A resample of empty samples alone has scores of 0 as well.
    over = np.maximum(drawn @ ordered.tokens, 1) if weights is None else np.ones(resamples)
    chunk = max(1, _AT_ONCE // len(ordered.groups))
    # Single precision: sums in another order must not part equal scores.
    values = np.empty((resamples, len(ordered.groups)), dtype=np.float32)
    places = np.empty(values.shape, dtype=np.int32)
    scale = float(np.abs(terms).max(initial=0.0)) or 1.0
    for start in range(0, resamples, chunk):
        part = slice(start, start + chunk)
        means = (drawn[part] @ (terms.T / scale)) / over[part, None]
        values[part] = means
        places[part] = _positions(values[part])
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(values.astype(np.float64) * scale, [tail, 100 - tail], axis=0)
    first, last = np.percentile(places, [tail, 100 - tail], axis=0, method="inverted_cdf").astype(
        int
    )
    needed = _samples_needed(ordered, weights, cuts)
    spreads = {}
    for index, name in enumerate(ordered.groups):
        crossed = [cut for cut in cuts if first[index] <= cut < last[index]]
        spreads[name] = Spread(
            low=_short(low[index]),
            high=_short(high[index]),
            first=int(first[index]),
            last=int(last[index]),
            needed={cut: needed[cut][index] for cut in crossed},
        )
    return spreads


def settled(spreads: Mapping[str, Spread], cut: int) -> Settled:
    """Say whether the groups before ``cut``, one of those that ``bootstrap`` was given, are sure.

    Args:
        spreads: What ``bootstrap`` returns.
        cut: After which position the groups end.
    """
    crossing = [spread for spread in spreads.values() if cut in spread.needed]
    return Settled(
        cut=cut,
        stable=not crossing,
        undecided=len(crossing),
        samples_needed=_most(spread.needed[cut] for spread in crossing),
    )


def compare_sizes(one: Mapping[str, float], other: Mapping[str, float]) -> SizeAgreement:
    """Compare two rankings of the same model; only groups that both score count.

    Args:
        one: Scores by name of the group: per token, since sizes differ in their samples.
        other: The same at another size.
    """
    common = sorted(set(one) & set(other))
    a, b = [one[name] for name in common], [other[name] for name in common]
    overlap = {}
    for cut in CUTS:
        if cut < len(common):
            tops = [
                set(sorted(common, key=lambda name: (-scores[name], name))[:cut])
                for scores in (one, other)
            ]
            overlap[cut] = len(tops[0] & tops[1])
    defined = len(common) > 1 and len(set(a)) > 1 and len(set(b)) > 1
    return SizeAgreement(
        groups=len(common),
        spearman=float(spearmanr(a, b).statistic) if defined else None,
        kendall=float(kendalltau(a, b).statistic) if defined else None,
        overlap=overlap,
    )


def residuals(samples: SampleScores, weights: Floats | None = None) -> Floats:
    """Return what each sample adds to the error of each score, ``(groups, samples)``.

    The mean of a row is 0; its standard deviation over ``sqrt(n)`` is the standard error of the
    score. Per token it is ``(s_i - R T_i) / mean(T)`` with the score ``R``: the ratio estimator,
    linearised; for a weighted sum, ``n (w_i s_i - mean(w s))``.

    Args:
        samples: Scores of every sample.
        weights: What each sample counts in a weighted sum; none for the score per token.

    Source: Cochran, Sampling Techniques, section 2.11.
    """
    if weights is not None:
        terms = samples.scores * weights
        deviations: Floats = samples.count * (terms - terms.mean(axis=1, keepdims=True))
        return deviations
    score = samples.per_token()
    errors: Floats = (
        samples.scores - score[:, None] * samples.tokens[None, :]
    ) / samples.tokens.mean()
    return errors


def _samples_needed(
    samples: SampleScores, weights: Floats | None, cuts: Sequence[int]
) -> dict[int, list[int | None]]:
    """Estimate how many samples part each group from those beyond each cut.

    A difference ``d`` with the standard error ``e`` from ``n`` samples is clear of 0 from
    ``n (z e / d)^2`` samples on. Each group is compared with the nearest one beyond the cut.
    """
    score = samples.per_token() if weights is None else samples.scores @ weights
    errors = residuals(samples, weights)
    z = float(norm.ppf((1 + LEVEL) / 2))
    order = np.argsort(-score, kind="stable")
    needed: dict[int, list[int | None]] = {}
    for cut in cuts:
        answers: list[int | None] = [None] * len(score)
        if cut < len(score):
            for place, index in enumerate(order):
                beyond = order[cut] if place < cut else order[cut - 1]
                gap = float(abs(score[index] - score[beyond]))
                deviation = float((errors[index] - errors[beyond]).std(ddof=1))
                if gap > 0:
                    answers[int(index)] = math.ceil((z * deviation / gap) ** 2)
        needed[cut] = answers
    return needed


def _positions(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """Return the position of each column in each row, 1 the largest; ties in column order."""
    order = np.argsort(-values, axis=1, kind="stable")
    places = np.empty(order.shape, dtype=np.int32)
    np.put_along_axis(
        places, order, np.arange(1, values.shape[1] + 1, dtype=np.int32)[None, :], axis=1
    )
    return places


def _most(counts: Iterable[int | None]) -> int | None:
    """Return the largest count, none where one of them is not known."""
    answers = list(counts)
    known = [count for count in answers if count is not None]
    return max(known) if known and len(known) == len(answers) else None


def _short(value: float) -> float:
    return float(f"{value:.6g}")
