"""Method ``fisher``: the KL divergence of a quantized group, from gradients. Needs torch.

For a small change ``d`` of a position's logits, ``KL(p || q) ~ 1/2 d^T F d`` with the Fisher
information ``F = E_y[g g^T]``, where ``g = one_hot(y) - p`` is the gradient of ``log p(y)`` and the
label ``y`` is drawn from the model's own distribution ``p`` (Martens, New insights and perspectives
on the natural gradient method, JMLR 21, 2020). To first order ``g^T d`` is the inner product
``<G, dY>`` of the gradient at a module's output and the change of that output. Labels of different
positions are drawn apart, so products of two positions vanish in the mean, and for a whole sample

    ``KL ~ 1/2 E_y[ (sum over members, tokens and channels of G * dY)^2 ]``.

Every draw costs a backward pass; outputs are changed once for all draws. The draws of a position
are stratified: a label of probability ``p`` is drawn ``p * draws`` times, up to one. For the head
no draw is needed: ``1/2 d^T F d`` is half the variance of ``d`` under ``p``.

Quantized inputs, outputs and their changes are float32 whatever the model's data type is: what is
estimated has no rounding in it, see :mod:`qsens.engine.float32`. Gradients are those of the model
as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from qsens.checkpoint.groups import Group
from qsens.data.samples import Batch, Samples
from qsens.engine.amax import Amax
from qsens.engine.candidates import CalibrationSize, Candidates
from qsens.engine.float32 import is_narrow
from qsens.engine.gradient.heads import DrawnHead
from qsens.engine.gradient.metrics import FisherProduct
from qsens.engine.gradient.scorer import score
from qsens.engine.memory import Budget
from qsens.engine.scores import PassScores, Progress, silent


def estimate(
    model: nn.Module,
    samples: Samples,
    groups: Sequence[Group],
    candidates: Candidates,
    amax: Mapping[CalibrationSize, Amax] | None,
    *,
    draws: int,
    seed: int,
    boundaries: Sequence[int] = (),
    budget: Budget | None = None,
    batches: Sequence[Batch] | None = None,
    progress: Progress = silent,
) -> PassScores:
    """Estimate ``KL(p || q)`` of every candidate on every covered group, in nats.

    Divergences are summed over all real tokens of a sample, as in method ``kl_div``.

    Args:
        draws: Draws of labels.
        seed: Seed of the draws; those of a sample depend on the seed and its index alone.

    The other arguments are those of :func:`qsens.engine.gradient.scorer.score`.
    """
    exact = is_narrow(next(model.parameters()).dtype)
    return score(
        model,
        samples,
        groups,
        candidates,
        amax,
        boundaries=boundaries,
        budget=budget,
        batches=batches,
        progress=progress,
        metric=FisherProduct(draws, exact),
        head=DrawnHead(draws, seed, exact=exact),
    )
