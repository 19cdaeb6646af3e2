"""The fused engine: every pair and size in one forward and backward pass. Needs torch.

For every module ``Y = X W^T``, in its backward hook: the weight is quantized once per format, the
input once per format and snapshot, one product gives each candidate's output, and the score is
kept **per sample**: ``s_i = sum((G * dY)^2)`` over the sample's real tokens and all channels, with
``G`` the gradient of the sample's summed loss. Sums over heads of the samples then give every
size, whatever the batches were.

``dY`` is the difference of two outputs in the model's own data type, as ModelOpt takes it: in
bfloat16 the rounding of the outputs is part of the number.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from qsens.engine.calibrate import Maxima
from qsens.engine.candidates import Candidates
from qsens.engine.groups import Group
from qsens.engine.model_pass import ModelPass
from qsens.engine.quantizer import quantize, quantize_weight
from qsens.engine.samples import Batch, Samples, padded_batches
from qsens.engine.scores import Progress, silent

# Elements of a weight that are quantized at once: bounds the temporaries of a large head.
WEIGHT_CHUNK = 1 << 26
# Rows of the head's output that are held in float32 at once.
HEAD_ROWS = 512


@dataclass(frozen=True)
class FusedScores:
    """What a pass found.

    Attributes:
        groups: The covered groups, in model order.
        per_sample: ``s_i``, ``(groups, candidates, samples)``, float64 on the CPU; 0 where a
            candidate does not score a sample.
        error: ``||dY||^2 / ||Y||^2`` over the real tokens scored, ``(groups, candidates)``.
        reached: Whether a gradient reached every member of each group.
        failures: Why a candidate could not be computed, by group and candidate index.
        loss: Summed loss of each sample, in nats.
        seconds: What the pass took.
        padding_share: Padded tokens over all tokens, 0 to 1.
    """

    groups: tuple[Group, ...]
    per_sample: torch.Tensor
    error: torch.Tensor
    reached: tuple[bool, ...]
    failures: Mapping[tuple[int, int], str]
    loss: torch.Tensor
    seconds: float
    padding_share: float


def score(
    model: nn.Module,
    samples: Samples,
    groups: Sequence[Group],
    candidates: Candidates,
    maxima: Mapping[int, Maxima],
    *,
    boundaries: Sequence[int],
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> FusedScores:
    """Score every candidate on every covered group in one pass over the samples.

    Args:
        model: The model, in evaluation mode, its weights frozen.
        samples: The samples; as many are scored as the candidates ask for.
        groups: The groups; those that are not covered are left out.
        candidates: What to compute.
        maxima: Calibrated maxima of every module's input, by snapshot.
        boundaries: Sample counts that no batch crosses; those of the candidates are added.
        max_tokens: Tokens of a batch at most, padding included.
        progress: Called as batches go through.
    """
    covered = tuple(group for group in groups if group.covered)
    scored = min(max(candidates.scored), len(samples))
    batches = [
        batch
        for batch in padded_batches(
            samples, boundaries=[*boundaries, *candidates.scored], max_tokens=max_tokens
        )
        if batch.first < scored
    ]
    started = time.monotonic()
    work = _Pass(model, covered, candidates, maxima, scored)
    with torch.enable_grad(), work.run.tapped(work.tap):
        for index, batch in enumerate(batches):
            work.batch(batch)
            progress("score", index + 1, len(batches))
    tokens = sum(batch.attention_mask.numel() for batch in batches)
    real = sum(int(batch.attention_mask.sum()) for batch in batches)
    squares = work.squares.cpu()
    return FusedScores(
        groups=covered,
        per_sample=work.scores.cpu(),
        error=squares[..., 0] / squares[..., 1].clamp_min(torch.finfo(torch.float64).tiny),
        reached=tuple(all(name in work.seen for name in group.members) for group in covered),
        failures=work.failures,
        loss=work.loss.cpu(),
        seconds=time.monotonic() - started,
        padding_share=1 - real / tokens,
    )


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
        self.device = next(model.parameters()).device
        self.candidates = candidates
        self.maxima = {
            count: {name: value.to(self.device) for name, value in found.items()}
            for count, found in maxima.items()
        }
        self.group_of = {name: i for i, group in enumerate(groups) for name in group.members}
        self.run = ModelPass(model, {name: model.get_submodule(name) for name in self.group_of})
        self.head_name = next(
            (name for name in self.group_of if model.get_submodule(name) is self.run.head), None
        )
        shape = (len(groups), len(candidates.pairs))
        double = {"dtype": torch.float64, "device": self.device}
        self.scores = torch.zeros(*shape, scored, **double)  # type: ignore[call-overload]
        self.squares = torch.zeros(*shape, 2, **double)  # type: ignore[call-overload]
        self.loss = torch.zeros(scored, **double)  # type: ignore[call-overload]
        self.seen: set[str] = set()
        self.failures: dict[tuple[int, int], str] = {}

    def batch(self, batch: Batch) -> None:
        """Run one batch forward and backward; the hooks do the rest."""
        self.active = self.candidates.active(batch.first)
        moved = batch.to(self.device)
        real = moved.attention_mask.bool()
        self.real = None if bool(batch.attention_mask.all()) else real.flatten().nonzero()[:, 0]
        self.width = real.shape[1]
        self.samples = torch.tensor(batch.samples, device=self.device)
        self.inputs: dict[int, torch.Tensor] = {}
        self.last_input: torch.Tensor | None = None
        hidden = self.run.hidden(moved)
        torch.autograd.backward(hidden, self._head(moved, hidden.detach()))

    def tap(self, name: str, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        """Ask for the gradient of a module's output; called in its forward hook."""
        if y.requires_grad:
            held = x.detach(), y.detach()
            y.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._module(name, module, *held, gradient)
            )

    @torch.no_grad()
    def _module(
        self,
        name: str,
        module: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        gradient: torch.Tensor,
    ) -> None:
        self.seen.add(name)
        if self.last_input is None or self.last_input.data_ptr() != x.data_ptr():
            self.inputs.clear()  # q, k and v read one input: quantized once
            self.last_input = x
        rows = self._rows(x)
        output, slope = self._rows(y), self._rows(gradient).float()
        group = self.group_of[name]
        bias: torch.Tensor | None = module.bias  # type: ignore[assignment]
        for weight_index, active in self.active.items():
            weight = self._weight(name, module, weight_index, active)
            if weight is None:
                continue
            for input_index, candidate in active:
                quantized = self._input(name, rows, input_index, candidate)
                if quantized is None:
                    continue
                change = F.linear(quantized, weight, bias).sub_(output)
                self._add(group, candidate, slope, change, output)

    @torch.no_grad()
    def _head(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """Score the head in chunks of rows; return the gradient at its input.

        The gradient of the summed cross-entropy at the logits is ``softmax - one_hot``.
        """
        head, mask = self.run.head, batch.label_mask()
        where = mask.flatten().nonzero()[:, 0]
        rows = hidden[:, :-1].flatten(0, 1)[where]
        labels = batch.input_ids[:, 1:].flatten()[where]
        logits = torch.empty(len(rows), head.out_features, dtype=hidden.dtype, device=self.device)
        slopes = torch.empty_like(logits)
        back = torch.empty_like(rows)
        losses = torch.empty(len(rows), device=self.device)
        for at in _chunks(len(rows), HEAD_ROWS):
            logits[at] = F.linear(rows[at], head.weight, head.bias)
            probabilities = torch.log_softmax(logits[at].float(), dim=-1)
            picked = labels[at, None]
            losses[at] = -probabilities.gather(1, picked)[:, 0]
            probabilities.exp_()
            probabilities.scatter_add_(1, picked, torch.full_like(picked, -1.0, dtype=torch.float))
            slopes[at] = probabilities.to(hidden.dtype)
            back[at] = slopes[at] @ head.weight
        spread = torch.zeros(mask.numel(), device=self.device)
        spread[where] = losses
        self.loss[self.samples] += spread.view(mask.shape).double().sum(dim=1)
        if self.head_name is not None:
            self._score_head(self.head_name, rows, where, mask, logits, slopes)
        gradient = torch.zeros_like(hidden)
        inner = torch.zeros_like(hidden[:, :-1]).flatten(0, 1)
        inner[where] = back
        gradient[:, :-1] = inner.view(hidden[:, :-1].shape)
        return gradient

    def _score_head(
        self,
        name: str,
        rows: torch.Tensor,
        where: torch.Tensor,
        mask: torch.Tensor,
        logits: torch.Tensor,
        slopes: torch.Tensor,
    ) -> None:
        self.seen.add(name)
        self.inputs.clear()
        self.last_input = None
        head, group = self.run.head, self.group_of[name]
        saved, self.real, self.width = (self.real, self.width), where, mask.shape[1]
        for weight_index, active in self.active.items():
            weight = self._weight(name, head, weight_index, active)
            if weight is None:
                continue
            for input_index, candidate in active:
                quantized = self._input(name, rows, input_index, candidate)
                if quantized is None:
                    continue
                tokens = torch.empty(len(rows), device=self.device)
                squares = torch.zeros(2, dtype=torch.float64, device=self.device)
                for at in _chunks(len(rows), HEAD_ROWS):
                    change = F.linear(quantized[at], weight, head.bias).sub_(logits[at])
                    tokens[at] = _row_norms(slopes[at].float() * change).square_()
                    squares[0] += _row_norms(change).double().square().sum()
                    squares[1] += _row_norms(logits[at]).double().square().sum()
                self._keep(group, candidate, tokens, squares)
        self.real, self.width = saved
        self.inputs.clear()

    def _add(
        self,
        group: int,
        candidate: int,
        slope: torch.Tensor,
        change: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        squares = torch.stack(
            [_row_norms(part).double().square().sum() for part in (change, output)]
        )
        tokens = _row_norms(slope * change).square_()
        self._keep(group, candidate, tokens, squares)

    def _keep(
        self, group: int, candidate: int, tokens: torch.Tensor, squares: torch.Tensor
    ) -> None:
        """Add per-token scores to their samples, in a fixed order."""
        if self.real is not None:
            padded = torch.zeros(len(self.samples) * self.width, device=self.device)
            padded[self.real] = tokens
            tokens = padded
        sums = tokens.view(len(self.samples), self.width).double().sum(dim=1)
        self.scores[group, candidate, self.samples] += sums
        self.squares[group, candidate] += squares

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the real tokens, ``(tokens, channels)``."""
        flat = tensor.flatten(0, -2)
        return flat if self.real is None else flat[self.real]

    def _weight(
        self,
        name: str,
        module: nn.Module,
        index: int,
        active: Sequence[tuple[int, int]],
    ) -> torch.Tensor | None:
        try:
            weight: torch.Tensor = module.weight  # type: ignore[assignment]
            return quantize_weight(weight, self.candidates.weights[index], chunk=WEIGHT_CHUNK)
        except Exception as error:
            self._fail(name, [candidate for _, candidate in active], error)
            return None

    def _input(
        self, name: str, rows: torch.Tensor, index: int, candidate: int
    ) -> torch.Tensor | None:
        entry = self.candidates.inputs[index]
        if entry.cfg is None:
            return rows
        if index not in self.inputs:
            amax = None if entry.snapshot is None else self.maxima[entry.snapshot][name]
            try:
                self.inputs[index] = quantize(rows, entry.cfg, amax)
            except Exception as error:
                self._fail(name, [candidate], error)
                return None
        return self.inputs[index]

    def _fail(self, name: str, candidates: Sequence[int], error: Exception) -> None:
        """Note why a candidate has no score here; the rest of the pass goes on."""
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise error
        for candidate in candidates:
            reason = f"{name}: {error}".splitlines()[0]
            self.failures.setdefault((self.group_of[name], candidate), reason)


def _row_norms(tensor: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32)
    return norms


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
