"""True KL divergences for an audit: load, perturb one group at a time. Imports torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from qsens.checkpoint.loading import device_name
from qsens.engine.scores import Progress
from qsens.engine.scoring_pass import run_pass
from qsens.errors import Fault
from qsens.pipeline.loading import Checkpoint, groups_of, request_of, widest, with_samples
from qsens.pipeline.shared_checkpoint import SharedCheckpoint
from qsens.pipeline.stored_amax import read_scored
from qsens.store import Store


@dataclass(frozen=True)
class MeasuredKL:
    """What was measured.

    Attributes:
        nats: KL divergence a real token of each group, by cell and group.
        failures: Why the numerics refuse to measure a group, by cell and group.
        faults: What went wrong otherwise: nothing of these cells was measured.
        floor: Divergence of the model as it is from itself in float32, nats a token; none where it
            rounds no more than that.
        seconds: What it took, loading left out.
        device: The device, in words.
    """

    nats: Mapping[str, Mapping[str, float]]
    failures: Mapping[str, dict[str, str]]
    faults: Mapping[str, Fault]
    floor: float | None
    seconds: float
    device: str


@torch.inference_mode(False)
def measured_kl(
    store: Store,
    wanted: Mapping[str, Sequence[str]],
    progress: Progress,
    shared: SharedCheckpoint,
) -> Iterator[MeasuredKL]:
    """Measure the true KL divergence of some groups of some cells of one size.

    Calibration is that of the scores: its amax lie beside them.

    Args:
        store: Where the results of the plan lie.
        wanted: Names of the groups, by cell id.
        progress: Called as work goes on.
        shared: The checkpoint.

    Yields:
        What was measured of the cells that read the same samples.
    """
    checkpoint = shared.load(progress)
    shares: dict[tuple[str, str | None], dict[str, Sequence[str]]] = {}
    for name, layers in wanted.items():
        cell = store.plan.cell(name)
        shares.setdefault((cell.modality, cell.domain), {})[name] = layers
    for share in shares.values():
        yield _measured(store, share, checkpoint, progress)


def _measured(
    store: Store,
    wanted: Mapping[str, Sequence[str]],
    checkpoint: Checkpoint,
    progress: Progress,
) -> MeasuredKL:
    plan = store.plan
    cells = [plan.cell(name) for name in wanted]
    loaded = with_samples(plan, cells[0], checkpoint)
    groups = groups_of(plan, widest(cells, cells[0]), loaded.model)
    done = run_pass(
        loaded.model,
        loaded.samples,
        groups,
        [request_of(cell) for cell in cells],
        plan.config.autoquant.model_copy(update={"method": "kl_div"}),
        boundaries=cells[0].sets[0].boundaries if len(cells[0].sets) == 1 else (),
        calibrated=lambda _: read_scored(store, [cell for cell in cells if cell.needs_calibration]),
        only={(name, cell) for cell, names in wanted.items() for name in names},
        progress=progress,
    )
    pass_scores, of_cell = done.scores, done.candidates.of_cell
    at = {group.name: position for position, group in enumerate(pass_scores.groups)}
    nats: dict[str, dict[str, float]] = {}
    failures: dict[str, dict[str, str]] = {}
    faults: dict[str, Fault] = {}
    for cell in cells:
        fault = pass_scores.failures.fault(of_cell[cell.cell], f"audit of {cell.cell}")
        if fault is not None:
            faults[cell.cell] = fault
            continue
        nats[cell.cell], failures[cell.cell] = {}, {}
        tokens = loaded.samples.predictions(cell.scored)
        for name in wanted[cell.cell]:
            candidate = of_cell[cell.cell]
            value = float(pass_scores.per_sample[at[name], candidate].sum()) / tokens
            reason = pass_scores.failures.refused.get((at[name], candidate))
            if reason is None and not math.isfinite(value):
                reason = "its divergence is not finite"
            if reason is None:
                nats[cell.cell][name] = value
            else:
                failures[cell.cell][name] = reason
    floor = None
    if pass_scores.floor is not None:
        floor = float(pass_scores.floor.sum()) / loaded.samples.predictions(len(pass_scores.floor))
    return MeasuredKL(
        nats, failures, faults, floor, sum(done.seconds.values()), device_name(loaded.device)
    )
