"""The one statistic by which a method places groups, and what each sample counts in it.

Position, share, interval, verdict, protection, audit and recipe of a cell all follow it. Sizes and
nights are compared by the score per token whatever the method, since a sum grows with its samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from qsens.analysis.samples import Floats, SampleScores
from qsens.schema.summary import Statistic

# Sums of a few hundred doubles in another order differ by less.
_SAME = 1e-9


class Scored(Protocol):
    """What has a score: a row of a report, or of a manifest."""

    @property
    def sensitivity(self) -> float | None:
        """Return the sum over samples."""

    @property
    def sensitivity_per_token(self) -> float | None:
        """Return the same per token."""


def statistic_of(method: str, rows: Iterable[Scored]) -> Statistic:
    """Return the score that places groups.

    With ``gradient`` it is ``sensitivity = sum_i s_i / T_b(i)^2``, ModelOpt's number. With
    ``fisher`` and ``kl_div`` it is nats a token; the sum gives the same order there, and stands in
    where an older result does not hold the other.

    Args:
        method: The score's method.
        rows: The rows that are placed or compared; those without a score do not matter.
    """
    return compared_by(rows) if method in ("fisher", "kl_div") else "sensitivity"


def compared_by(*cells: Iterable[Scored]) -> Statistic:
    """Return the score that sizes, nights and other batches are compared by.

    It is the one per token where every row with a score has it, whatever the method.
    """
    values = [
        row.sensitivity_per_token for rows in cells for row in rows if row.sensitivity is not None
    ]
    return "sensitivity_per_token" if values and None not in values else "sensitivity"


def value_of(row: Scored, statistic: Statistic) -> float | None:
    """Return a row's score; none where it has none."""
    return row.sensitivity if statistic == "sensitivity" else row.sensitivity_per_token


def sample_weights(
    samples: SampleScores,
    stated: Mapping[str, float],
    statistic: Statistic,
    batch_size: int | None = None,
) -> Floats | None:
    """Return what each sample's score counts, so that ``scores @ weights`` is what is stated.

    That is ``1 / T_b(i)^2`` for ``sensitivity``, with the label tokens of the nominal batch, and
    ``1 / sum_i T_i`` for ``sensitivity_per_token``. Of results that do not say their batch size, it
    is the one that gives what they state.

    Args:
        samples: Scores of every sample, of the groups of ``stated``.
        stated: The statistic of each group, by name, as the manifest has it.
        statistic: Which one that is.
        batch_size: Samples of a nominal batch; looked for when not given.

    Returns:
        ``(samples,)``, float64; none where the samples do not give what is stated: then they are
        not those that it was computed from, and say nothing about it.
    """
    target = np.array([stated[name] for name in samples.groups])
    if statistic == "sensitivity_per_token":
        total = max(float(samples.tokens.sum()), 1.0)
        tried: Iterable[Floats] = [np.full(samples.count, 1 / total)]
    else:
        sizes = range(1, samples.count + 1) if batch_size is None else [batch_size]
        tried = (_batch_weights(samples.tokens, size) for size in sizes)
    for weights in tried:
        if np.allclose(samples.scores @ weights, target, rtol=_SAME, atol=0):
            return weights
    return None


def _batch_weights(tokens: Floats, batch_size: int) -> Floats:
    """Return ``1 / T_b(i)^2``: nominal batches are consecutive samples, in file order."""
    batch = np.arange(len(tokens)) // batch_size
    totals = np.maximum(np.bincount(batch, weights=tokens), 1)
    weights: Floats = totals[batch] ** -2.0
    return weights
