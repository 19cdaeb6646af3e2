"""The fused engine: every pair and size in one forward and backward pass. Needs torch.

For every module ``Y = X W^T``, with the gradient ``G`` at its output: the weight is quantized once
per format, the input once per format and snapshot, one product gives each candidate's output, and
the score is kept **per sample**: ``s_i = sum((G * dY)^2)`` over the sample's real tokens and all
channels, with ``G`` that of the sample's summed loss. Sums over heads of the samples then give
every size, whatever the batches were.

``dY`` is the difference of two outputs in the model's own data type, as ModelOpt takes it: in
bfloat16 the rounding of the outputs is part of the number.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from qsens.engine.calibrate import Maxima
from qsens.engine.candidates import Candidates
from qsens.engine.groups import Group
from qsens.engine.model_pass import Flight, ModelPass, Rows
from qsens.engine.quantizer import quantize, quantize_weight
from qsens.engine.samples import Batch, Samples, padded_batches
from qsens.engine.scores import PassScores, Progress, silent

# Elements of a weight that are quantized at once: bounds the temporaries of a large head.
WEIGHT_CHUNK = 1 << 26
# Rows of the head's output that are held in float32 at once.
HEAD_ROWS = 512


def score(
    model: nn.Module,
    samples: Samples,
    groups: Sequence[Group],
    candidates: Candidates,
    maxima: Mapping[int, Maxima],
    *,
    boundaries: Sequence[int] = (),
    max_tokens: int | None = None,
    batches: Sequence[Batch] | None = None,
    progress: Progress = silent,
) -> PassScores:
    """Score every candidate on every covered group in one pass over the samples.

    Args:
        model: The model, in evaluation mode, its weights frozen.
        samples: The samples; as many are scored as the candidates ask for.
        groups: The groups; those that are not covered are left out.
        candidates: What to compute.
        maxima: Calibrated maxima of every module's input, by snapshot.
        boundaries: Sample counts that no batch crosses; those of the candidates are added.
        max_tokens: Tokens in flight at most, padding included; none for no limit.
        batches: Batches to run instead of the engine's own, such as those of the other engine.
        progress: Called as batches go through.
    """
    covered = tuple(group for group in groups if group.covered)
    scored = min(max(candidates.scored), len(samples))
    if batches is None:
        batches = padded_batches(
            samples, boundaries=[*boundaries, *candidates.scored], max_tokens=max_tokens
        )
    batches = [batch for batch in batches if batch.first < scored]
    started = time.monotonic()
    work = _Pass(model, covered, candidates, maxima, scored)
    done = 0
    with work.run.recorded():
        for wave in _waves(batches, max_tokens):
            work.wave(wave)
            done += len(wave)
            progress("score", done, len(batches))
    tokens = sum(batch.attention_mask.numel() for batch in batches)
    real = sum(int(batch.attention_mask.sum()) for batch in batches)
    squares = work.squares.cpu()
    return PassScores(
        groups=covered,
        per_sample=work.scores.cpu(),
        error=squares[..., 0] / squares[..., 1].clamp_min(torch.finfo(torch.float64).tiny),
        reached=tuple(all(name in work.seen for name in group.members) for group in covered),
        failures=work.failures,
        loss=work.loss.cpu(),
        seconds=time.monotonic() - started,
        padding_share=1 - real / tokens,
    )


@dataclass(frozen=True)
class _Tokens:
    """The rows of a wave: whose they are, and which candidates score them.

    Attributes:
        starts: Where each sample's rows start, and the number of rows, ``(samples + 1,)``.
        order: Index of each sample, in the order of its rows, ``(samples,)``.
        heads: How many samples the first so many rows are.
        active: By weight format: ``(input, candidate, rows)``; a candidate scores the first rows.
    """

    starts: torch.Tensor
    order: torch.Tensor
    heads: Mapping[int, int]
    active: dict[int, list[tuple[int, int, int]]]

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of each sample's rows over the first ``len(values)`` rows."""
        ends = self.starts[: self.heads[len(values)] + 1]
        return torch.segment_reduce(values, "sum", offsets=ends, initial=0.0, unsafe=True)


class _Pass:
    """The running state of one pass."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        candidates: Candidates,
        maxima: Mapping[int, Maxima],
        scored: int,
    ) -> None:
        self.candidates = candidates
        self.group_of = {name: i for i, group in enumerate(groups) for name in group.members}
        self.linears = {name: model.get_submodule(name) for name in self.group_of}
        self.run = ModelPass(model, self.linears)
        self.device = self.run.device
        self.maxima = {
            count: {name: value.to(self.device) for name, value in found.items()}
            for count, found in maxima.items()
        }
        self.head_name = next(
            (name for name, module in self.linears.items() if module is self.run.head), None
        )
        shape = (len(groups), len(candidates.pairs))
        self.scores = torch.zeros(*shape, scored, dtype=torch.float64, device=self.device)
        self.squares = torch.zeros(*shape, 2, dtype=torch.float64, device=self.device)
        self.loss = torch.zeros(scored, dtype=torch.float64, device=self.device)
        self.seen: set[str] = set()
        self.failures: dict[tuple[int, int], str] = {}

    def wave(self, batches: Sequence[Batch]) -> None:
        """Run a wave of batches forward and backward; score every module on the way."""
        with torch.enable_grad():
            flights = [self.run.forward(batch) for batch in batches]
        with torch.no_grad():
            slopes = self._head(flights)
            tokens = self._tokens(batches, labels=False)
            for layer in self.run.backward(flights, slopes):
                joined: dict[int, torch.Tensor] = {}
                quantized: dict[tuple[int, int], torch.Tensor] = {}
                for name, parts in layer.items():
                    key = id(parts[0].inputs)  # one object where modules read one input
                    if key not in joined:
                        joined[key] = _cat([part.inputs for part in parts])
                        quantized.clear()
                    self._module(
                        name,
                        Rows(
                            joined[key],
                            _cat([part.outputs for part in parts]),
                            _cat([part.slopes for part in parts]),
                        ),
                        tokens,
                        quantized,
                    )
                    parts.clear()

    def _module(
        self,
        name: str,
        rows: Rows,
        tokens: _Tokens,
        quantized: dict[tuple[int, int], torch.Tensor],
    ) -> None:
        """Score every candidate on one module."""
        self.seen.add(name)
        module, group = self.linears[name], self.group_of[name]
        bias: torch.Tensor | None = module.bias  # type: ignore[assignment]
        norms = _row_norms(rows.outputs).double().square_().cumsum(0)
        for weight_index, active in tokens.active.items():
            weight = self._weight(name, weight_index, active)
            if weight is None:
                continue
            for entry, candidate, count in active:
                inputs = self._input(name, rows.inputs, entry, candidate, count, quantized)
                if inputs is None:
                    continue
                change = F.linear(inputs, weight, bias).sub_(rows.outputs[:count])
                error = _row_norms(change).double().square_().sum()
                self._keep(
                    group,
                    candidate,
                    _weighted(change, rows.slopes[:count]),
                    torch.stack([error, norms[count - 1]]),
                    tokens,
                )

    def _head(self, flights: Sequence[Flight]) -> list[torch.Tensor]:
        """Score the head in chunks of rows; return the gradient at its input, by batch.

        The gradient of the summed cross-entropy at the logits is ``softmax - one_hot``.
        """
        head = self.run.head
        batches = [flight.batch for flight in flights]
        where = [batch.label_mask().flatten().nonzero()[:, 0] for batch in batches]
        rows = _cat(
            [
                f.hidden.detach()[:, :-1].flatten(0, 1)[w]
                for f, w in zip(flights, where, strict=True)
            ]
        )
        labels = _cat(
            [b.input_ids[:, 1:].flatten()[w] for b, w in zip(batches, where, strict=True)]
        )
        back = torch.empty_like(rows)
        losses = torch.empty(len(rows), dtype=torch.float64, device=self.device)
        for at in _chunks(len(rows), HEAD_ROWS):
            logits = F.linear(rows[at], head.weight, head.bias)
            slopes, losses[at] = _cross_entropy(logits, labels[at])
            back[at] = slopes @ head.weight
        tokens = self._tokens(batches, labels=True)
        self.loss[tokens.order] += tokens.sums(losses)
        if self.head_name is not None and len(rows):
            self._score_head(self.head_name, rows, labels, tokens)
        gradients = []
        for flight, index, part in zip(
            flights, where, torch.split(back, [len(index) for index in where]), strict=True
        ):
            gradient = torch.zeros_like(flight.hidden)
            inner = torch.zeros_like(gradient[:, :-1]).flatten(0, 1)
            inner[index] = part
            gradient[:, :-1] = inner.view(gradient[:, :-1].shape)
            gradients.append(gradient)
        return gradients

    def _score_head(
        self, name: str, rows: torch.Tensor, labels: torch.Tensor, tokens: _Tokens
    ) -> None:
        """Score every candidate on the head; its logits are made again for each weight format."""
        self.seen.add(name)
        head, group = self.run.head, self.group_of[name]
        for weight_index, active in tokens.active.items():
            weight = self._weight(name, weight_index, active)
            if weight is None:
                continue
            quantized: dict[tuple[int, int], torch.Tensor] = {}
            inputs = {
                candidate: self._input(name, rows, entry, candidate, count, quantized)
                for entry, candidate, count in active
            }
            found = {
                candidate: torch.empty(count, dtype=torch.float64, device=self.device)
                for _, candidate, count in active
            }
            squares = torch.zeros(len(self.candidates.pairs), 2, dtype=torch.float64).to(
                rows.device
            )
            for at in _chunks(len(rows), HEAD_ROWS):
                logits = F.linear(rows[at], head.weight, head.bias)
                slopes, _ = _cross_entropy(logits, labels[at])
                norms = _row_norms(logits).double().square_()
                for _, candidate, count in active:
                    given = inputs[candidate]
                    if given is None or at.start >= count:
                        continue
                    part = slice(at.start, min(at.stop, count))
                    length = part.stop - part.start
                    change = F.linear(given[part], weight, head.bias).sub_(logits[:length])
                    squares[candidate, 0] += _row_norms(change).double().square_().sum()
                    squares[candidate, 1] += norms[:length].sum()
                    found[candidate][part] = _weighted(change, slopes[:length])
            for candidate, values in found.items():
                if inputs[candidate] is not None:
                    self._keep(group, candidate, values, squares[candidate], tokens)

    def _keep(
        self,
        group: int,
        candidate: int,
        values: torch.Tensor,
        squares: torch.Tensor,
        tokens: _Tokens,
    ) -> None:
        """Add the scores of the first rows to their samples, in a fixed order."""
        sums = tokens.sums(values)
        self.scores[group, candidate, tokens.order[: len(sums)]] += sums
        self.squares[group, candidate] += squares

    def _tokens(self, batches: Sequence[Batch], *, labels: bool) -> _Tokens:
        """Lay out the rows of a wave: real tokens, or those with a label."""
        lengths = [(batch.attention_mask.sum(dim=1) - int(labels)).tolist() for batch in batches]
        counts = [int(sum(part)) for part in lengths]
        active: dict[int, list[tuple[int, int, int]]] = {}
        for index, (weight, entry) in enumerate(self.candidates.pairs):
            mine = [
                count
                for batch, count in zip(batches, counts, strict=True)
                if batch.first < self.candidates.scored[index]
            ]
            if sum(mine):
                active.setdefault(weight, []).append((entry, index, sum(mine)))
        starts = torch.tensor([0, *(length for part in lengths for length in part)]).cumsum(0)
        order = torch.tensor([index for batch in batches for index in batch.samples])
        rows = itertools.accumulate(counts, initial=0)
        samples = itertools.accumulate((len(part) for part in lengths), initial=0)
        return _Tokens(
            starts.to(self.device),
            order.to(self.device),
            dict(zip(rows, samples, strict=True)),
            active,
        )

    def _weight(
        self, name: str, index: int, active: Sequence[tuple[int, int, int]]
    ) -> torch.Tensor | None:
        try:
            weight: torch.Tensor = self.linears[name].weight  # type: ignore[assignment]
            return quantize_weight(weight, self.candidates.weights[index], chunk=WEIGHT_CHUNK)
        except Exception as error:
            self._fail(name, [candidate for _, candidate, _ in active], error)
            return None

    def _input(
        self,
        name: str,
        rows: torch.Tensor,
        index: int,
        candidate: int,
        count: int,
        quantized: dict[tuple[int, int], torch.Tensor],
    ) -> torch.Tensor | None:
        entry = self.candidates.inputs[index]
        if entry.cfg is None:
            return rows[:count]
        if (index, count) not in quantized:
            amax = None if entry.snapshot is None else self.maxima[entry.snapshot][name]
            try:
                quantized[index, count] = quantize(rows[:count], entry.cfg, amax)
            except Exception as error:
                self._fail(name, [candidate], error)
                return None
        return quantized[index, count]

    def _fail(self, name: str, candidates: Sequence[int], error: Exception) -> None:
        """Note why a candidate has no score here; the rest of the pass goes on."""
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise error
        for candidate in candidates:
            reason = f"{name}: {error}".splitlines()[0]
            self.failures.setdefault((self.group_of[name], candidate), reason)


def _waves(batches: Sequence[Batch], max_tokens: int | None) -> Iterator[list[Batch]]:
    """Cut batches, in order, so that those of a wave stay within ``max_tokens``."""
    wave: list[Batch] = []
    for batch in batches:
        held = sum(other.input_ids.numel() for other in wave)
        if wave and max_tokens is not None and held + batch.input_ids.numel() > max_tokens:
            yield wave
            wave = []
        wave.append(batch)
    if wave:
        yield wave


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of the summed loss at ``logits``, in their dtype, and each row's loss."""
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    picked = labels[:, None]
    losses = -log_p.gather(1, picked)[:, 0].double()
    slopes = log_p.exp_()
    slopes.scatter_add_(1, picked, slopes.new_full(picked.shape, -1.0))
    return slopes.to(logits.dtype), losses


def _weighted(change: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """Return ``sum((G * dY)^2)`` of each row, float64; ``change`` is used up.

    A product in bfloat16 keeps float32's range and errs by 2^-9 without bias, which a sum of many
    squares does not show; float16 would lose small products.
    """
    if change.dtype == torch.float16:
        change = change.float()
    return _row_norms(change.mul_(slopes)).double().square_()


def _row_norms(tensor: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32)
    return norms


def _cat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
