"""The floor under a pass: the matrix products that no way of scoring can do without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Floating-point operations of matrix products with weights; attention's own are left out.

    Attributes:
        calibrate: One forward pass over the calibration samples, without the head.
        forward: One forward pass over the scored samples.
        backward: Gradients of inputs over the scored samples; weights have none.
        candidates: One product a candidate and module, over the samples that it scores.
    """

    calibrate: int
    forward: int
    backward: int
    candidates: int

    @property
    def total(self) -> int:
        """Return the operations of all parts."""
        return self.calibrate + self.forward + self.backward + self.candidates


def count_work(
    lengths: Sequence[int],
    *,
    weights: int,
    head: int,
    calibrated: int,
    scored: Sequence[int],
) -> Work:
    """Count the operations of a pass: 2 for every weight and row that it meets.

    A layer meets every real token. The head meets the tokens that predict a label, all but the
    last of a sample, and is not run for calibration. Nothing is padded, and nothing is computed
    twice, whatever an engine does.

    Args:
        lengths: Tokens of each sample.
        weights: Weights of the scored layers, without the head.
        head: Weights of the head.
        calibrated: Samples that calibration runs over; 0 where none is needed.
        scored: Samples that each candidate scores, from the first.
    """

    def products(count: int) -> int:
        tokens = sum(lengths[:count])
        labels = sum(max(0, length - 1) for length in lengths[:count])
        return 2 * (weights * tokens + head * labels)

    once = products(max(scored))
    return Work(
        calibrate=2 * weights * sum(lengths[:calibrated]),
        forward=once,
        backward=once,
        candidates=sum(products(count) for count in scored),
    )
