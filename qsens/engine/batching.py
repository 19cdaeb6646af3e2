"""Waves: the batches that go forward before any goes backward. Needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from qsens.checkpoint.structure import traits_of
from qsens.data.samples import Batch, Samples, batch_tokens, padded_batches
from qsens.engine.candidates import Candidates
from qsens.engine.layer_stream import device_of
from qsens.engine.memory import Budget
from qsens.engine.team import team_of


def plan_batches(
    model: nn.Module,
    samples: Samples,
    upto: int,
    candidates: Candidates,
    boundaries: Sequence[int],
    limit: int | None,
) -> list[Batch]:
    """Return batches of the first ``upto`` samples, none across a boundary or a size.

    Args:
        model: The model.
        samples: The samples.
        upto: Samples to take, from the first.
        candidates: What is computed.
        boundaries: Sample counts that no batch crosses; those of the candidates are added.
        limit: Tokens of a batch at most, padding included.
    """
    cuts = [*boundaries, *candidates.scored, *candidates.calibration_sizes()]
    together = batch_tokens(device_of(model))
    return padded_batches(
        samples,
        upto,
        boundaries=cuts,
        together=together,
        max_tokens=limit,
        pads=traits_of(model).pads,
    )


def windows(batches: Sequence[Batch], max_tokens: int | None) -> Iterator[list[Batch]]:
    """Cut batches, in order, so that those of a window stay within ``max_tokens``."""
    window: list[Batch] = []
    for batch in batches:
        held = sum(other.input_ids.numel() for other in window)
        if window and max_tokens is not None and held + batch.input_ids.numel() > max_tokens:
            yield window
            window = []
        window.append(batch)
    if window:
        yield window


def calibrates(
    model: nn.Module,
    samples: Samples,
    candidates: Candidates,
    *,
    boundaries: Sequence[int],
    budget: Budget,
) -> bool:
    """Say whether a pass can find the amax itself.

    It can where all that is scored goes forward before anything goes backward: then the samples
    that are scored and calibrated on run forward once.
    """
    if not candidates.calibration_sizes():
        return False
    scored, team = min(max(candidates.scored), len(samples)), team_of(model)
    batches = plan_batches(model, samples, scored, candidates, boundaries, budget.max_tokens)
    own = team.share(batches)
    return bool(team.least(len(list(windows(own, budget.max_tokens))) <= 1))
