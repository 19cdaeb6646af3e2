"""What the GPU steps compute: load, run an engine, write results. Imports torch."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

# Before the libraries that read it: their bars would tear the progress lines.
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from safetensors.torch import save

from qsens.checkpoint.loading import device_name
from qsens.data.samples import Samples, equal_length_batches
from qsens.engine.amax import Amax
from qsens.engine.amax import calibrate as run_calibration
from qsens.engine.candidates import Request, distinct
from qsens.engine.gradient import scorer
from qsens.engine.scores import CellScores, Progress
from qsens.engine.scoring_pass import calibrate, run_pass
from qsens.errors import QsensError, UserError
from qsens.grid import CellSpec, Plan
from qsens.pipeline.cell_scores import cell_scores
from qsens.pipeline.failures import keep_failure
from qsens.pipeline.loading import (
    Loaded,
    dataset_of,
    groups_of,
    load,
    load_checkpoint,
    with_samples,
)
from qsens.pipeline.result import build_manifest
from qsens.pipeline.shared_checkpoint import SharedCheckpoint
from qsens.pipeline.stored_amax import read_calibrated, write_calibrated
from qsens.store import Store


@torch.inference_mode(False)
def calibrate_sizes(store: Store, cells: Sequence[CellSpec], progress: Progress) -> None:
    """Compute the amax that ``cells`` read: one run over the samples of each modality."""
    plan = store.plan
    checkpoint = load_checkpoint(plan, progress)
    for share in by_modality(cells):
        loaded = with_samples(plan, _longest(share), checkpoint)
        groups = groups_of(plan, widest(plan.cells, share[0]), loaded.model)
        counts = sorted({cell.used for cell in share})
        bounds = _longest(share).boundaries
        amax = calibrate(loaded.model, loaded.samples, groups, counts, bounds, progress)
        for cell in share:
            write_calibrated(store, cell, amax[cell.used])


@torch.inference_mode(False)
def score_reference(store: Store, cell: CellSpec, progress: Progress) -> None:
    """Compute one cell by ModelOpt's ``auto_quantize``."""
    from qsens.engine.modelopt import reference  # imports ModelOpt, which takes seconds

    plan = store.plan
    config = plan.config
    loaded = load(plan, cell, progress)
    refused = _without_labels(plan, cell, loaded.samples)
    if refused is not None:
        raise refused
    scores = reference.score_cell(
        loaded.model,
        loaded.samples,
        cell.precision,
        vision=config.model.vision_patterns,
        all_layers=cell.coverage == "all_layers",
        sizes=cell.boundaries,
        scored=cell.scored,
        batch_size=config.autoquant.batch_size,
        method=config.autoquant.method,
        progress=progress,
    )
    _write(store, cell, scores, loaded)


@torch.inference_mode(False)
def score_fused(
    store: Store, cells: Sequence[CellSpec], progress: Progress, shared: SharedCheckpoint
) -> dict[str, QsensError]:
    """Compute all ``cells``, in one pass for each modality, and write each one's result.

    Args:
        store: Where results lie.
        cells: The cells; the modality of the first comes first.
        progress: Called as work goes on.
        shared: The checkpoint.

    Returns:
        The errors of the cells that could not be computed on any group; the others have results.
    """
    checkpoint = shared.load(progress)
    failed: dict[str, QsensError] = {}
    for share in by_modality(cells):
        try:
            loaded = with_samples(store.plan, _longest(share), checkpoint)
            failed |= _score_pass(store, share, loaded, progress)
        except QsensError as error:
            for cell in share:
                failed[cell.cell] = error
                keep_failure(store, cell, error)
    return failed


def by_modality(cells: Sequence[CellSpec]) -> list[list[CellSpec]]:
    """Return the cells that read the same samples, each of their own size, together."""
    shares: dict[str, list[CellSpec]] = {}
    for cell in cells:
        shares.setdefault(cell.modality, []).append(cell)
    return list(shares.values())


def _longest(cells: Sequence[CellSpec]) -> CellSpec:
    """Return the cell with the most samples."""
    return max(cells, key=lambda cell: cell.taken)


def widest(cells: Sequence[CellSpec], like: CellSpec) -> CellSpec:
    """Return the cell that covers most of those with the modality of ``like``."""
    alike = [cell for cell in cells if cell.modality == like.modality]
    return next((cell for cell in alike if cell.coverage == "all_layers"), like)


def _score_pass(
    store: Store, cells: Sequence[CellSpec], loaded: Loaded, progress: Progress
) -> dict[str, QsensError]:
    """Compute cells of one modality in one pass; the tower is scored where one of them covers it.

    A cell that does not cover it has the same numbers either way.
    """
    plan = store.plan
    model, samples = loaded.model, loaded.samples
    groups = groups_of(plan, widest(cells, cells[0]), model)
    requests = [request_of(cell) for cell in cells]
    done = run_pass(
        model,
        samples,
        groups,
        requests,
        plan.config.autoquant,
        boundaries=_longest(cells).boundaries,
        calibrated=lambda asked: read_calibrated(store, cells, asked.calibration_sizes()),
        progress=progress,
    )
    candidates, pass_scores = done.candidates, done.scores
    failed: dict[str, QsensError] = {}
    for cell, request in zip(cells, requests, strict=True):
        fault = pass_scores.failures.fault(candidates.of_cell[cell.cell], cell.cell)
        refused: QsensError | None = _without_labels(plan, cell, samples) or fault
        if refused is not None:
            failed[cell.cell] = refused
            keep_failure(store, cell, refused)
            continue
        scores = cell_scores(plan, cell, request, candidates, pass_scores, loaded)
        reasons = [entry.reason for entry in scores.groups if entry.status == "failed"]
        if reasons and len(reasons) == sum(entry.group.covered for entry in scores.groups):
            failed[cell.cell] = UserError(
                str(reasons[0]),
                where=cell.cell,
                remedy=f"Mend the pair '{cell.pair}', or leave it out.",
            )
            keep_failure(store, cell, failed[cell.cell])
            continue
        _write(store, cell, scores, loaded, done.seconds, done.memory())
    return failed


@torch.inference_mode(False)
def both_engines(
    store: Store, cell: CellSpec, progress: Progress
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Score ``cell`` by the fused engine and by ModelOpt, on the same batches.

    Returns:
        Sensitivities by group name, ours and ModelOpt's, and the seconds of each engine's
        calibration and score together.
    """
    from qsens.engine.modelopt import reference  # imports ModelOpt, which takes seconds

    plan = store.plan
    config = plan.config
    loaded = load(plan, cell, progress)
    model, samples = loaded.model, loaded.samples
    groups = groups_of(plan, cell, model)
    reference.check_device(model, groups, cell.precision)
    refused = _without_labels(plan, cell, samples)
    if refused is not None:
        raise refused
    scored, batch_size = cell.scored, config.autoquant.batch_size
    sizes = cell.boundaries
    request = request_of(cell)
    candidates = distinct([request])
    started = time.monotonic()
    amax: dict[int, Amax] = {}
    batches = equal_length_batches(samples, boundaries=[*sizes, scored], batch_size=batch_size)
    if candidates.calibration_sizes():
        amax = run_calibration(
            model,
            samples,
            groups,
            calibration_sizes=candidates.calibration_sizes(),
            batches=batches,
        )
    pass_scores = scorer.score(model, samples, groups, candidates, amax, batches=batches)
    seconds = {"fused": time.monotonic() - started}
    ours = cell_scores(plan, cell, request, candidates, pass_scores, loaded)
    started = time.monotonic()
    theirs = reference.score_cell(
        model,
        samples,
        cell.precision,
        vision=config.model.vision_patterns,
        all_layers=cell.coverage == "all_layers",
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


def request_of(cell: CellSpec) -> Request:
    """Return what ``cell`` asks of a pass."""
    pair = cell.precision
    return Request(
        cell=cell.cell,
        weight=pair.weight_quantizer.modelopt(),
        input=pair.input_quantizer.modelopt() if pair.input_quantizer else None,
        calibrated=cell.used,
        scored=cell.scored,
    )


def _without_labels(plan: Plan, cell: CellSpec, samples: Samples) -> UserError | None:
    """Refuse a gradient of nothing: its zeros would not be measured."""
    scored = cell.scored
    if plan.config.autoquant.method != "gradient" or any(samples.labels(scored)):
        return None
    return UserError(
        f"none of its {scored} samples has a second token: there is nothing to predict",
        where=f"{cell.cell}: samples file {cell.samples.path}",
        remedy="Use longer captions.",
    )


def _write(
    store: Store,
    cell: CellSpec,
    scores: CellScores,
    loaded: Loaded,
    timings: Mapping[str, float] | None = None,
    memory: Mapping[str, float] | None = None,
) -> None:
    manifest = build_manifest(
        store.plan,
        cell,
        scores,
        dataset=dataset_of(store.plan, cell, loaded.samples, scores.padding_share),
        device=device_name(loaded.device),
        timings={"load": loaded.seconds, **scores.timings, **(timings or {})},
        memory=memory or {},
        notices=loaded.notices,
    )
    names = [entry.group.name for entry in scores.groups if entry.group.covered]
    known = {"cell": cell.cell, "groups": "\n".join(names), "modality": cell.modality}
    store.write_result(cell, manifest, save(dict(scores.tensors), metadata=known))
