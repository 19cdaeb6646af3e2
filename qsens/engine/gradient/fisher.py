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
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from qsens.checkpoint.groups import Group
from qsens.data.samples import Batch, Samples
from qsens.engine.activations import ModuleActivations, SavedForward
from qsens.engine.amax import Amax
from qsens.engine.candidates import Candidates
from qsens.engine.float32 import exact_products, is_narrow
from qsens.engine.gradient.buffers import (
    BufferLayout,
    RowRange,
    RowStatistics,
    SampleStatistics,
    layout_of,
    row_norms,
)
from qsens.engine.gradient.error_norms import RowSpan, score_products
from qsens.engine.gradient.experts import Mixture
from qsens.engine.gradient.scorer import GradientScorer, run
from qsens.engine.memory import Budget
from qsens.engine.scores import PassScores, Progress, silent

# Rows of the head's output that are held at once, in float64.
_HEAD_ROWS = 128


def estimate(
    model: nn.Module,
    samples: Samples,
    groups: Sequence[Group],
    candidates: Candidates,
    amax: Mapping[int, Amax] | None,
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
    covered = [group for group in groups if group.covered]
    scored = min(max(candidates.scored), len(samples))
    formats = budget.head_formats if budget else 1
    work = _FisherPass(model, covered, candidates, scored, formats, draws, seed)
    return run(work, samples, amax, boundaries, budget, batches, progress)


class _FisherPass(GradientScorer):
    """A pass with several draws of labels."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        candidates: Candidates,
        scored: int,
        head_formats: int,
        draws: int,
        seed: int,
    ) -> None:
        super().__init__(model, groups, candidates, scored, head_formats)
        self._draws, self._seed = draws, seed
        self._inner = torch.zeros(*self.scores.shape, draws, dtype=torch.float64)

    @property
    def exact(self) -> bool:
        return is_narrow(next(self.run.model.parameters()).dtype)

    def per_sample(self) -> torch.Tensor:
        return self.draws().mean(dim=-1)

    def draws(self) -> torch.Tensor:
        # What needs no draw stands in ``scores``: the head.
        return self._inner.square() / 2 + self.scores[..., None]

    def statistics(self, modules: int, layout: BufferLayout) -> RowStatistics:
        return RowStatistics(modules, layout, self.device, self._draws)

    def measure(
        self,
        changed: torch.Tensor,
        rows: ModuleActivations,
        spans: tuple[RowSpan, ...],
        statistics: RowStatistics,
        position: int,
    ) -> None:
        score_products(
            changed,
            rows.outputs,
            rows.grad_output,
            spans,
            errors=statistics.errors[position],
            scores=statistics.scores[:, position],
        )

    def alone(self, mixture: Mixture, found: torch.Tensor, count: int) -> torch.Tensor:
        inner = mixture.sums(found.T.contiguous(), count)
        return inner.square().mean(dim=-1) / 2

    def head(
        self, saved_forwards: Sequence[SavedForward]
    ) -> tuple[list[list[torch.Tensor]], list[SampleStatistics]]:
        """Estimate the head exactly to second order; return each draw's gradients at its input."""
        with exact_products() if self.exact else nullcontext():
            return self._head(saved_forwards)

    def _head(
        self, saved_forwards: Sequence[SavedForward]
    ) -> tuple[list[list[torch.Tensor]], list[SampleStatistics]]:
        head = self.run.head
        batches = [saved.batch for saved in saved_forwards]
        real = [batch.predicts() for batch in batches]
        rows = torch.cat(
            [saved.hidden.detach()[mask] for saved, mask in zip(saved_forwards, real, strict=True)]
        )
        layout = layout_of(batches, self.candidates, self.device, "predictions")
        labels = torch.cat(
            [_labels(batch)[mask] for batch, mask in zip(batches, real, strict=True)]
        )
        quantiles = torch.cat(
            [
                self._quantiles(index, length)
                for batch in batches
                for index, length in zip(batch.samples, batch.lengths("predictions"), strict=True)
            ]
        ).to(self.device)
        statistics = RowStatistics(1, layout, self.device)
        back = rows.new_empty(self._draws, *rows.shape)
        losses = torch.zeros(len(rows), dtype=torch.float64, device=self.device)
        scored: list[tuple[int, list[RowRange]]] = []
        if self.head_name is not None:
            scored = list(layout.row_ranges.items())
            stack = self.inputs.stack(self.head_name, rows, layout)
        for turn in range(0, max(1, len(scored)), self.head_formats):
            weights = [
                (self.weight(self.head_name or "", index, row_ranges), row_ranges)
                for index, row_ranges in scored[turn : turn + self.head_formats]
            ]
            for start in range(0, len(rows), _HEAD_ROWS):
                at = slice(start, min(start + _HEAD_ROWS, len(rows)))
                logits = F.linear(rows[at], head.weight, head.bias)
                log_p = torch.log_softmax(logits.double(), dim=-1)
                p = log_p.exp()
                if turn == 0:
                    picked = labels[at].clamp_min(0)[:, None]
                    losses[at] = -log_p.gather(1, picked)[:, 0] * (labels[at] >= 0)
                    drawn = _draw(p, quantiles[at])
                    # The gradient of log p(y) at the input: the label's weight, less the mean one.
                    mean = p.to(rows.dtype) @ head.weight
                    back[:, at] = (head.weight[drawn] - mean[:, None]).movedim(1, 0)
                    statistics.norms[0, at] = row_norms(logits)
                for weight, row_ranges in weights:
                    if weight is None:
                        continue
                    for row_range in row_ranges:
                        length = min(at.stop, row_range.count) - start
                        if length <= 0:
                            continue
                        first = stack.starts[row_range.input] + start
                        given = stack.rows[first : first + length]
                        change = F.linear(given, weight, head.bias).sub_(logits[:length])
                        into = slice(row_range.start + start, row_range.start + start + length)
                        statistics.errors[0, into] = row_norms(change)
                        statistics.scores[0, into] = _half_variance(
                            change.double(), p[:length]
                        ).sqrt()
        self.loss[list(layout.order)] = F.pad(losses, (0, 1))[layout.own].sum(dim=-1).cpu()
        gradients = []
        for saved, mask, part in zip(
            saved_forwards,
            real,
            torch.split(back, [int(mask.sum()) for mask in real], dim=1),
            strict=True,
        ):
            each = []
            for drawn_part in part:
                gradient = torch.zeros_like(saved.hidden)
                gradient[mask] = drawn_part
                each.append(gradient)
            gradients.append(each)
        return gradients, [statistics.sums([self.head_name])] if self.head_name is not None else []

    def book(self, found: Sequence[SampleStatistics], order: list[int]) -> None:
        exact = [sums for sums in found if sums.scores.ndim == 3]
        if exact:
            super().book(exact, order)
        drawn = [sums for sums in found if sums.scores.ndim == 4]
        names = [name for sums in drawn for name in sums.names]
        self.seen.update(names)
        groups = torch.tensor([self.group_of[name] for name in names])
        for total, tables, at in (
            (self._inner, [sums.scores for sums in drawn], (..., order, slice(None))),
            (self.errors, [sums.errors for sums in drawn], (..., order)),
            (self.norms, [sums.norms for sums in drawn], (..., order)),
        ):
            table = torch.cat(tables).cpu()
            added = table.new_zeros(len(total), *table.shape[1:]).index_add_(0, groups, table)
            total[at] += added

    def _quantiles(self, sample: int, length: int) -> torch.Tensor:
        """Return where in its distribution each position's labels lie, ``(length, draws)``.

        One in every ``1 / draws`` of the distribution, in an order of its own at each position.
        """
        generator = np.random.default_rng([self._seed, sample])
        strata = generator.permuted(np.tile(np.arange(self._draws), (length, 1)), axis=1)
        return torch.from_numpy((strata + generator.random((length, self._draws))) / self._draws)


def _draw(p: torch.Tensor, quantiles: torch.Tensor) -> torch.Tensor:
    """Return the labels at ``quantiles`` of each row's distribution, ``(rows, draws)``."""
    cumulated = p.cumsum(dim=-1)
    cumulated /= cumulated[:, -1:].clone()
    return torch.searchsorted(cumulated, quantiles, right=True).clamp_(max=p.shape[1] - 1)


def _half_variance(change: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return ``1/2 d^T (diag(p) - p p^T) d`` of each row."""
    centred = change - (p * change).sum(dim=-1, keepdim=True)
    return (p * centred.square()).sum(dim=-1) / 2


def _labels(batch: Batch) -> torch.Tensor:
    """Return the next token of every position, -1 where there is none."""
    labels = torch.full_like(batch.input_ids, -1)
    labels[:, :-1] = batch.input_ids[:, 1:].masked_fill(~batch.label_mask(), -1)
    return labels
