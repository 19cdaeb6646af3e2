"""The fused engine: every pair and size in one forward and backward pass. Needs torch.

For every module ``Y = X W^T``, with the gradient ``G`` at its output: the weight is quantized once
per format, the input once per format and calibration size, one product gives each candidate's
output, and the score is kept **per sample**: ``s_i = sum((G * dY)^2)`` over the sample's real
tokens and all channels, with ``G`` that of the sample's summed loss. Sums over heads of the samples
then give every size, whatever the batches were.

``dY`` is the difference of two outputs in the model's own data type, as ModelOpt takes it: in
bfloat16 the rounding of the outputs is part of the number. Method ``fisher`` takes the difference
of outputs in float32 instead, see
:attr:`qsens.engine.gradient.metrics.Metric.exact`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from qsens.checkpoint.experts import expert_weights, input_names, is_experts
from qsens.checkpoint.groups import Group, tower_of
from qsens.checkpoint.modules import bias_of, weight_of
from qsens.data.samples import Batch, Samples, Unit, padding_share
from qsens.engine.activations import Call, ModuleActivations
from qsens.engine.amax import Amax, RunningAmax
from qsens.engine.batching import plan_batches, windows
from qsens.engine.candidates import CalibrationSize, Candidates
from qsens.engine.float32 import exact_products
from qsens.engine.fused_weights import FusedWeights
from qsens.engine.gradient.buffers import (
    BufferLayout,
    RowRange,
    RowStatistics,
    SampleStatistics,
    layout_of,
    row_norms,
)
from qsens.engine.gradient.experts import InputRows, Mixture
from qsens.engine.gradient.heads import HeadScorer, LabelHead, ScoredHead
from qsens.engine.gradient.metrics import GradientNorm, Metric
from qsens.engine.gradient.quantized_inputs import InputQuantizer, QuantizedInputs
from qsens.engine.memory import Budget
from qsens.engine.quantizer import quantize_weight
from qsens.engine.recompute import RecomputedModel
from qsens.engine.scores import ExpertTable, Failures, PassScores, Progress, silent
from qsens.engine.team import team_of, unite


def score(
    model: nn.Module,
    samples: Samples,
    groups: Sequence[Group],
    candidates: Candidates,
    amax: Mapping[CalibrationSize, Amax] | None,
    *,
    boundaries: Sequence[int] = (),
    budget: Budget | None = None,
    batches: Sequence[Batch] | None = None,
    progress: Progress = silent,
    metric: Metric | None = None,
    head: HeadScorer | None = None,
) -> PassScores:
    """Score every candidate on every covered group in one pass over the samples.

    Args:
        model: The model, in evaluation mode, its weights frozen.
        samples: The samples; as many are scored as the candidates ask for.
        groups: The groups; those that are not covered are left out.
        candidates: What to compute.
        amax: Calibrated amax of every module's input, by calibration size; found on the way when
            None, which needs all scored samples to go through in one window, see
            :func:`qsens.engine.batching.calibrates`.
        boundaries: Sample counts that no batch crosses; those of the candidates are added.
        budget: How much goes through at once; without, all of it, a head's weight at a time.
        batches: Batches to run instead of the engine's own, such as those of the other engine.
        progress: Called as batches go through.
        metric: What is measured of an output error; the gradient's norm when not given.
        head: Scores the head and starts the backward pass; with the samples' own labels when not
            given.
    """
    started = time.monotonic()
    covered = [group for group in groups if group.covered]
    scored = min(max(candidates.scored), len(samples))
    formats = budget.head_formats if budget else 1
    work = GradientScorer(
        model, covered, candidates, scored, formats, metric or GradientNorm(), head or LabelHead()
    )
    limit = budget.max_tokens if budget else None
    if batches is None:
        batches = plan_batches(model, samples, scored, candidates, boundaries, limit)
    batches = [batch for batch in batches if batch.first < scored]
    padding = padding_share(batches)
    batches = work.team.share(batches)
    running, more = None, []
    if amax is None:
        sizes = candidates.calibration_sizes()
        running = RunningAmax(work.inputs.names(), sizes, work.device)
        more = plan_batches(model, samples, max(sizes), candidates, boundaries, limit)
        more = work.team.share([batch for batch in more if batch.first >= scored])
    else:
        work.calibrate(amax)
    done = 0
    keep = budget is not None and budget.keeps_records
    with work.model.recorded(keep=keep, tap=running.take if running else None):
        for window in list(windows(batches, limit)) or [[]]:
            work.run(window, running, more)
            done += len(window)
            progress("score", done, len(batches))
    work.unite()
    return work.scores(seconds=time.monotonic() - started, padding=padding)


class GradientScorer:
    """Takes windows of batches forward and backward, and books what each module's gradient says.

    What is measured is the metric's matter, where gradients start is the head's.

    Args:
        model: The model.
        groups: The groups that are scored.
        candidates: What to compute.
        scored: Samples that are scored.
        head_formats: Weight formats of the head that are held at once.
        metric: What is measured of an output error.
        head: Scores the head and starts the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        candidates: Candidates,
        scored: int,
        head_formats: int,
        metric: Metric,
        head: HeadScorer,
    ) -> None:
        self._groups = groups
        self._candidates = candidates
        self._metric = metric
        self._score_head = head
        self._group_of = {name: i for i, group in enumerate(groups) for name in group.members}
        self._modules = {name: model.get_submodule(name) for name in self._group_of}
        self._fused = FusedWeights(model, groups)
        self.model = RecomputedModel(model, self._modules, tower_of(groups))
        self.device = self.model.device
        self.team = team_of(model)
        mixtures = {name: module for name, module in self._modules.items() if is_experts(module)}
        shapes = {
            name: expert_weights(module)[0].shape[2:]
            if name in mixtures
            else weight_of(module).shape[1:]
            for name, module in self._modules.items()
        }
        names = {name: input_names(name, module) for name, module in self._modules.items()}
        self.inputs = InputQuantizer(
            candidates, self.device, shapes, names, self._fail, exact=metric.exact
        )
        head_module = self.model.head.module
        self._head = ScoredHead(
            head=self.model.head,
            name=next((n for n, module in self._modules.items() if module is head_module), None),
            candidates=candidates,
            inputs=self.inputs,
            weight=self._weight,
            formats=head_formats,
        )
        self._amax: Mapping[CalibrationSize, Amax] = {}
        shape = (len(groups), len(candidates.pairs))
        self._squares = torch.zeros(*shape, scored, dtype=torch.float64)
        self._products = torch.zeros(*shape, scored, metric.draws, dtype=torch.float64)
        self._errors = torch.zeros_like(self._squares)
        self._norms = torch.zeros(len(groups), scored, dtype=torch.float64)
        self._loss = torch.zeros(scored, dtype=torch.float64)
        self._experts = {
            name: ExpertTable.empty(len(expert_weights(module)[0]), shape[1], scored)
            for name, module in mixtures.items()
        }
        self._seen: set[str] = set()
        self._failures = Failures()

    def calibrate(self, amax: Mapping[CalibrationSize, Amax]) -> None:
        """Take the calibrated amax, by calibration size."""
        self._amax = amax
        self.inputs.calibrate(amax)

    def run(
        self, window: Sequence[Batch], running: RunningAmax | None, more: Sequence[Batch]
    ) -> None:
        """Run a window of batches forward and backward; score every module on the way.

        Args:
            window: The batches.
            running: Finds amax in the forward pass; none where they are there.
            more: Batches that it needs beside those.
        """
        saved_forwards = self.model.forward(window)
        if running is not None:
            self.model.look(more)
            self.calibrate(running.calibration_sizes(self.team))
        if not window:  # others of the team have all batches
            return
        order = [index for batch in window for index in batch.samples]
        with torch.no_grad():
            head = self._score_head(self._head, saved_forwards)
            self._loss[order] = head.loss
            measured = [head.statistics] if head.statistics is not None else []
            layouts: dict[Unit, BufferLayout] = {}
            for layer in self.model.backward(saved_forwards, head.gradients):
                for unit in dict.fromkeys(rows.unit for rows in layer.values()):
                    if unit not in layouts:
                        layouts[unit] = layout_of(window, self._candidates, self.device, unit)
                    alike = {
                        call: layer.pop(call) for call in list(layer) if layer[call].unit == unit
                    }
                    measured.append(self._layer(alike, layouts[unit]))
            # Read at the end of a window: until here, only mixtures have waited for the device.
            if measured:
                self._book(measured, order)

    def unite(self) -> None:
        """Put together what all processes of the team have found."""
        self.team.add([self._squares, self._products, self._errors, self._norms, self._loss])
        for table in self._experts.values():
            self.team.add([table.per_sample, table.tokens])
        self._seen = unite(self.team, self._seen, self._failures)

    def scores(self, *, seconds: float, padding: float) -> PassScores:
        """Return what all windows found.

        Args:
            seconds: What they took.
            padding: Padded tokens over all tokens, 0 to 1.
        """
        draws = None
        if self._metric.draws:
            # What needs no draw stands in the squares: the head.
            draws = self._products.square() / 2 + self._squares[..., None]
        return PassScores(
            groups=tuple(self._groups),
            per_sample=self._squares if draws is None else draws.mean(dim=-1),
            errors=self._errors,
            norms=self._norms,
            reached=tuple(
                all(name in self._seen for name in group.members) for group in self._groups
            ),
            failures=self._failures,
            loss=self._loss,
            seconds=seconds,
            padding_share=padding,
            amax=self._amax,
            draws=draws,
            experts=self._experts,
        )

    def _layer(
        self, layer: dict[Call, ModuleActivations], layout: BufferLayout
    ) -> SampleStatistics:
        """Score every candidate on modules of one layer whose rows are the same."""
        names = [call.name for call in layer]
        statistics = RowStatistics(len(names), layout, self.device, self._metric.draws)
        read: torch.Tensor | None = None
        for position, call in enumerate(list(layer)):
            rows, name = layer.pop(call), call.name
            if rows.inputs is not read or name in self._experts:  # q, k and v read one object
                read = rows.inputs
                stack = self.inputs.stack(name, read, layout)
            score = self._mixture if name in self._experts else self._module
            with exact_products() if self._metric.exact else nullcontext():
                score(name, rows, statistics, position, stack)
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
        bias = bias_of(self._modules[name])
        if self._metric.exact:
            weight = weight_of(self._modules[name]).flatten(1)
            rows = replace(rows, outputs=F.linear(rows.inputs, weight, bias))
        statistics.norms[position] = row_norms(rows.outputs)
        for index, row_ranges in statistics.layout.row_ranges.items():
            changed = self._weight(name, index, row_ranges)
            if changed is None:
                continue
            given, spans = stack.select(row_ranges)
            self._metric.measure(F.linear(given, changed, bias), rows, spans, statistics, position)

    def _mixture(
        self,
        name: str,
        rows: ModuleActivations,
        statistics: RowStatistics,
        position: int,
        stack: QuantizedInputs,
    ) -> None:
        """Score every candidate on a mixture, and on each of its experts alone."""
        layout, table = statistics.layout, self._experts[name]
        mixture = Mixture(self._modules[name], rows, layout, exact=self._metric.exact)
        # By the products that the candidates go through: others may round otherwise.
        rows = replace(rows, outputs=mixture.outputs())
        statistics.norms[position] = row_norms(rows.outputs)
        order = list(layout.order)
        table.tokens[:, order] += mixture.tokens.cpu()
        for index, row_ranges in layout.row_ranges.items():
            given, spans = stack.select(row_ranges)
            by_start = {
                start: InputRows(start, stack.counts[row_range.input], row_range.input)
                for row_range, (start, _, _) in zip(row_ranges, spans, strict=True)
            }
            pieces = [by_start[start] for start in sorted(by_start)]
            pairs = replace(layout, rows=0, total=mixture.pairs * len(pieces))
            alone = RowStatistics(1, pairs, self.device, self._metric.draws)
            try:
                changed = mixture.change(
                    given,
                    pieces,
                    self._candidates.weights[index],
                    partial(self.inputs.between, name),
                    partial(self._metric.measure, statistics=alone, position=0),
                )
            except Exception as error:
                self._fail(name, [row_range.candidate for row_range in row_ranges], error)
                continue
            self._metric.measure(changed, rows, spans, statistics, position)
            by_piece = alone.measured(0)
            by_piece = by_piece.view(*by_piece.shape[:-1], len(pieces), mixture.pairs)
            at = {piece.start: number for number, piece in enumerate(pieces)}
            for row_range, (start, _, _) in zip(row_ranges, spans, strict=True):
                of_experts = self._metric.of_experts(
                    mixture, by_piece[..., at[start], :], row_range.count
                )
                table.per_sample[:, row_range.candidate, order] = of_experts.cpu()

    def _book(self, measured: Sequence[SampleStatistics], order: list[int]) -> None:
        """Add modules to their groups, in a fixed order."""
        self._seen.update(name for statistics in measured for name in statistics.names)

        def add(total: torch.Tensor, tables: Sequence[tuple[list[str], torch.Tensor]]) -> None:
            if not tables:
                return
            groups = torch.tensor([self._group_of[name] for names, _ in tables for name in names])
            table = torch.cat([each for _, each in tables]).cpu()
            added = table.new_zeros(len(total), *table.shape[1:]).index_add_(0, groups, table)
            total.index_add_(total.ndim - 1, torch.tensor(order), added)

        add(self._squares, [(s.names, s.scores) for s in measured if s.scores is not None])
        add(
            self._products.movedim(-2, -1),
            [(s.names, s.products.movedim(-2, -1)) for s in measured if s.products is not None],
        )
        add(self._errors, [(s.names, s.errors) for s in measured])
        add(self._norms, [(s.names, s.norms) for s in measured])

    def _weight(self, name: str, index: int, row_ranges: Sequence[RowRange]) -> torch.Tensor | None:
        """Return a module's quantized weight; None where that fails, which is noted."""
        try:
            weight, cfg = weight_of(self._modules[name]), self._candidates.weights[index]
            return quantize_weight(weight, cfg, self._fused.amax(name, cfg)).flatten(1)
        except Exception as error:
            self._fail(name, [row_range.candidate for row_range in row_ranges], error)
            return None

    def _fail(self, name: str, candidates: Sequence[int], error: Exception) -> None:
        """Note why a candidate has no score here; the rest of the pass goes on."""
        self._failures.add(name, self._group_of[name], candidates, error)
