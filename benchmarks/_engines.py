"""Both engines, run by the same rules: seconds by phase, peak of memory, a score a group."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import modelopt.torch.quantization as mtq
import torch
from torch import nn

from benchmarks._floor import Work, count_work
from benchmarks._machine import Measured, measure, synchronize
from benchmarks._workload import Cell, Workload
from qsens.checkpoint.groups import Group, find_groups
from qsens.checkpoint.structure import head_of
from qsens.config import AutoquantConfig
from qsens.data.samples import Batch, Samples, equal_length_batches, make_batch, nominal_labels
from qsens.engine.amax import calibrate
from qsens.engine.candidates import Candidates, Request, distinct
from qsens.engine.gradient import scorer
from qsens.engine.modelopt import reference
from qsens.engine.modelopt.quantizers import on_cpu
from qsens.engine.scores import PassScores
from qsens.engine.scoring_pass import run_pass
from qsens.names import GROUP_SUFFIX

Baseline = Literal["longest", "padded512", "padded_left", "reference"]
Scores = dict[str, dict[str, float]]
"""By cell, by group: ``sum_i s_i / T_b(i)^2``. What could not be scored is left out."""
_IGNORED = -100  # a label that the loss leaves out


@dataclass(frozen=True)
class FusedRun:
    """What the fused engine took for its cells, and what it found.

    Attributes:
        measured: Seconds and memory.
        scores: By cell, by group.
        candidates: Distinct candidates.
        calibrated: Samples that calibration ran over; 0 where none is needed.
        work: The products that no engine can do without.
        padding_share: Padded tokens over all tokens of the scoring pass.
    """

    measured: Measured
    scores: Scores
    candidates: int
    calibrated: int
    work: Work
    padding_share: float


@dataclass(frozen=True)
class ModelOptRun:
    """What ModelOpt took for one cell, and what it found.

    Attributes:
        measured: Seconds and memory.
        scores: By group.
        padding_share: Padded tokens over all tokens of the calibration.
    """

    measured: Measured
    scores: dict[str, float]
    padding_share: float


def run_fused(load: Workload, cells: Sequence[Cell], *, samples: Samples | None = None) -> FusedRun:
    """Calibrate and score all ``cells`` in one go.

    Args:
        load: The workload.
        cells: What to compute.
        samples: Other samples than those of the workload.
    """
    samples = samples or load.samples
    groups = find_groups(load.model, load.disabled)
    with measure(load.device) as measured:
        done = run_pass(
            load.model,
            samples,
            groups,
            [request(cell) for cell in cells],
            AutoquantConfig(),
            boundaries=load.boundaries(),
        )
    measured.seconds = dict(done.seconds)
    return FusedRun(
        measured=measured,
        scores=_sensitivities(load, cells, done.candidates, done.scores, samples),
        candidates=len(done.candidates.pairs),
        calibrated=max(done.candidates.calibration_sizes(), default=0),
        work=_work(load, samples, groups, done.candidates),
        padding_share=done.scores.padding_share,
    )


def run_fused_on_reference_batches(load: Workload, cells: Sequence[Cell]) -> Scores:
    """Score ``cells`` on the very batches that the reference engine runs."""
    groups = find_groups(load.model, load.disabled)
    candidates = distinct([request(cell) for cell in cells])
    batches = equal_length_batches(
        load.samples,
        boundaries=[*load.boundaries(), *(cell.scored for cell in cells)],
        batch_size=load.batch_size,
    )
    calibration_sizes, amax = candidates.calibration_sizes(), {}
    if calibration_sizes:
        amax = calibrate(
            load.model, load.samples, groups, calibration_sizes=calibration_sizes, batches=batches
        )
    scores = scorer.score(load.model, load.samples, groups, candidates, amax, batches=batches)
    return _sensitivities(load, cells, candidates, scores, load.samples)


def run_modelopt(load: Workload, cell: Cell, baseline: Baseline) -> ModelOptRun:
    """Run one ``mtq.auto_quantize``, on a fresh copy of the model that costs no seconds."""
    model = copy.deepcopy(load.model)
    head = _head(load.samples, cell.calibrated)
    try:
        if baseline == "reference":
            return _run_reference(load, model, head, cell)
        width = 512 if baseline == "padded512" else None
        return _run_padded(load, model, head, cell, width, left=baseline == "padded_left")
    finally:
        del model
        if load.device.type == "cuda":
            torch.cuda.empty_cache()


def warm_up(load: Workload, cells: Sequence[Cell], baseline: Baseline | None) -> dict[str, float]:
    """Run both engines on two samples of each pair, so that no first call is measured.

    Returns:
        Seconds by what was warmed up; building ModelOpt's CUDA extensions stands alone.
    """
    pairs = {cell.pair.name: cell.pair for cell in cells}
    small = replace(load, samples=_head(load.samples, 2))
    tiny = [Cell(pair, "warm", 2, 2) for pair in pairs.values()]
    seconds = {}
    started = time.monotonic()
    run_fused(small, tiny)
    seconds["fused"] = time.monotonic() - started
    if baseline is None:
        return seconds
    if load.device.type == "cuda":
        from modelopt.torch.quantization.extensions import precompile

        started = time.monotonic()
        with _quiet():
            precompile()
        seconds["extensions"] = time.monotonic() - started
    started = time.monotonic()
    for cell in tiny:
        run_modelopt(small, cell, baseline)
    seconds["modelopt"] = time.monotonic() - started
    return seconds


def agreement(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, Any]:
    """Return how far two scores of the same groups are apart, relative to ``theirs``."""
    names = [name for name in theirs if name in ours]
    differences = sorted(
        abs(ours[name] - theirs[name]) / abs(theirs[name]) for name in names if theirs[name]
    )
    return {
        "groups": len(names),
        "only_one": len(set(ours) ^ set(theirs)),
        "median": differences[len(differences) // 2] if differences else None,
        "max": differences[-1] if differences else None,
        "spearman": spearman([ours[name] for name in names], [theirs[name] for name in names]),
    }


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Return the rank correlation; none for fewer than two values. Ties are not averaged."""
    if len(left) < 2:
        return None
    ranks = [torch.tensor(side).argsort().argsort().double() for side in (left, right)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _run_reference(load: Workload, model: nn.Module, samples: Samples, cell: Cell) -> ModelOptRun:
    with measure(load.device) as measured, _quiet():
        started = time.monotonic()
        result = reference.score_cell(
            model,
            samples,
            cell.pair,
            vision=load.disabled,
            sizes=load.boundaries(),
            scored=cell.scored,
            batch_size=load.batch_size,
        )
        synchronize(load.device)
        total = time.monotonic() - started
    calibrated = result.timings["calibrate"]
    measured.seconds = {"calibrate": calibrated, "score": total - calibrated}
    scores = {
        entry.group.name: entry.sensitivity
        for entry in result.groups
        if entry.sensitivity is not None
    }
    return ModelOptRun(measured, scores, 0.0)


def _run_padded(
    load: Workload,
    model: nn.Module,
    samples: Samples,
    cell: Cell,
    width: int | None,
    *,
    left: bool,
) -> ModelOptRun:
    """Run ModelOpt as its examples do: consecutive samples, padded, with the mean loss."""
    model.requires_grad_(True)  # as a model comes from its checkpoint
    device = load.device
    starts = range(0, len(samples), load.batch_size)
    batches = []
    for start in starts:
        stop = min(start + load.batch_size, len(samples))
        batch = make_batch(samples, range(start, stop), width)
        if left:
            batch = _padded_left(batch)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, _IGNORED)
        batches.append(
            {
                "input_ids": batch.input_ids,
                "attention_mask": batch.attention_mask,
                "labels": labels,
            }
        )
    calibrated: list[float] = []

    def forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        if torch.is_grad_enabled() and not calibrated:
            synchronize(device)
            calibrated.append(time.monotonic())
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        return model(**moved, use_cache=False)

    config = cell.pair.modelopt()
    with measure(device) as measured, _quiet(), torch.enable_grad():
        started = time.monotonic()
        _, state = mtq.auto_quantize(
            model,
            constraints={
                "effective_bits": max(8.0, cell.pair.effective_bits),
                "cost": {"excluded_module_name_patterns": list(load.disabled)},
            },
            quantization_formats=[on_cpu(config) if device.type == "cpu" else config],
            data_loader=batches,
            forward_step=forward,
            loss_func=lambda output, batch: output.loss,
            disabled_layers=list(load.disabled),
            num_calib_steps=len(batches),
            num_score_steps=-(-cell.scored // load.batch_size),
            verbose=False,
        )
        synchronize(device)
        ended = time.monotonic()
    measured.seconds = {"calibrate": calibrated[0] - started, "score": ended - calibrated[0]}
    covered = {group.name for group in find_groups(load.model, load.disabled) if group.covered}
    scores = {}
    for name, stats in state["candidate_stats"].items():
        group = name.removesuffix(GROUP_SUFFIX)
        if group in covered:  # of one format, the first score is raw
            scores[group] = float(stats["scores"][0])
    run_through = sum(batch["input_ids"].numel() for batch in batches)
    return ModelOptRun(measured, scores, 1 - samples.tokens() / run_through)


def _padded_left(batch: Batch) -> Batch:
    """Move the padding of a batch to the left, as many tokenizers of language models set it."""
    lengths = batch.attention_mask.sum(dim=1)
    width = batch.attention_mask.shape[1]
    shift = (torch.arange(width)[None, :] - (width - lengths)[:, None]) % width
    return Batch(
        batch.samples, batch.input_ids.gather(1, shift), batch.attention_mask.gather(1, shift)
    )


def request(cell: Cell) -> Request:
    """Return what a cell asks of a pass."""
    pair = cell.pair
    return Request(
        cell=cell.name,
        weight=pair.weight_quantizer.cfg(),
        input=pair.input_quantizer.cfg() if pair.input_quantizer else None,
        calibrated=cell.calibrated,
        scored=cell.scored,
    )


def _sensitivities(
    load: Workload,
    cells: Sequence[Cell],
    candidates: Candidates,
    pass_scores: PassScores,
    samples: Samples,
) -> Scores:
    scores: Scores = {}
    for cell in cells:
        labels = nominal_labels(samples.labels(cell.scored), load.batch_size)
        index = candidates.of_cell[cell.name]
        weights = torch.tensor(labels, dtype=torch.float64).clamp_min(1).square()
        sums = (pass_scores.per_sample[:, index, : cell.scored] / weights).sum(dim=1).tolist()
        scores[cell.name] = {
            group.name: value
            for position, (group, value) in enumerate(zip(pass_scores.groups, sums, strict=True))
            if (position, index) not in pass_scores.failures.refused
            and pass_scores.reached[position]
            and math.isfinite(value)
        }
    return scores


def _work(
    load: Workload, samples: Samples, groups: Sequence[Group], candidates: Candidates
) -> Work:
    head: nn.Module = head_of(load.model)
    weight: torch.Tensor = head.weight  # type: ignore[assignment]
    names = {name for name, module in load.model.named_modules() if module is head}
    return count_work(
        [len(ids) for ids in samples.ids],
        weights=sum(
            group.weights for group in groups if group.covered and not names & {*group.members}
        ),
        head=weight.numel(),
        calibrated=max(candidates.calibration_sizes(), default=0),
        scored=candidates.scored,
    )


def _head(samples: Samples, count: int) -> Samples:
    return Samples(ids=samples.ids[:count], truncated=samples.truncated[:count])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep ModelOpt's bars and hints out of the tables."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
