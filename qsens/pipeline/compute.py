"""What the GPU steps compute: load, run an engine, write results. Imports torch."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

# Before the libraries that read it: their bars would tear the progress lines.
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qsens.engine import fisher, fused, reference
from qsens.engine.budget import GIB, memory_share, peak, plan_budget, reset_peak
from qsens.engine.calibrate import Maxima
from qsens.engine.calibrate import calibrate as run_calibration
from qsens.engine.candidates import Candidates, Request, distinct
from qsens.engine.captions import read_captions
from qsens.engine.checkpoint import device_name, load_model, load_tokenizer, resolve_device
from qsens.engine.divergence import diverge
from qsens.engine.groups import Group, find_groups
from qsens.engine.quantizer import needs_fallback
from qsens.engine.samples import (
    Samples,
    batch_tokens,
    equal_length_batches,
    nominal_labels,
    tokenize,
)
from qsens.engine.scores import CellScores, GroupScore, PassScores, Progress
from qsens.errors import QsensError, UserError
from qsens.grid import Cell, Plan, calibration_digest
from qsens.manifest import Dataset, dump_json
from qsens.pipeline.cell import keep_failure
from qsens.pipeline.result import build_manifest
from qsens.store import MANIFEST, STATE, Store, write_directory, write_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model with the samples of a cell.

    Attributes:
        model: The model.
        samples: The samples.
        device: Where the model lies.
        seconds: What loading took.
    """

    model: nn.Module
    samples: Samples
    device: torch.device
    seconds: float


@torch.inference_mode(False)
def calibrate_sizes(store: Store, cells: Sequence[Cell], progress: Progress) -> None:
    """Compute the maxima of the sizes of ``cells`` in one run; each cell stands for its size."""
    plan = store.plan
    loaded = load_for(plan, max(cells, key=plan.samples_used), progress)
    groups = find_groups(loaded.model, plan.config.model.vision_patterns)
    counts = sorted({plan.samples_used(cell) for cell in cells})
    found = _calibrate(plan, loaded, groups, counts, progress)
    for cell in cells:
        count = plan.samples_used(cell)
        with write_file(store.calibration(calibration_digest(plan, cell.size))) as temporary:
            save_file(found[count], temporary, metadata={"samples": str(count)})


@torch.inference_mode(False)
def score_reference(store: Store, cell: Cell, progress: Progress) -> None:
    """Compute one cell by ModelOpt's ``auto_quantize``."""
    plan = store.plan
    config = plan.config
    loaded = load_for(plan, cell, progress)
    refused = _without_labels(plan, cell, loaded.samples)
    if refused is not None:
        raise refused
    scores = reference.score_cell(
        loaded.model,
        loaded.samples,
        plan.pair(cell),
        disabled=config.model.vision_patterns,
        sizes=list(config.dataset.sizes.values()),
        scored=plan.samples_scored(cell),
        batch_size=config.autoquant.batch_size,
        method=config.autoquant.method,
        progress=progress,
    )
    _write(store, cell, scores, loaded)


@torch.inference_mode(False)
def score_fused(store: Store, cells: Sequence[Cell], progress: Progress) -> dict[str, QsensError]:
    """Compute all ``cells`` in one pass, and write each one's result.

    Returns:
        The errors of the cells that could not be computed on any group; the others have results.
    """
    plan = store.plan
    config = plan.config
    loaded = load_for(plan, max(cells, key=plan.samples_used), progress)
    model, samples = loaded.model, loaded.samples
    groups = find_groups(model, config.model.vision_patterns)
    sizes = list(config.dataset.sizes.values())
    requests = [request_of(plan, cell) for cell in cells]
    candidates = distinct(requests)
    budget = plan_budget(
        model,
        groups,
        candidates,
        limit_gb=config.autoquant.memory_budget_gb,
        losses=config.autoquant.draws if config.autoquant.method == "fisher" else 1,
    )
    started = time.monotonic()
    maxima = _stored_maxima(store, cells, candidates)
    missing = [count for count in candidates.snapshots() if count not in maxima]
    in_passing = (
        not maxima
        and config.autoquant.method != "kl_div"
        and fused.calibrates(model, samples, candidates, boundaries=sizes, budget=budget)
    )
    if missing and not in_passing:
        maxima |= _calibrate(plan, loaded, groups, missing, progress)
    calibrated = time.monotonic() - started
    log.info(
        "%d cells, %d candidates, at most %d tokens at once; memory above the weights: "
        "%.2f GiB predicted of %.2f GiB",
        len(cells),
        len(candidates.pairs),
        budget.max_tokens,
        budget.predicted / GIB,
        budget.limit / GIB,
    )
    before = reset_peak(loaded.device)
    known = None if in_passing else maxima
    if config.autoquant.method == "gradient":
        measure = partial(fused.score, maxima=known)
    elif config.autoquant.method == "fisher":
        draws, seed = config.autoquant.draws, config.autoquant.seed
        measure = partial(fisher.estimate, maxima=known, draws=draws, seed=seed)
    else:
        measure = partial(diverge, maxima=maxima)
    found = measure(
        model, samples, groups, candidates, boundaries=sizes, budget=budget, progress=progress
    )
    taken = max(0, peak(loaded.device) - before)
    log.info("memory above the weights: %.2f GiB taken at most", taken / GIB)
    timings = {"calibrate": calibrated, "score": found.seconds}
    memory = {"predicted": budget.predicted / GIB, "peak": taken / GIB}
    failed: dict[str, QsensError] = {}
    for cell, request in zip(cells, requests, strict=True):
        refused = _without_labels(plan, cell, samples)
        if refused is not None:
            failed[cell.cell] = refused
            keep_failure(store, cell, refused)
            continue
        scores = _cell_scores(plan, cell, request, groups, candidates, found, loaded)
        reasons = [entry.reason for entry in scores.groups if entry.status == "failed"]
        if reasons and len(reasons) == len(found.groups):
            failed[cell.cell] = UserError(
                str(reasons[0]),
                where=cell.cell,
                remedy=f"Mend the pair '{cell.pair}', or leave it out.",
            )
            keep_failure(store, cell, failed[cell.cell])
            continue
        _write(store, cell, scores, loaded, timings, memory)
    return failed


@torch.inference_mode(False)
def both_engines(
    store: Store, cell: Cell, progress: Progress
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Score ``cell`` by the fused engine and by ModelOpt, on the same batches.

    Returns:
        Sensitivities by group name, ours and ModelOpt's, and the seconds of each engine's
        calibration and score together.
    """
    plan = store.plan
    config = plan.config
    loaded = load_for(plan, cell, progress)
    model, samples = loaded.model, loaded.samples
    groups = find_groups(model, config.model.vision_patterns)
    scored, batch_size = plan.samples_scored(cell), config.autoquant.batch_size
    sizes = list(config.dataset.sizes.values())
    request = request_of(plan, cell)
    candidates = distinct([request])
    started = time.monotonic()
    maxima: dict[int, Maxima] = {}
    batches = equal_length_batches(samples, boundaries=[*sizes, scored], batch_size=batch_size)
    if candidates.snapshots():
        maxima = run_calibration(
            model, samples, groups, snapshots=candidates.snapshots(), batches=batches
        )
    found = fused.score(model, samples, groups, candidates, maxima, batches=batches)
    seconds = {"fused": time.monotonic() - started}
    ours = _cell_scores(plan, cell, request, groups, candidates, found, loaded)
    started = time.monotonic()
    theirs = reference.score_cell(
        model,
        samples,
        plan.pair(cell),
        disabled=config.model.vision_patterns,
        sizes=sizes,
        scored=scored,
        batch_size=batch_size,
        progress=progress,
    )
    seconds["modelopt"] = time.monotonic() - started
    return _by_name(ours), _by_name(theirs), seconds


def _by_name(scores: CellScores) -> dict[str, float]:
    return {
        entry.group.name: entry.sensitivity
        for entry in scores.groups
        if entry.sensitivity is not None
    }


def load_for(plan: Plan, cell: Cell, progress: Progress) -> Loaded:
    """Load the model and the samples of ``cell``."""
    config = plan.config
    device = resolve_device(config.autoquant.device)
    progress("load", 0, 1)
    started = time.monotonic()
    captions = read_captions(plan.samples[cell.size].path, cell.size)[: plan.samples_used(cell)]
    samples = tokenize(captions, load_tokenizer(config.model), longest=config.dataset.calib_seq_len)
    model = load_model(config.model, device)
    progress("load", 1, 1)
    if device.type == "cpu" and config.model.dtype == "bfloat16":
        log.warning("bfloat16 on a CPU is slow: set model.dtype=float32 for work on a CPU")
    return Loaded(model, samples, device, time.monotonic() - started)


def request_of(plan: Plan, cell: Cell) -> Request:
    """Return what ``cell`` asks of a pass."""
    pair = plan.pair(cell)
    return Request(
        cell=cell.cell,
        weight=pair.weight_quantizer.modelopt(),
        input=pair.input_quantizer.modelopt() if pair.input_quantizer else None,
        calibrated=plan.samples_used(cell),
        scored=plan.samples_scored(cell),
    )


def _without_labels(plan: Plan, cell: Cell, samples: Samples) -> UserError | None:
    """Refuse a gradient of nothing: its zeros would not be measured."""
    scored = plan.samples_scored(cell)
    if plan.config.autoquant.method != "gradient" or any(samples.labels(scored)):
        return None
    return UserError(
        f"none of its {scored} samples has a second token: there is nothing to predict",
        where=f"{cell.cell}: captions file {plan.samples[cell.size].path}",
        remedy="Use longer captions.",
    )


def _stored_maxima(
    store: Store, cells: Sequence[Cell], candidates: Candidates
) -> dict[int, Maxima]:
    """Read the maxima that ``calibrate`` has left, by sample count."""
    found: dict[int, Maxima] = {}
    by_count = {store.plan.samples_used(cell): cell.size for cell in cells}
    for count in candidates.snapshots():
        path = store.calibration(calibration_digest(store.plan, by_count[count]))
        if path.is_file():
            found[count] = load_file(path)
    return found


def _calibrate(
    plan: Plan,
    loaded: Loaded,
    groups: Sequence[Group],
    counts: Sequence[int],
    progress: Progress,
) -> dict[int, Maxima]:
    share = memory_share()
    return run_calibration(
        loaded.model,
        loaded.samples,
        groups,
        snapshots=counts,
        boundaries=list(plan.config.dataset.sizes.values()),
        # What does not fit in one batch goes through in several: no maximum depends on it.
        max_tokens=int(batch_tokens(loaded.device) * share) if share < 1 else None,
        progress=progress,
    )


def _cell_scores(
    plan: Plan,
    cell: Cell,
    request: Request,
    groups: Sequence[Group],
    candidates: Candidates,
    found: PassScores,
    loaded: Loaded,
) -> CellScores:
    """Read one cell's scores off a pass."""
    index = candidates.of_cell[cell.cell]
    scored = request.scored
    per_sample = found.per_sample[:, index, :scored]
    labels = loaded.samples.labels(scored)
    nominal = torch.tensor(
        nominal_labels(loaded.samples, scored=scored, batch_size=plan.config.autoquant.batch_size),
        dtype=torch.float64,
    ).clamp_min(1)
    if plan.config.autoquant.method == "gradient":
        sensitivity = (per_sample / nominal.square()).sum(dim=1)
        per_token = per_sample.sum(dim=1) / max(1, sum(labels))
    else:
        sensitivity = per_sample.sum(dim=1)
        per_token = sensitivity / loaded.samples.tokens(scored)
    kl_div = plan.config.autoquant.method == "kl_div"
    unreached = "no sample ran through it" if kl_div else "no gradient reached it"
    spread = None
    if found.draws is not None:
        drawn = found.draws[:, index, :scored]
        spread = (drawn.var(dim=-1) / drawn.shape[-1]).sum(dim=1).sqrt()
        spread /= loaded.samples.tokens(scored)
    errors = found.relative_errors(index, scored)
    at = {group.name: position for position, group in enumerate(found.groups)}
    entries = []
    for group in groups:
        if not group.covered:
            entries.append(GroupScore(group, "disabled", "outside the coverage"))
            continue
        position = at[group.name]
        if (position, index) in found.failures:
            entries.append(GroupScore(group, "failed", found.failures[position, index]))
        elif not found.reached[position]:
            entries.append(GroupScore(group, "no_gradient", unreached))
        elif not bool(per_sample[position].isfinite().all()):
            first = int((~per_sample[position].isfinite()).nonzero()[0, 0])
            entries.append(
                GroupScore(group, "non_finite", f"not finite, first at sample {first + 1}")
            )
        else:
            entries.append(
                GroupScore(
                    group,
                    "scored",
                    sensitivity=float(sensitivity[position]),
                    sensitivity_per_token=float(per_token[position]),
                    relative_error=None if errors is None else float(errors[position]),
                    standard_error=None if spread is None else float(spread[position]),
                )
            )
    snapshot = candidates.inputs[candidates.pairs[index][1]].snapshot
    calibrated = found.maxima[snapshot] if snapshot is not None else {}
    notices = []
    if any(needs_fallback(cfg) for cfg in (request.weight, request.input) if cfg is not None):
        notices.append("ModelOpt's own quantizer computed this format")
    if len(candidates.of_cell) > 1:
        notices.append(f"computed in one pass with {len(candidates.of_cell) - 1} other cells")
    return CellScores(
        groups=tuple(entries),
        module_types={
            name: f"Quant{type(loaded.model.get_submodule(name)).__name__}"
            for group in groups
            for name in group.members
        },
        tensors={
            "per_sample": per_sample.contiguous(),
            "label_tokens": torch.tensor(labels, dtype=torch.int64),
            "loss": found.loss[:scored].contiguous(),
            **{f"amax.input.{name}": value for name, value in calibrated.items()},
        },
        timings={},
        padding_share=found.padding_share,
        notices=tuple(notices),
    )


def _write(
    store: Store,
    cell: Cell,
    scores: CellScores,
    loaded: Loaded,
    timings: Mapping[str, float] | None = None,
    memory: Mapping[str, float] | None = None,
) -> None:
    manifest = build_manifest(
        store.plan,
        cell,
        scores,
        dataset=_dataset(store.plan, cell, loaded.samples, scores.padding_share),
        device=device_name(loaded.device),
        timings={"load": loaded.seconds, **scores.timings, **(timings or {})},
        memory=memory or {},
    )
    names = [entry.group.name for entry in scores.groups if entry.group.covered]
    with write_directory(store.result_dir(cell), last=MANIFEST) as directory:
        save_file(
            dict(scores.tensors),
            directory / STATE,
            metadata={"cell": cell.cell, "groups": "\n".join(names)},
        )
        text = dump_json(manifest.model_dump(mode="json"))
        (directory / MANIFEST).write_text(text, encoding="utf-8")
    store.failure(cell).unlink(missing_ok=True)


def _dataset(plan: Plan, cell: Cell, samples: Samples, padding_share: float) -> Dataset:
    config = plan.config.dataset
    used, scored = plan.samples_used(cell), plan.samples_scored(cell)
    return Dataset(
        name=config.name,
        path=str(plan.samples[cell.size].path),
        digest=plan.samples[cell.size].digest,
        modality=cell.modality,
        size=cell.size,
        samples_asked=config.asked(cell.size),
        samples_used=used,
        samples_scored=scored,
        tokens=samples.tokens(used),
        label_tokens=sum(samples.labels(scored)),
        padding_share=padding_share,
        truncated=sum(samples.truncated[:used]),
        calib_seq_len=config.calib_seq_len,
    )
