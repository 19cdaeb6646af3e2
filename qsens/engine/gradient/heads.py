"""The head: scored in chunks of rows, where the gradients start that go backward. Needs torch.

A vocabulary-sized row a token is most of what a naive pass holds: logits are made a chunk of rows
at a time, once for as many weight formats as are held at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from qsens.data.samples import Unit
from qsens.engine import cross_entropy
from qsens.engine.activations import SavedForward
from qsens.engine.candidates import Candidates
from qsens.engine.cross_entropy import next_tokens
from qsens.engine.float32 import exact_products
from qsens.engine.gradient.buffers import (
    BufferLayout,
    RowRange,
    RowStatistics,
    SampleStatistics,
    layout_of,
    row_norms,
)
from qsens.engine.gradient.error_norms import RowSpan, score_norms
from qsens.engine.gradient.half_variance import half_variance
from qsens.engine.gradient.quantized_inputs import InputQuantizer
from qsens.engine.head import HEAD_ROWS, Head

# Rows of the head's output that are held at once in float64.
_DOUBLE_ROWS = 128

QuantizedWeight = Callable[[str, int, Sequence[RowRange]], torch.Tensor | None]
"""Returns a module's weight in a format, given who reads it; none where that fails."""


@dataclass(frozen=True)
class ScoredHead:
    """The head of a pass.

    Attributes:
        head: The head.
        name: Its name where it is scored; none where it is left alone.
        candidates: What is computed.
        inputs: Quantizes what it reads.
        weight: Quantizes its weight.
        formats: Weight formats that are held at once.
    """

    head: Head
    name: str | None
    candidates: Candidates
    inputs: InputQuantizer
    weight: QuantizedWeight
    formats: int

    def turns(
        self, layout: BufferLayout
    ) -> Iterator[Sequence[tuple[torch.Tensor, Sequence[RowRange]]]]:
        """Yield the quantized weights that are held at once, with who reads them; at least once."""
        formats = list(layout.row_ranges.items()) if self.name is not None else []
        for turn in range(0, max(1, len(formats)), self.formats):
            held = []
            for index, row_ranges in formats[turn : turn + self.formats]:
                weight = self.weight(self.name or "", index, row_ranges)
                if weight is not None:
                    held.append((weight, row_ranges))
            yield held


@dataclass(frozen=True)
class HeadScores:
    """What the head gave for a window.

    Attributes:
        gradients: At the head's input, by batch and loss, ``(samples, longest, hidden)``.
        loss: Summed loss of each sample, in the order of the window's samples, float64.
        statistics: What was found of the head; none where it is not scored.
    """

    gradients: list[list[torch.Tensor]]
    loss: torch.Tensor
    statistics: SampleStatistics | None


class HeadScorer(Protocol):
    """Scores the head and says what goes backward."""

    def __call__(self, scored: ScoredHead, saved_forwards: Sequence[SavedForward]) -> HeadScores:
        """Score the head over the batches of a window."""
        ...


class LabelHead:
    """The samples' own labels: the cross-entropy's gradient is ``softmax - one_hot``."""

    def __call__(self, scored: ScoredHead, saved_forwards: Sequence[SavedForward]) -> HeadScores:
        """See :class:`HeadScorer`."""
        head = scored.head
        labels = [next_tokens(saved.batch) for saved in saved_forwards]
        masks = [each >= 0 for each in labels]
        window = _Window(scored, saved_forwards, labels, masks, "labels")
        rows, statistics = window.rows, window.statistics
        back = torch.empty_like(rows)
        for turn, weights in enumerate(scored.turns(window.layout)):
            for at in _chunks(len(rows), HEAD_ROWS):
                outputs = head.product(rows[at])
                logits = head.logits(outputs)
                grad_output, lost = cross_entropy.with_gradient(logits, window.labels[at])
                grad_output = _times(grad_output, head.logits.derivative(logits))
                if turn == 0:
                    window.losses[at] = lost
                    back[at] = grad_output @ head.module.weight
                    statistics.norms[0, at] = row_norms(outputs)
                for weight, row_ranges in weights:
                    _score_chunk(head, weight, row_ranges, window, at, outputs, grad_output)
        return window.scores(back[None])


class DrawnHead:
    """Labels drawn from the model's own distribution, stratified; the head itself needs no draw.

    For the head ``1/2 d^T F d`` is half the variance of ``d`` under ``p``: exact to second order.

    Args:
        draws: Draws of labels.
        seed: Seed of the draws; those of a sample depend on the seed and its index alone.
        exact: Whether everything behind the weights is float32.
    """

    def __init__(self, draws: int, seed: int, *, exact: bool) -> None:
        self._draws, self._seed, self._exact = draws, seed, exact

    def __call__(self, scored: ScoredHead, saved_forwards: Sequence[SavedForward]) -> HeadScores:
        """See :class:`HeadScorer`."""
        with exact_products() if self._exact else nullcontext():
            return self._score(scored, saved_forwards)

    def _score(self, scored: ScoredHead, saved_forwards: Sequence[SavedForward]) -> HeadScores:
        head, matrix = scored.head, scored.head.module.weight
        batches = [saved.batch for saved in saved_forwards]
        masks = [batch.predicts() for batch in batches]
        labels = [next_tokens(batch) for batch in batches]
        window = _Window(scored, saved_forwards, labels, masks, "predictions")
        rows, statistics = window.rows, window.statistics
        quantiles = torch.cat(
            [
                self._quantiles(index, length)
                for batch in batches
                for index, length in zip(batch.samples, batch.lengths("predictions"), strict=True)
            ]
        ).to(rows.device)
        back = rows.new_empty(self._draws, *rows.shape)
        for turn, weights in enumerate(scored.turns(window.layout)):
            for at in _chunks(len(rows), _DOUBLE_ROWS):
                outputs = head.product(rows[at])
                logits = head.logits(outputs)
                log_p = torch.log_softmax(logits.double(), dim=-1)
                p = log_p.exp()
                if turn == 0:
                    window.losses[at] = cross_entropy.negative_log_likelihood(
                        log_p, window.labels[at]
                    )
                    drawn = _draw(p, quantiles[at])
                    # The gradient of log p(y) at the input: the label's weight, less the mean one.
                    slope = head.logits.derivative(logits)
                    mean = _times(p, slope).to(rows.dtype) @ matrix
                    back[:, at] = (_rows_of(matrix, drawn, slope) - mean[:, None]).movedim(1, 0)
                    statistics.norms[0, at] = row_norms(outputs)
                for weight, row_ranges in weights:
                    assert window.inputs is not None
                    for row_range in row_ranges:
                        length = min(at.stop, row_range.count) - at.start
                        if length <= 0:
                            continue
                        first = window.inputs.starts[row_range.input] + at.start
                        given = window.inputs.rows[first : first + length]
                        changed = head.product(given, weight)
                        start = row_range.start + at.start
                        into = slice(start, start + length)
                        statistics.errors[0, into] = row_norms(changed - outputs[:length])
                        change = head.logits(changed).sub_(logits[:length])
                        statistics.scores[0, into] = half_variance(change, p[:length]).sqrt()
        return window.scores(back)

    def _quantiles(self, sample: int, length: int) -> torch.Tensor:
        """Return where in its distribution each position's labels lie, ``(length, draws)``.

        One in every ``1 / draws`` of the distribution, in an order of its own at each position.
        """
        generator = np.random.default_rng([self._seed, sample])
        strata = generator.permuted(np.tile(np.arange(self._draws), (length, 1)), axis=1)
        return torch.from_numpy((strata + generator.random((length, self._draws))) / self._draws)


def _times(x: torch.Tensor, slope: torch.Tensor | float) -> torch.Tensor:
    """Return ``x`` times a derivative, in the data type of ``x``."""
    return x if isinstance(slope, float) and slope == 1.0 else (x * slope).to(x.dtype)


def _rows_of(
    matrix: torch.Tensor, drawn: torch.Tensor, slope: torch.Tensor | float
) -> torch.Tensor:
    """Return the rows of the head's weight of drawn labels, each times its logit's derivative.

    Args:
        matrix: The weight, ``(vocabulary, hidden)``.
        drawn: Labels, ``(rows, draws)``.
        slope: The derivative of every logit, ``(rows, vocabulary)``, or of all.
    """
    of_drawn = slope if isinstance(slope, float) else slope.gather(1, drawn)[..., None]
    return _times(matrix[drawn], of_drawn)


def _score_chunk(
    head: Head,
    weight: torch.Tensor,
    row_ranges: Sequence[RowRange],
    window: _Window,
    at: slice,
    outputs: torch.Tensor,
    grad_output: torch.Tensor,
) -> None:
    """Score the candidates of one weight format on a chunk of the head's rows."""
    stack, statistics = window.inputs, window.statistics
    assert stack is not None
    readers: dict[int, list[RowSpan]] = {}
    for row_range in row_ranges:
        length = min(at.stop, row_range.count) - at.start
        if length > 0:
            spans = readers.setdefault(stack.starts[row_range.input], [])
            spans.append((0, row_range.start, length))
    for start, spans in readers.items():
        longest = max(length for _, _, length in spans)
        given = stack.rows[start + at.start : start + at.start + longest]
        score_norms(
            head.product(given, weight),
            outputs[:longest],
            grad_output[:longest],
            tuple(spans),
            errors=statistics.errors[0, at.start :],
            scores=statistics.scores[0, at.start :],
        )


def _draw(p: torch.Tensor, quantiles: torch.Tensor) -> torch.Tensor:
    """Return the labels at ``quantiles`` of each row's distribution, ``(rows, draws)``."""
    cumulated = p.cumsum(dim=-1)
    cumulated /= cumulated[:, -1:].clone()
    return torch.searchsorted(cumulated, quantiles, right=True).clamp_(max=p.shape[1] - 1)


class _Window:
    """The rows of a window at which the head counts.

    Args:
        head: The head.
        saved_forwards: Batches of the window.
        labels: Label of every position, by batch.
        masks: Where it counts, by batch.
        unit: The same in words, see :meth:`qsens.data.samples.Batch.lengths`.

    Attributes:
        rows: What the head reads there, ``(rows, hidden)``.
        labels: Their labels, ``(rows,)``, -1 where there is none.
        losses: Receives the loss of each row.
        layout: Which sample each row belongs to.
        inputs: The rows in the candidates' input formats; none where the head is not scored.
        statistics: Receives what is found.
    """

    def __init__(
        self,
        head: ScoredHead,
        saved_forwards: Sequence[SavedForward],
        labels: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor],
        unit: Unit,
    ) -> None:
        self._head, self._saved, self._masks = head, saved_forwards, masks
        batches = [saved.batch for saved in saved_forwards]
        pairs = zip(saved_forwards, masks, strict=True)
        self.rows = _cat([saved.hidden.detach()[mask] for saved, mask in pairs])
        self.labels = _cat([each[mask] for each, mask in zip(labels, masks, strict=True)])
        device = self.rows.device
        self.layout = layout_of(batches, head.candidates, device, unit)
        self.losses = torch.zeros(len(self.rows), dtype=torch.float64, device=device)
        self.statistics = RowStatistics(1, self.layout, device)
        name = head.name
        self.inputs = head.inputs.stack(name, self.rows, self.layout) if name is not None else None

    def scores(self, back: torch.Tensor) -> HeadScores:
        """Return what was found.

        Args:
            back: Gradients of the rows, ``(losses of a sample, rows, hidden)``.
        """
        name = self._head.name
        by_loss = [self._placed(part) for part in back]
        return HeadScores(
            gradients=[list(losses) for losses in zip(*by_loss, strict=True)],
            loss=F.pad(self.losses, (0, 1))[self.layout.own].sum(dim=-1).cpu(),
            statistics=self.statistics.sums([name]) if name is not None else None,
        )

    def _placed(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Return rows where the masks are true, batch by batch, and zeros elsewhere."""
        parts = torch.split(rows, [int(mask.sum()) for mask in self._masks])
        placed = []
        for saved, mask, part in zip(self._saved, self._masks, parts, strict=True):
            gradient = torch.zeros_like(saved.hidden)
            gradient[mask] = part
            placed.append(gradient)
        return placed


def _cat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
