"""What the GPU steps compute: load, run an engine, write results. Imports torch."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

# Before the libraries that read it: their bars would tear the progress lines.
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from safetensors.torch import save

from qsens.cells import CalibrationSet, CellSpec
from qsens.checkpoint.loading import device_name
from qsens.data.samples import Samples, equal_length_batches
from qsens.engine.amax import Amax, AmaxBySize
from qsens.engine.amax import calibrate as run_calibration
from qsens.engine.candidates import Candidates, distinct
from qsens.engine.gradient import scorer
from qsens.engine.scores import CellScores, Progress
from qsens.engine.scoring_pass import calibrate, run_pass
from qsens.errors import QsensError, UserError
from qsens.grid import Plan
from qsens.pipeline.cell_scores import Share, cell_scores
from qsens.pipeline.failures import keep_failure
from qsens.pipeline.loading import (
    Checkpoint,
    Loaded,
    dataset_of,
    groups_of,
    load_whole,
    request_of,
    together,
    widest,
    with_set,
)
from qsens.pipeline.result import build_manifest
from qsens.pipeline.shared_checkpoint import SharedCheckpoint
from qsens.pipeline.stored_amax import largest, read_calibrated, size_of, write_calibrated
from qsens.store import Store


@torch.inference_mode(False)
def calibrate_sizes(
    store: Store, cells: Sequence[CellSpec], progress: Progress, shared: SharedCheckpoint
) -> None:
    """Compute the amax that ``cells`` read: one run over the samples of each data set."""
    found = _calibrated(store, cells, shared.load(progress), progress)
    for cell in cells:
        write_calibrated(store, cell, found[cell.calibration])


def _calibrated(
    store: Store, cells: Sequence[CellSpec], checkpoint: Checkpoint, progress: Progress
) -> dict[str, Amax]:
    """Return the amax that ``cells`` read, by digest: those that are there, the others computed."""
    plan = store.plan
    found = read_calibrated(store, (one.calibration for cell in cells for one in cell.sets))
    for share in by_set(cells):
        missing = [one for _, one in share if one.calibration not in found]
        if not missing:
            continue
        longest = _longest(missing)
        loaded = with_set(plan, longest, checkpoint)
        groups = groups_of(plan, widest(plan.cells, share[0][0]), loaded.model)
        counts = sorted({one.used for one in missing})
        bounds = longest.boundaries
        amax = calibrate(loaded.model, loaded.samples, groups, counts, bounds, progress)
        found |= {one.calibration: amax[one.used] for one in missing}
    for cell in cells:
        if cell.calibration not in found:
            found[cell.calibration] = largest(found[one.calibration] for one in cell.sets)
    return found


@torch.inference_mode(False)
def score_reference(store: Store, cell: CellSpec, progress: Progress) -> None:
    """Compute one cell by ModelOpt's ``auto_quantize``."""
    from qsens.engine.modelopt import reference  # imports ModelOpt, which takes seconds

    plan = store.plan
    config = plan.config
    loaded = load_whole(plan, cell, progress)
    refused = _without_labels(plan, cell, cell.sets[0], loaded.samples)
    if refused is not None:
        raise refused
    scores = reference.score_cell(
        loaded.model,
        loaded.samples,
        cell.precision,
        vision=config.model.vision_patterns,
        all_layers=cell.coverage == "all_layers",
        sizes=cell.sets[0].boundaries,
        scored=cell.scored,
        batch_size=config.autoquant.batch_size,
        method=config.autoquant.method,
        progress=progress,
    )
    _write(store, cell, scores, [loaded])


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
    united = [cell for cell in cells if len(cell.sets) > 1 and cell.needs_calibration]
    given = read_calibrated(store, (cell.calibration for cell in united))
    missing = [cell for cell in united if cell.calibration not in given]
    given |= _calibrated(store, missing, checkpoint, progress) if missing else {}
    found: dict[str, list[Share]] = {cell.cell: [] for cell in cells}
    for share in by_set(cells):
        share = [(cell, one) for cell, one in share if cell.cell not in failed]
        if not share:
            continue
        try:
            loaded = with_set(store.plan, _longest([one for _, one in share]), checkpoint)
            shares = _score_set(store, share, loaded, given, progress)
        except QsensError as error:
            failed |= _failed(store, [cell for cell, _ in share], error)
            continue
        for cell, of_set in zip((cell for cell, _ in share), shares, strict=True):
            fault = of_set.found.failures.fault(of_set.index, cell.cell)
            refused = _without_labels(store.plan, cell, of_set.of, loaded.samples) or fault
            if refused is not None:
                failed |= _failed(store, [cell], refused)
                continue
            found[cell.cell].append(of_set)
            if len(found[cell.cell]) == len(cell.sets):
                failed |= _finish(store, cell, found.pop(cell.cell))
    return failed


def by_set(cells: Sequence[CellSpec]) -> list[list[tuple[CellSpec, CalibrationSet]]]:
    """Return cells with what they read of each data set, those of the same samples together."""
    shares: dict[tuple[str, str], list[tuple[CellSpec, CalibrationSet]]] = {}
    for cell in cells:
        for one in cell.sets:
            shares.setdefault((one.modality, one.dataset.name), []).append((cell, one))
    return list(shares.values())


def _longest(sets: Sequence[CalibrationSet]) -> CalibrationSet:
    """Return the one with the most samples."""
    return max(sets, key=lambda one: one.taken)


def _score_set(
    store: Store,
    share: Sequence[tuple[CellSpec, CalibrationSet]],
    loaded: Loaded,
    given: Mapping[str, Amax],
    progress: Progress,
) -> list[Share]:
    """Score one data set for cells in one pass; the tower too where one of them covers it.

    A cell that does not cover it has the same numbers either way.

    Args:
        store: Where results lie.
        share: The cells, with what they read of it.
        loaded: Its samples, as many as the longest of them asks for.
        given: Amax over several data sets, by digest.
        progress: Called as work goes on.
    """
    plan = store.plan
    cells = [cell for cell, _ in share]
    groups = groups_of(plan, widest(cells, cells[0]), loaded.model)

    def calibrated(asked: Candidates) -> AmaxBySize:
        there = {
            size_of(cell): given[cell.calibration] for cell in cells if cell.calibration in given
        }
        sizes = asked.calibration_sizes()
        digests = {one.calibration: one.used for _, one in share if one.used in sizes}
        own = read_calibrated(store, digests)
        return {**there, **{digests[digest]: amax for digest, amax in own.items()}}

    done = run_pass(
        loaded.model,
        loaded.samples,
        groups,
        [request_of(cell, one) for cell, one in share],
        plan.config.autoquant,
        boundaries=_longest([one for _, one in share]).boundaries,
        calibrated=calibrated,
        progress=progress,
    )
    of_cell = done.candidates.of_cell
    return [
        Share(
            of=one,
            loaded=loaded,
            candidates=done.candidates,
            index=of_cell[cell.cell],
            found=done.scores,
            seconds=done.seconds,
            memory=done.memory(),
        )
        for cell, one in share
    ]


def _finish(store: Store, cell: CellSpec, shares: Sequence[Share]) -> dict[str, QsensError]:
    """Write the result of a cell; return why there is none, by cell, where no group has a score."""
    scores = cell_scores(store.plan, cell, shares)
    reasons = [entry.reason for entry in scores.groups if entry.status == "failed"]
    if reasons and len(reasons) == sum(entry.group.covered for entry in scores.groups):
        refused = UserError(
            str(reasons[0]),
            where=cell.cell,
            remedy=f"Mend the pair '{cell.pair}', or leave it out.",
        )
        return _failed(store, [cell], refused)
    memory = {name: max(share.memory[name] for share in shares) for name in shares[0].memory}
    _write(store, cell, scores, [share.loaded for share in shares], memory)
    return {}


def _failed(store: Store, cells: Sequence[CellSpec], error: QsensError) -> dict[str, QsensError]:
    """Keep why cells have no result, and return it by cell."""
    for cell in cells:
        keep_failure(store, cell, error)
    return {cell.cell: error for cell in cells}


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
    loaded = load_whole(plan, cell, progress)
    model, samples = loaded.model, loaded.samples
    groups = groups_of(plan, cell, model)
    reference.check_device(model, groups, cell.precision)
    (one,) = cell.sets
    refused = _without_labels(plan, cell, one, samples)
    if refused is not None:
        raise refused
    scored, batch_size = cell.scored, config.autoquant.batch_size
    sizes = one.boundaries
    request = request_of(cell, one)
    candidates = distinct([request])
    started = time.monotonic()
    amax: AmaxBySize = {}
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
    share = Share(one, loaded, candidates, candidates.of_cell[cell.cell], pass_scores, {}, {})
    ours = cell_scores(plan, cell, [share])
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


def _without_labels(
    plan: Plan, cell: CellSpec, one: CalibrationSet, samples: Samples
) -> UserError | None:
    """Refuse a gradient of nothing: its zeros would not be measured."""
    scored = one.scored
    if plan.config.autoquant.method != "gradient" or any(samples.labels(scored)):
        return None
    return UserError(
        f"none of its {scored} samples has a second token: there is nothing to predict",
        where=f"{cell.cell}: samples file {', '.join(map(str, one.samples.paths))}",
        remedy="Use longer captions.",
    )


def _write(
    store: Store,
    cell: CellSpec,
    scores: CellScores,
    read: Sequence[Loaded],
    memory: Mapping[str, float] | None = None,
) -> None:
    sets = zip(cell.sets, read, strict=True)
    datasets = [dataset_of(one, loaded.samples, scores.padding_share) for one, loaded in sets]
    manifest = build_manifest(
        store.plan,
        cell,
        scores,
        dataset=datasets[0] if len(datasets) == 1 else together(datasets),
        device=device_name(read[0].device),
        timings={"load": max(loaded.seconds for loaded in read), **scores.timings},
        memory=memory or {},
        notices=list(dict.fromkeys(notice for loaded in read for notice in loaded.notices)),
    )
    names = [entry.group.name for entry in scores.groups if entry.group.covered]
    known = {"cell": cell.cell, "groups": "\n".join(names), "modality": cell.modality}
    store.write_result(cell, manifest, save(dict(scores.tensors), metadata=known))
