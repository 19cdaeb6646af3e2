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
from qsens.engine.change import change_norms
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
    return PassScores(
        groups=covered,
        per_sample=work.scores.cpu(),
        errors=work.errors.cpu(),
        norms=work.norms.cpu(),
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
        places: Rows of each sample, filled up with the number of rows, ``(samples, longest)``.
        rows: Number of rows.
        order: Index of each sample, in the order of its rows, ``(samples,)``.
        active: By weight format: ``(input, candidate, rows)``; a candidate scores the first rows.
    """

    places: torch.Tensor
    rows: int
    order: torch.Tensor
    active: Mapping[int, list[tuple[int, int, int]]]

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Return ``(..., samples)``: each sample's sum over its rows of ``(..., rows)``."""
        padded = F.pad(values, (0, 1))
        return padded[..., self.places].double().sum(dim=-1)


class _Ledger:
    """The norms of a module's rows, by candidate; what is not computed stays 0.

    Attributes:
        scores: ``|G * dY|`` of each row, ``(candidates, rows)``, float32.
        errors: ``|dY|`` of each row, same shape.
    """

    def __init__(self, candidates: int, rows: int, device: torch.device) -> None:
        self.scores = torch.zeros(candidates, rows, device=device)
        self.errors = torch.zeros(candidates, rows, device=device)

    def clear(self) -> None:
        self.scores.zero_()
        self.errors.zero_()

    def enter(
        self,
        candidate: int,
        at: slice,
        changed: torch.Tensor,
        outputs: torch.Tensor,
        slopes: torch.Tensor,
    ) -> None:
        """Take the norms of rows ``at``; ``changed`` is used up."""
        errors, scores = self.errors[candidate, at], self.scores[candidate, at]
        change_norms(changed, outputs, slopes, errors=errors, scores=scores)


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
        self.errors = torch.zeros_like(self.scores)
        self.norms = torch.zeros(len(groups), scored, dtype=torch.float64, device=self.device)
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
            ledger = _Ledger(len(self.candidates.pairs), tokens.rows, self.device)
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
                        ledger,
                        quantized,
                    )
                    parts.clear()

    def _module(
        self,
        name: str,
        rows: Rows,
        tokens: _Tokens,
        ledger: _Ledger,
        quantized: dict[tuple[int, int], torch.Tensor],
    ) -> None:
        """Score every candidate on one module."""
        bias: torch.Tensor | None = self.linears[name].bias  # type: ignore[assignment]
        ledger.clear()
        for weight_index, active in tokens.active.items():
            weight = self._weight(name, weight_index, active)
            if weight is None:
                continue
            for entry, candidate, count in active:
                inputs = self._input(name, rows.inputs, entry, candidate, count, quantized)
                if inputs is None:
                    continue
                at = slice(0, count)
                changed = F.linear(inputs, weight, bias)
                ledger.enter(candidate, at, changed, rows.outputs[at], rows.slopes[at])
        self._book(name, ledger, _row_norms(rows.outputs), tokens)

    def _book(self, name: str, ledger: _Ledger, norms: torch.Tensor, tokens: _Tokens) -> None:
        """Add a module's norms to its group's sums, sample by sample and in a fixed order."""
        self.seen.add(name)
        group = self.group_of[name]
        self.scores[group].index_add_(1, tokens.order, tokens.sums(ledger.scores.square_()))
        errors = tokens.sums(ledger.errors.double().square_())
        self.errors[group].index_add_(1, tokens.order, errors)
        self.norms[group].index_add_(0, tokens.order, tokens.sums(norms.double().square_()))

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
        head = self.run.head
        ledger = _Ledger(len(self.candidates.pairs), tokens.rows, self.device)
        norms = torch.empty(tokens.rows, device=self.device)
        quantized: dict[tuple[int, int], torch.Tensor] = {}
        for weight_index, active in tokens.active.items():
            weight = self._weight(name, weight_index, active)
            if weight is None:
                continue
            for at in _chunks(tokens.rows, HEAD_ROWS):
                logits = F.linear(rows[at], head.weight, head.bias)
                slopes, _ = _cross_entropy(logits, labels[at])
                _row_norms(logits, norms[at])
                for entry, candidate, count in active:
                    inputs = self._input(name, rows, entry, candidate, count, quantized)
                    part = slice(at.start, min(at.stop, count))
                    if inputs is None or part.start >= part.stop:
                        continue
                    length = part.stop - part.start
                    changed = F.linear(inputs[part], weight, head.bias)
                    ledger.enter(candidate, part, changed, logits[:length], slopes[:length])
        self._book(name, ledger, norms, tokens)

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
        total = sum(counts)
        flat = [length for part in lengths for length in part]
        starts = itertools.accumulate(flat, initial=0)
        places = torch.full((len(flat), max(flat)), total)
        for row, (start, length) in enumerate(zip(starts, flat, strict=False)):
            places[row, :length] = torch.arange(start, start + length)
        return _Tokens(
            places=places.to(self.device),
            rows=total,
            order=torch.tensor([i for batch in batches for i in batch.samples]).to(self.device),
            active=active,
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


def _row_norms(tensor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32, out=out)
    return norms


def _cat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
