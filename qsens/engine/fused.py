"""The fused engine: every pair and size in one forward and backward pass. Needs torch.

For every module ``Y = X W^T``, with the gradient ``G`` at its output: the weight is quantized once
per format, the input once per format and snapshot, one product gives each candidate's output, and
the score is kept **per sample**: ``s_i = sum((G * dY)^2)`` over the sample's real tokens and all
channels, with ``G`` that of the sample's summed loss. Sums over heads of the samples then give
every size, whatever the batches were.

``dY`` is the difference of two outputs in the model's own data type, as ModelOpt takes it: in
bfloat16 the rounding of the outputs is part of the number. Method ``fisher`` takes the difference
of outputs in float32 instead, see :attr:`Pass.exact`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from qsens.engine.budget import Budget
from qsens.engine.calibrate import Maxima, Running
from qsens.engine.candidates import Candidates
from qsens.engine.change import Segment, change_norms
from qsens.engine.expert_scores import Mixture, score_mixture
from qsens.engine.experts import expert_weights, input_names, is_experts
from qsens.engine.float32 import exact_products
from qsens.engine.groups import Group
from qsens.engine.layout import Layout, Ledger, Slot, Sums, lay_out, row_norms
from qsens.engine.model_pass import ModelPass
from qsens.engine.parts import HEAD_ROWS, weight_of
from qsens.engine.quantizer import quantize_weight
from qsens.engine.rows import Flight, Rows
from qsens.engine.samples import (
    Batch,
    Samples,
    Unit,
    padding_share,
)
from qsens.engine.scores import ExpertTable, Failures, PassScores, Progress, silent
from qsens.engine.stack import Inputs, Stack
from qsens.engine.waves import plan_batches, waves
from qsens.errors import UserError


def score(
    model: nn.Module,
    samples: Samples,
    groups: Sequence[Group],
    candidates: Candidates,
    maxima: Mapping[int, Maxima] | None,
    *,
    boundaries: Sequence[int] = (),
    budget: Budget | None = None,
    batches: Sequence[Batch] | None = None,
    progress: Progress = silent,
) -> PassScores:
    """Score every candidate on every covered group in one pass over the samples.

    Args:
        model: The model, in evaluation mode, its weights frozen.
        samples: The samples; as many are scored as the candidates ask for.
        groups: The groups; those that are not covered are left out.
        candidates: What to compute.
        maxima: Calibrated maxima of every module's input, by snapshot; found on the way when None,
            which needs all scored samples to go through in one wave, see
            :func:`qsens.engine.waves.calibrates`.
        boundaries: Sample counts that no batch crosses; those of the candidates are added.
        budget: How much goes through at once; without, all of it, a head's weight at a time.
        batches: Batches to run instead of the engine's own, such as those of the other engine.
        progress: Called as batches go through.
    """
    covered = [group for group in groups if group.covered]
    scored = min(max(candidates.scored), len(samples))
    work = Pass(model, covered, candidates, scored, budget.head_formats if budget else 1)
    return run(work, samples, maxima, boundaries, budget, batches, progress)


def run(
    work: Pass,
    samples: Samples,
    maxima: Mapping[int, Maxima] | None,
    boundaries: Sequence[int],
    budget: Budget | None,
    batches: Sequence[Batch] | None,
    progress: Progress,
) -> PassScores:
    """Run a pass over the samples; the arguments are those of :func:`score`."""
    started = time.monotonic()
    model, candidates, scored = work.run.model, work.candidates, work.scored
    limit = budget.max_tokens if budget else None
    if batches is None:
        batches = plan_batches(model, samples, scored, candidates, boundaries, limit)
    batches = [batch for batch in batches if batch.first < scored]
    running, more = None, []
    if maxima is None:
        snapshots = candidates.snapshots()
        running = Running(work.inputs.names(), snapshots, work.device)
        more = plan_batches(model, samples, max(snapshots), candidates, boundaries, limit)
        more = [batch for batch in more if batch.first >= scored]
    else:
        work.calibrate(maxima)
    done = 0
    keep = budget is not None and budget.keeps_records
    with work.run.recorded(keep=keep, tap=running.take if running else None):
        for wave in waves(batches, limit):
            work.wave(wave, running, more)
            done += len(wave)
            progress("score", done, len(batches))
    return PassScores(
        groups=tuple(work.groups),
        per_sample=work.per_sample(),
        errors=work.errors,
        norms=work.norms,
        reached=tuple(all(name in work.seen for name in group.members) for group in work.groups),
        failures=work.failures,
        loss=work.loss,
        seconds=time.monotonic() - started,
        padding_share=padding_share(batches),
        maxima=work.found,
        draws=work.draws(),
        experts=work.experts,
    )


class Pass:
    """The running state of one pass.

    Args:
        model: The model.
        groups: The groups that are scored.
        candidates: What to compute.
        scored: Samples that are scored.
        head_formats: Weight formats of the head that are held at once.

    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        candidates: Candidates,
        scored: int,
        head_formats: int,
    ) -> None:
        self.groups = groups
        self.candidates = candidates
        self.scored = scored
        self.head_formats = head_formats
        self.group_of = {name: i for i, group in enumerate(groups) for name in group.members}
        self.linears = {name: model.get_submodule(name) for name in self.group_of}
        self.run = ModelPass(model, self.linears)
        self.device = self.run.device
        mixtures = {name: module for name, module in self.linears.items() if is_experts(module)}
        shapes = {
            name: expert_weights(module)[0].shape[2:]
            if name in mixtures
            else weight_of(module).shape[1:]
            for name, module in self.linears.items()
        }
        names = {name: input_names(name, module) for name, module in self.linears.items()}
        self.inputs = Inputs(candidates, self.device, shapes, names, self.fail, exact=self.exact)
        self.found: Mapping[int, Maxima] = {}
        self.head_name = next(
            (name for name, module in self.linears.items() if module is self.run.head), None
        )
        shape = (len(groups), len(candidates.pairs))
        self.scores = torch.zeros(*shape, scored, dtype=torch.float64)
        self.errors = torch.zeros_like(self.scores)
        self.norms = torch.zeros(len(groups), scored, dtype=torch.float64)
        self.loss = torch.zeros(scored, dtype=torch.float64)
        self.experts = {
            name: ExpertTable.empty(len(expert_weights(module)[0]), shape[1], scored)
            for name, module in mixtures.items()
        }
        self.seen: set[str] = set()
        self.failures = Failures()

    @property
    def exact(self) -> bool:
        """Whether inputs are quantized to float32, and outputs made of them in float32.

        Those of the module as it is are made anew then: no rounding of the model's data type is in
        their difference.
        """
        return False

    def per_sample(self) -> torch.Tensor:
        """Return ``s_i``, ``(groups, candidates, samples)``, float64."""
        return self.scores

    def draws(self) -> torch.Tensor | None:
        """Return what each draw says, where there are draws."""
        return None

    def calibrate(self, maxima: Mapping[int, Maxima]) -> None:
        """Take the calibrated maxima, by snapshot."""
        self.found = maxima
        self.inputs.calibrate(maxima)

    def wave(
        self, batches: Sequence[Batch], running: Running | None, more: Sequence[Batch]
    ) -> None:
        """Run a wave of batches forward and backward; score every module on the way.

        Args:
            batches: The batches.
            running: Finds the maxima in the forward pass; none where they are there.
            more: Batches that it needs beside those.
        """
        flights = []
        for batch in batches:
            if running is not None:
                running.begin(batch)
            flights.append(self.run.forward(batch))
            if running is not None and self.head_name is not None:
                running.take(self.head_name, flights[-1].hidden)
        if running is not None:
            for batch in more:
                running.begin(batch)
                hidden = self.run.look(batch)
                if self.head_name is not None:
                    running.take(self.head_name, hidden)
            self.calibrate(running.snapshots())
        with torch.no_grad():
            slopes, found = self.head(flights)
            layouts: dict[Unit, Layout] = {}
            for layer in self.run.backward(flights, slopes):
                for unit in sorted({rows.unit for rows in layer.values()}):
                    if unit not in layouts:
                        layouts[unit] = lay_out(batches, self.candidates, self.device, unit)
                    alike = {
                        name: layer.pop(name) for name in list(layer) if layer[name].unit == unit
                    }
                    found.append(self._layer(alike, layouts[unit]))
            for name in self.run.sliding:
                reason = UserError("a convolution whose windows are not whole patches")
                self.fail(name, range(len(self.candidates.pairs)), reason)
            # Read at the end of a wave: until here, only mixtures have waited for the device.
            if found:
                self.book(found, [index for batch in batches for index in batch.samples])

    def ledger(self, modules: int, layout: Layout) -> Ledger:
        """Return an empty ledger."""
        return Ledger(modules, layout, self.device)

    def _layer(self, layer: dict[str, Rows], layout: Layout) -> Sums:
        """Score every candidate on modules of one layer whose rows are the same."""
        names = list(layer)
        ledger = self.ledger(len(names), layout)
        read: torch.Tensor | None = None
        for position, name in enumerate(names):
            rows = layer.pop(name)
            if rows.inputs is not read or name in self.experts:  # q, k and v read one object
                read = rows.inputs
                stack = self.inputs.stack(name, read, layout)
            with exact_products() if self.exact else nullcontext():
                self._module(name, rows, ledger, position, stack)
        return ledger.sums(names)

    def _module(self, name: str, rows: Rows, ledger: Ledger, position: int, stack: Stack) -> None:
        """Score every candidate on one module: one product a weight format."""
        if name in self.experts:
            score_mixture(self, name, rows, ledger, position, stack)
            return
        bias: torch.Tensor | None = self.linears[name].bias  # type: ignore[assignment]
        if self.exact:
            weight = weight_of(self.linears[name]).flatten(1)
            rows = replace(rows, outputs=F.linear(rows.inputs, weight, bias))
        ledger.norms[position] = row_norms(rows.outputs)
        for index, slots in ledger.layout.slots.items():
            changed = self.weight(name, index, slots)
            if changed is None:
                continue
            given, segments = stack.select(slots)
            self.measure(F.linear(given, changed, bias), rows, segments, ledger, position)

    def alone(self, mixture: Mixture, found: torch.Tensor, count: int) -> torch.Tensor:
        """Return the scores of single experts, ``(experts, samples)``.

        Args:
            mixture: The mixture.
            found: What was measured of each pair.
            count: Rows of the wave that count.
        """
        return mixture.sums(found.square(), count)

    def measure(
        self,
        changed: torch.Tensor,
        rows: Rows,
        segments: tuple[Segment, ...],
        ledger: Ledger,
        position: int,
    ) -> None:
        """Book what changed outputs of a module do; they are used up."""
        change_norms(
            changed,
            rows.outputs,
            rows.slopes[0],
            segments,
            errors=ledger.errors[position],
            scores=ledger.scores[position],
        )

    def head(self, flights: Sequence[Flight]) -> tuple[list[list[torch.Tensor]], list[Sums]]:
        """Score the head in chunks of rows; return the gradients at its input, by batch.

        The gradient of the summed cross-entropy at the logits is ``softmax - one_hot``. A chunk's
        logits are made once for as many weight formats as are held at once.
        """
        head = self.run.head
        batches = [flight.batch for flight in flights]
        where = [batch.label_mask().flatten().nonzero()[:, 0] for batch in batches]
        hidden = [flight.hidden.detach()[:, :-1].flatten(0, 1) for flight in flights]
        rows = _cat([part[index] for part, index in zip(hidden, where, strict=True)])
        tokens = [batch.input_ids[:, 1:].flatten() for batch in batches]
        labels = _cat([part[index] for part, index in zip(tokens, where, strict=True)])
        layout = lay_out(batches, self.candidates, self.device, "labels")
        ledger = Ledger(1, layout, self.device)
        back = torch.empty_like(rows)
        losses = torch.empty(len(rows), dtype=torch.float64, device=self.device)
        scored: list[tuple[int, list[Slot]]] = []
        if self.head_name is not None:
            scored = list(layout.slots.items())
            stack = self.inputs.stack(self.head_name, rows, layout)
        for turn in range(0, max(1, len(scored)), self.head_formats):
            weights = [
                (self.weight(self.head_name or "", index, slots), slots)
                for index, slots in scored[turn : turn + self.head_formats]
            ]
            for at in _chunks(len(rows), HEAD_ROWS):
                logits = F.linear(rows[at], head.weight, head.bias)
                slopes, lost = _cross_entropy(logits, labels[at])
                if turn == 0:
                    losses[at] = lost
                    back[at] = slopes @ head.weight
                    ledger.norms[0, at] = row_norms(logits)
                for weight, slots in weights:
                    if weight is not None:
                        self._head_chunk(weight, slots, stack, at, logits, slopes, ledger)
        self.loss[list(layout.order)] = F.pad(losses, (0, 1))[layout.own].sum(dim=-1).cpu()
        gradients = []
        for flight, index, part in zip(
            flights, where, torch.split(back, [len(index) for index in where]), strict=True
        ):
            gradient = torch.zeros_like(flight.hidden)
            inner = torch.zeros_like(gradient[:, :-1]).flatten(0, 1)
            inner[index] = part
            gradient[:, :-1] = inner.view(gradient[:, :-1].shape)
            gradients.append([gradient])
        return gradients, [ledger.sums([self.head_name])] if self.head_name is not None else []

    def _head_chunk(
        self,
        weight: torch.Tensor,
        slots: Sequence[Slot],
        stack: Stack,
        at: slice,
        logits: torch.Tensor,
        slopes: torch.Tensor,
        ledger: Ledger,
    ) -> None:
        """Score the candidates of one weight format on a chunk of the head's rows."""
        readers: dict[int, list[Segment]] = {}
        for slot in slots:
            length = min(at.stop, slot.count) - at.start
            if length > 0:
                readers.setdefault(stack.starts[slot.input], []).append((0, slot.start, length))
        for start, segments in readers.items():
            longest = max(length for _, _, length in segments)
            given = stack.rows[start + at.start : start + at.start + longest]
            change_norms(
                F.linear(given, weight, self.run.head.bias),
                logits[:longest],
                slopes[:longest],
                tuple(segments),
                errors=ledger.errors[0, at.start :],
                scores=ledger.scores[0, at.start :],
            )

    def book(self, found: Sequence[Sums], order: list[int]) -> None:
        """Add modules to their groups, in a fixed order."""
        names = [name for sums in found for name in sums.names]
        self.seen.update(names)
        groups = torch.tensor([self.group_of[name] for name in names])
        for total, tables in (
            (self.scores, [sums.scores for sums in found]),
            (self.errors, [sums.errors for sums in found]),
            (self.norms, [sums.norms for sums in found]),
        ):
            table = torch.cat(tables).cpu()
            added = table.new_zeros(len(total), *table.shape[1:]).index_add_(0, groups, table)
            total[..., order] += added

    def weight(self, name: str, index: int, slots: Sequence[Slot]) -> torch.Tensor | None:
        """Return a module's quantized weight; None where that fails, which is noted."""
        try:
            weight = weight_of(self.linears[name])
            return quantize_weight(weight, self.candidates.weights[index]).flatten(1)
        except Exception as error:
            self.fail(name, [slot.candidate for slot in slots], error)
            return None

    def fail(self, name: str, candidates: Sequence[int], error: Exception) -> None:
        """Note why a candidate has no score here; the rest of the pass goes on."""
        self.failures.add(name, self.group_of[name], candidates, error)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of the summed loss at ``logits``, in their dtype, and each row's loss."""
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    picked = labels[:, None]
    losses = -log_p.gather(1, picked)[:, 0].double()
    slopes = log_p.exp_()
    slopes.scatter_add_(1, picked, slopes.new_full(picked.shape, -1.0))
    return slopes.to(logits.dtype), losses


def _cat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
