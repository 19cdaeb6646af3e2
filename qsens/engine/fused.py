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

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from qsens.engine.calibrate import Maxima
from qsens.engine.candidates import Candidates
from qsens.engine.change import change_norms
from qsens.engine.groups import Group
from qsens.engine.layout import Layout, Ledger, Sums, lay_out
from qsens.engine.model_pass import HEAD_ROWS, Flight, ModelPass, Rows
from qsens.engine.quantizer import quantize, quantize_weight
from qsens.engine.samples import Batch, Samples, padded_batches, padding_share
from qsens.engine.scores import PassScores, Progress, silent


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
        cuts = [*boundaries, *candidates.scored]
        batches = padded_batches(samples, scored, boundaries=cuts, max_tokens=max_tokens)
    batches = [batch for batch in batches if batch.first < scored]
    started = time.monotonic()
    work = _Pass(model, covered, candidates, maxima, scored)
    done = 0
    with work.run.recorded():
        for wave in _waves(batches, max_tokens):
            work.wave(wave)
            done += len(wave)
            progress("score", done, len(batches))
    return PassScores(
        groups=covered,
        per_sample=work.scores,
        errors=work.errors,
        norms=work.norms,
        reached=tuple(all(name in work.seen for name in group.members) for group in covered),
        failures=work.failures,
        loss=work.loss,
        seconds=time.monotonic() - started,
        padding_share=padding_share(batches),
    )


@dataclass(frozen=True)
class _Stacks:
    """One input of one or more modules, quantized.

    Attributes:
        rows: The input's rows.
        quantized: Its first rows, by input format and count.
        joined: Several of these behind one another, by what they are.
    """

    rows: torch.Tensor
    quantized: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    joined: dict[tuple[tuple[int, int], ...], torch.Tensor] = field(default_factory=dict)


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
        self.maxima = {count: _moved(found, self.device) for count, found in maxima.items()}
        self.head_name = next(
            (name for name, module in self.linears.items() if module is self.run.head), None
        )
        shape = (len(groups), len(candidates.pairs))
        self.scores = torch.zeros(*shape, scored, dtype=torch.float64)
        self.errors = torch.zeros_like(self.scores)
        self.norms = torch.zeros(len(groups), scored, dtype=torch.float64)
        self.loss = torch.zeros(scored, dtype=torch.float64)
        self.seen: set[str] = set()
        self.failures: dict[tuple[int, int], str] = {}

    def wave(self, batches: Sequence[Batch]) -> None:
        """Run a wave of batches forward and backward; score every module on the way."""
        flights = [self.run.forward(batch) for batch in batches]
        with torch.no_grad():
            slopes, found = self._head(flights)
            layout = lay_out(batches, self.candidates, self.device, labels=False)
            for layer in self.run.backward(flights, slopes):
                if layer:
                    found.append(self._layer(layer, layout))
            # Read at the end of a wave: until here, nothing has waited for the device.
            if found:
                self._book(found, list(layout.order))

    def _layer(self, layer: dict[str, list[Rows]], layout: Layout) -> Sums:
        """Score every candidate on the modules of one layer."""
        names = list(layer)
        ledger = Ledger(len(names), layout, self.device)
        read: int | None = None
        for position, name in enumerate(names):
            parts = layer.pop(name)
            if id(parts[0].inputs) != read:  # q, k and v read one object: joined once
                read = id(parts[0].inputs)
                stacks = _Stacks(_cat([part.inputs for part in parts]))
            rows = Rows(
                stacks.rows,
                _cat([part.outputs for part in parts]),
                _cat([part.slopes for part in parts]),
            )
            self._module(name, rows, ledger, position, stacks)
        return ledger.sums(names)

    def _module(
        self,
        name: str,
        rows: Rows,
        ledger: Ledger,
        position: int,
        stacks: _Stacks,
    ) -> None:
        """Score every candidate on one module: one product a weight format."""
        bias: torch.Tensor | None = self.linears[name].bias  # type: ignore[assignment]
        ledger.norms[position] = _row_norms(rows.outputs)
        for weight_index, (start, active) in ledger.layout.active.items():
            weight = self._weight(name, weight_index, active)
            if weight is None:
                continue
            stack = self._stack(name, active, stacks)
            at = slice(start, start + len(stack))
            change_norms(
                F.linear(stack, weight, bias),
                rows.outputs,
                rows.slopes,
                ledger.layout.source[weight_index],
                errors=ledger.errors[position, at],
                scores=ledger.scores[position, at],
            )

    def _head(self, flights: Sequence[Flight]) -> tuple[list[torch.Tensor], list[Sums]]:
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
        found = []
        layout = lay_out(batches, self.candidates, self.device, labels=True)
        if self.head_name is not None:
            found.append(self._score_head(self.head_name, rows, labels, layout))
        self.loss[list(layout.order)] = F.pad(losses, (0, 1))[layout.own].sum(dim=-1).cpu()
        gradients = []
        for flight, index, part in zip(
            flights, where, torch.split(back, [len(index) for index in where]), strict=True
        ):
            gradient = torch.zeros_like(flight.hidden)
            inner = torch.zeros_like(gradient[:, :-1]).flatten(0, 1)
            inner[index] = part
            gradient[:, :-1] = inner.view(gradient[:, :-1].shape)
            gradients.append(gradient)
        return gradients, found

    def _score_head(
        self, name: str, rows: torch.Tensor, labels: torch.Tensor, layout: Layout
    ) -> Sums:
        """Score every candidate on the head; its logits are made again for each weight format."""
        head = self.run.head
        ledger = Ledger(1, layout, self.device)
        for weight_index, (start, active) in layout.active.items():
            weight = self._weight(name, weight_index, active)
            if weight is None:
                continue
            inputs = [self._input(name, rows, entry, count) for entry, _, count in active]
            for at in _chunks(layout.rows, HEAD_ROWS):
                logits = F.linear(rows[at], head.weight, head.bias)
                slopes, _ = _cross_entropy(logits, labels[at])
                ledger.norms[0, at] = _row_norms(logits)
                begin = start
                for given, (_, _, count) in zip(inputs, active, strict=True):
                    length = min(at.stop, count) - at.start
                    if length > 0:
                        mine = slice(begin + at.start, begin + at.start + length)
                        change_norms(
                            F.linear(given[at][:length], weight, head.bias),
                            logits[:length],
                            slopes[:length],
                            None,
                            errors=ledger.errors[0, mine],
                            scores=ledger.scores[0, mine],
                        )
                    begin += count
        return ledger.sums([name])

    def _book(self, found: Sequence[Sums], order: list[int]) -> None:
        """Add modules to their groups, in a fixed order."""
        names = [name for sums in found for name in sums.names]
        tables = (
            torch.cat([sums.scores for sums in found]).cpu(),
            torch.cat([sums.errors for sums in found]).cpu(),
            torch.cat([sums.norms for sums in found]).cpu(),
        )
        for name, scores, errors, norms in zip(names, *tables, strict=True):
            self.seen.add(name)
            group = self.group_of[name]
            self.scores[group][:, order] += scores
            self.errors[group][:, order] += errors
            self.norms[group][order] += norms

    def _weight(
        self, name: str, index: int, active: Sequence[tuple[int, int, int]]
    ) -> torch.Tensor | None:
        try:
            weight: torch.Tensor = self.linears[name].weight  # type: ignore[assignment]
            return quantize_weight(weight, self.candidates.weights[index])
        except Exception as error:
            self._fail(name, [candidate for _, candidate, _ in active], error)
            return None

    def _stack(
        self, name: str, active: Sequence[tuple[int, int, int]], stacks: _Stacks
    ) -> torch.Tensor:
        """Return the inputs of a weight format's candidates, behind one another."""
        key = tuple((entry, count) for entry, _, count in active)
        if key not in stacks.joined:
            for entry, _, count in active:
                if (entry, count) not in stacks.quantized:
                    quantized = self._input(name, stacks.rows, entry, count)
                    stacks.quantized[entry, count] = quantized
            stacks.joined[key] = _cat([stacks.quantized[item] for item in key])
        return stacks.joined[key]

    def _input(self, name: str, rows: torch.Tensor, index: int, count: int) -> torch.Tensor:
        """Return the first rows, quantized.

        Where that fails, every candidate of this input has failed here: the rows come back as they
        are, for the product's shape alone.
        """
        entry = self.candidates.inputs[index]
        if entry.cfg is None:
            return rows[:count]
        try:
            amax = None if entry.snapshot is None else self.maxima[entry.snapshot][name]
            return quantize(rows[:count], entry.cfg, amax)
        except Exception as error:
            pairs = enumerate(self.candidates.pairs)
            self._fail(name, [candidate for candidate, (_, of) in pairs if of == index], error)
            return rows[:count]

    def _fail(self, name: str, candidates: Sequence[int], error: Exception) -> None:
        """Note why a candidate has no score here; the rest of the pass goes on."""
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise error
        for candidate in candidates:
            reason = f"{name}: {error}".splitlines()[0]
            self.failures.setdefault((self.group_of[name], candidate), reason)


def _moved(maxima: Maxima, device: torch.device) -> Maxima:
    """Move all maxima in one transfer."""
    if not maxima:
        return {}
    return dict(zip(maxima, torch.stack(list(maxima.values())).to(device), strict=True))


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


def _row_norms(tensor: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32)
    return norms


def _cat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
