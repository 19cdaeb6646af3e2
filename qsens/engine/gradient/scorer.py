"""The fused engine: every pair and size in one forward and backward pass. Needs torch.

For every module ``Y = X W^T``, with the gradient ``G`` at its output: the weight is quantized once
per format, the input once per format and snapshot, one product gives each candidate's output, and
the score is kept **per sample**: ``s_i = sum((G * dY)^2)`` over the sample's real tokens and all
channels, with ``G`` that of the sample's summed loss. Sums over heads of the samples then give
every size, whatever the batches were.

``dY`` is the difference of two outputs in the model's own data type, as ModelOpt takes it: in
bfloat16 the rounding of the outputs is part of the number. Method ``fisher`` takes the difference
of outputs in float32 instead, see :attr:`GradientScorer.exact`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from qsens.checkpoint.experts import expert_weights, input_names, is_experts
from qsens.checkpoint.groups import Group
from qsens.checkpoint.modules import weight_of
from qsens.data.samples import (
    Batch,
    Samples,
    Unit,
    padding_share,
)
from qsens.engine.activations import ModuleActivations, SavedForward
from qsens.engine.amax import Amax, RunningAmax
from qsens.engine.batching import plan_batches, windows
from qsens.engine.candidates import Candidates
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
from qsens.engine.gradient.experts import Mixture, score_mixture
from qsens.engine.head import HEAD_ROWS
from qsens.engine.memory import Budget
from qsens.engine.quantized_inputs import InputQuantizer, QuantizedInputs
from qsens.engine.quantizer import quantize_weight
from qsens.engine.recompute import RecomputedModel
from qsens.engine.scores import ExpertTable, Failures, PassScores, Progress, silent
from qsens.errors import UserError


def score(
    model: nn.Module,
    samples: Samples,
    groups: Sequence[Group],
    candidates: Candidates,
    amax: Mapping[int, Amax] | None,
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
            :func:`qsens.engine.batching.calibrates`.
        boundaries: Sample counts that no batch crosses; those of the candidates are added.
        budget: How much goes through at once; without, all of it, a head's weight at a time.
        batches: Batches to run instead of the engine's own, such as those of the other engine.
        progress: Called as batches go through.
    """
    covered = [group for group in groups if group.covered]
    scored = min(max(candidates.scored), len(samples))
    work = GradientScorer(model, covered, candidates, scored, budget.head_formats if budget else 1)
    return run(work, samples, amax, boundaries, budget, batches, progress)


def run(
    work: GradientScorer,
    samples: Samples,
    amax: Mapping[int, Amax] | None,
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
    if amax is None:
        calibration_sizes = candidates.calibration_sizes()
        running = RunningAmax(work.inputs.names(), calibration_sizes, work.device)
        more = plan_batches(model, samples, max(calibration_sizes), candidates, boundaries, limit)
        more = [batch for batch in more if batch.first >= scored]
    else:
        work.calibrate(amax)
    done = 0
    keep = budget is not None and budget.keeps_records
    with work.run.recorded(keep=keep, tap=running.take if running else None):
        for window in windows(batches, limit):
            work.window(window, running, more)
            done += len(window)
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
        amax=work.found,
        draws=work.draws(),
        experts=work.experts,
    )


class GradientScorer:
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
        self.run = RecomputedModel(model, self.linears)
        self.device = self.run.device
        mixtures = {name: module for name, module in self.linears.items() if is_experts(module)}
        shapes = {
            name: expert_weights(module)[0].shape[2:]
            if name in mixtures
            else weight_of(module).shape[1:]
            for name, module in self.linears.items()
        }
        names = {name: input_names(name, module) for name, module in self.linears.items()}
        self.inputs = InputQuantizer(
            candidates, self.device, shapes, names, self.fail, exact=self.exact
        )
        self.found: Mapping[int, Amax] = {}
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

    def calibrate(self, amax: Mapping[int, Amax]) -> None:
        """Take the calibrated maxima, by snapshot."""
        self.found = amax
        self.inputs.calibrate(amax)

    def window(
        self, batches: Sequence[Batch], running: RunningAmax | None, more: Sequence[Batch]
    ) -> None:
        """Run a wave of batches forward and backward; score every module on the way.

        Args:
            batches: The batches.
            running: Finds the maxima in the forward pass; none where they are there.
            more: Batches that it needs beside those.
        """
        saved_forwards = []
        for batch in batches:
            if running is not None:
                running.begin(batch)
            saved_forwards.append(self.run.forward(batch))
            if running is not None and self.head_name is not None:
                running.take(self.head_name, saved_forwards[-1].hidden)
        if running is not None:
            for batch in more:
                running.begin(batch)
                hidden = self.run.look(batch)
                if self.head_name is not None:
                    running.take(self.head_name, hidden)
            self.calibrate(running.calibration_sizes())
        with torch.no_grad():
            grad_output, found = self.head(saved_forwards)
            layouts: dict[Unit, BufferLayout] = {}
            for layer in self.run.backward(saved_forwards, grad_output):
                for unit in sorted({rows.unit for rows in layer.values()}):
                    if unit not in layouts:
                        layouts[unit] = layout_of(batches, self.candidates, self.device, unit)
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

    def statistics(self, modules: int, layout: BufferLayout) -> RowStatistics:
        """Return an empty ledger."""
        return RowStatistics(modules, layout, self.device)

    def _layer(self, layer: dict[str, ModuleActivations], layout: BufferLayout) -> SampleStatistics:
        """Score every candidate on modules of one layer whose rows are the same."""
        names = list(layer)
        statistics = self.statistics(len(names), layout)
        read: torch.Tensor | None = None
        for position, name in enumerate(names):
            rows = layer.pop(name)
            if rows.inputs is not read or name in self.experts:  # q, k and v read one object
                read = rows.inputs
                stack = self.inputs.stack(name, read, layout)
            with exact_products() if self.exact else nullcontext():
                self._module(name, rows, statistics, position, stack)
        return statistics.sums(names)

    def _module(
        self,
        name: str,
        rows: ModuleActivations,
        statistics: RowStatistics,
        position: int,
        stack: QuantizedInputs,
    ) -> None:
        """Score every candidate on one module: one product a weight format."""
        if name in self.experts:
            score_mixture(self, name, rows, statistics, position, stack)
            return
        bias: torch.Tensor | None = self.linears[name].bias  # type: ignore[assignment]
        if self.exact:
            weight = weight_of(self.linears[name]).flatten(1)
            rows = replace(rows, outputs=F.linear(rows.inputs, weight, bias))
        statistics.norms[position] = row_norms(rows.outputs)
        for index, row_ranges in statistics.layout.row_ranges.items():
            changed = self.weight(name, index, row_ranges)
            if changed is None:
                continue
            given, spans = stack.select(row_ranges)
            self.measure(F.linear(given, changed, bias), rows, spans, statistics, position)

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
        rows: ModuleActivations,
        spans: tuple[RowSpan, ...],
        statistics: RowStatistics,
        position: int,
    ) -> None:
        """Book what changed outputs of a module do; they are used up."""
        score_norms(
            changed,
            rows.outputs,
            rows.grad_output[0],
            spans,
            errors=statistics.errors[position],
            scores=statistics.scores[position],
        )

    def head(
        self, saved_forwards: Sequence[SavedForward]
    ) -> tuple[list[list[torch.Tensor]], list[SampleStatistics]]:
        """Score the head in chunks of rows; return the gradients at its input, by batch.

        The gradient of the summed cross-entropy at the logits is ``softmax - one_hot``. A chunk's
        logits are made once for as many weight formats as are held at once.
        """
        head = self.run.head
        batches = [saved.batch for saved in saved_forwards]
        where = [batch.label_mask().flatten().nonzero()[:, 0] for batch in batches]
        hidden = [saved.hidden.detach()[:, :-1].flatten(0, 1) for saved in saved_forwards]
        rows = _cat([part[index] for part, index in zip(hidden, where, strict=True)])
        tokens = [batch.input_ids[:, 1:].flatten() for batch in batches]
        labels = _cat([part[index] for part, index in zip(tokens, where, strict=True)])
        layout = layout_of(batches, self.candidates, self.device, "labels")
        statistics = RowStatistics(1, layout, self.device)
        back = torch.empty_like(rows)
        losses = torch.empty(len(rows), dtype=torch.float64, device=self.device)
        scored: list[tuple[int, list[RowRange]]] = []
        if self.head_name is not None:
            scored = list(layout.row_ranges.items())
            stack = self.inputs.stack(self.head_name, rows, layout)
        for turn in range(0, max(1, len(scored)), self.head_formats):
            weights = [
                (self.weight(self.head_name or "", index, row_ranges), row_ranges)
                for index, row_ranges in scored[turn : turn + self.head_formats]
            ]
            for at in _chunks(len(rows), HEAD_ROWS):
                logits = F.linear(rows[at], head.weight, head.bias)
                grad_output, lost = _cross_entropy(logits, labels[at])
                if turn == 0:
                    losses[at] = lost
                    back[at] = grad_output @ head.weight
                    statistics.norms[0, at] = row_norms(logits)
                for weight, row_ranges in weights:
                    if weight is not None:
                        self._head_chunk(
                            weight, row_ranges, stack, at, logits, grad_output, statistics
                        )
        self.loss[list(layout.order)] = F.pad(losses, (0, 1))[layout.own].sum(dim=-1).cpu()
        gradients = []
        for saved, index, part in zip(
            saved_forwards, where, torch.split(back, [len(index) for index in where]), strict=True
        ):
            gradient = torch.zeros_like(saved.hidden)
            inner = torch.zeros_like(gradient[:, :-1]).flatten(0, 1)
            inner[index] = part
            gradient[:, :-1] = inner.view(gradient[:, :-1].shape)
            gradients.append([gradient])
        return gradients, [statistics.sums([self.head_name])] if self.head_name is not None else []

    def _head_chunk(
        self,
        weight: torch.Tensor,
        row_ranges: Sequence[RowRange],
        stack: QuantizedInputs,
        at: slice,
        logits: torch.Tensor,
        grad_output: torch.Tensor,
        statistics: RowStatistics,
    ) -> None:
        """Score the candidates of one weight format on a chunk of the head's rows."""
        readers: dict[int, list[RowSpan]] = {}
        for row_range in row_ranges:
            length = min(at.stop, row_range.count) - at.start
            if length > 0:
                readers.setdefault(stack.starts[row_range.input], []).append(
                    (0, row_range.start, length)
                )
        for start, spans in readers.items():
            longest = max(length for _, _, length in spans)
            given = stack.rows[start + at.start : start + at.start + longest]
            score_norms(
                F.linear(given, weight, self.run.head.bias),
                logits[:longest],
                grad_output[:longest],
                tuple(spans),
                errors=statistics.errors[0, at.start :],
                scores=statistics.scores[0, at.start :],
            )

    def book(self, found: Sequence[SampleStatistics], order: list[int]) -> None:
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

    def weight(self, name: str, index: int, row_ranges: Sequence[RowRange]) -> torch.Tensor | None:
        """Return a module's quantized weight; None where that fails, which is noted."""
        try:
            weight = weight_of(self.linears[name])
            return quantize_weight(weight, self.candidates.weights[index]).flatten(1)
        except Exception as error:
            self.fail(name, [row_range.candidate for row_range in row_ranges], error)
            return None

    def fail(self, name: str, candidates: Sequence[int], error: Exception) -> None:
        """Note why a candidate has no score here; the rest of the pass goes on."""
        self.failures.add(name, self.group_of[name], candidates, error)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of the summed loss at ``logits``, in their dtype, and each row's loss."""
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    picked = labels[:, None]
    losses = -log_p.gather(1, picked)[:, 0].double()
    grad_output = log_p.exp_()
    grad_output.scatter_add_(1, picked, grad_output.new_full(picked.shape, -1.0))
    return grad_output.to(logits.dtype), losses


def _cat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
