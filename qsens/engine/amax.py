"""Calibration: the amax of every input over the first samples, read off where each size ends.

Needs torch. One run over the samples serves every size and every format: for the ``max``
algorithm, the maximum does not depend on the format, and a running maximum in sample order passes
every nested size on its way.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import nn

from qsens.checkpoint.experts import input_names
from qsens.checkpoint.groups import Group, tower_of
from qsens.checkpoint.structure import traits_of
from qsens.data.samples import Batch, Samples, batch_tokens, padded_batches
from qsens.engine.candidates import CalibrationSize
from qsens.engine.recompute import RecomputedModel
from qsens.engine.scores import Progress, silent
from qsens.engine.team import Team, team_of

Amax = dict[str, torch.Tensor]
"""The largest magnitude of each module's inputs over the real tokens: float32 scalars on a CPU."""

AmaxBySize: TypeAlias = dict[CalibrationSize, Amax]
"""Amax by what they come from."""

_PREFIX = "amax.input."


class RunningAmax:
    """Amax of the inputs of modules between one calibration size and the next.

    Batches may come in any order, and their modules in turns.

    Args:
        names: The inputs.
        calibration_sizes: Sample counts; no batch crosses one.
        device: Where the modules are.
    """

    def __init__(
        self, names: Iterable[str], calibration_sizes: Sequence[int], device: torch.device
    ) -> None:
        self._sizes = sorted(calibration_sizes)
        self._largest = [
            {name: torch.zeros((), device=device) for name in names} for _ in self._sizes
        ]
        self._device = device
        self._real: dict[int, torch.Tensor | None] = {}
        # Held, so that no other tensor can take its place in memory while it is compared with.
        self._last: tuple[str, torch.Tensor] | None = None

    @torch.no_grad()
    def take(self, batch: Batch, name: str, x: torch.Tensor) -> None:
        """Take a module's input: ``(samples, longest, channels)``, or rows of a vision tower."""
        size = bisect_right(self._sizes, batch.first)
        if size == len(self._sizes):
            return
        largest = self._largest[size]
        if self._last is not None and self._last[1] is x:
            largest[name] = largest[self._last[0]]  # q, k and v read one input
            return
        self._last = name, x
        if batch.first not in self._real:
            real = batch.real_tokens()
            self._real[batch.first] = None if real is None else real.to(self._device)
        real = self._real[batch.first]
        rows = x.flatten(0, -2)
        rows = rows[real] if real is not None and x.ndim == 3 else rows
        found = torch.linalg.vector_norm(rows, ord=torch.inf, dtype=torch.float32)
        largest[name] = torch.maximum(largest[name], found)

    def calibration_sizes(self, team: Team) -> AmaxBySize:
        """Return the amax at every calibration size, all batches of a team done."""
        self._last = None
        found: AmaxBySize = {}
        before: Amax = {}
        for size, largest in zip(self._sizes, self._largest, strict=True):
            own = team.largest(moved(largest, torch.device("cpu")))
            if before:
                own = {name: torch.maximum(own[name], before[name]) for name in own}
            found[size] = before = own
        return found


@torch.no_grad()
def calibrate(
    model: nn.Module,
    samples: Samples,
    groups: Sequence[Group],
    *,
    calibration_sizes: Sequence[int],
    boundaries: Sequence[int] = (),
    max_tokens: int | None = None,
    batches: Sequence[Batch] | None = None,
    progress: Progress = silent,
) -> AmaxBySize:
    """Return the amax over the first ``n`` samples, for every ``n`` in ``calibration_sizes``.

    A model without gradients is run over all samples; a pass that runs it anyway can do without,
    see :class:`RunningAmax`.

    Args:
        model: The model, in evaluation mode.
        samples: The samples, at least as many as the largest calibration size.
        groups: The groups; those that are not covered are left out.
        calibration_sizes: Sample counts to stop at.
        boundaries: Sample counts that no batch crosses; the calibration sizes are added.
        max_tokens: Tokens of a batch at most, padding included.
        batches: Batches to run instead of the engine's own, such as those of the other engine.
        progress: Called as batches go through.
    """
    modules = {
        name: model.get_submodule(name)
        for group in groups
        if group.covered
        for name in group.members
    }
    run = RecomputedModel(model, modules, tower_of(groups))
    inputs = [each for name, module in modules.items() for each in input_names(name, module)]
    running = RunningAmax(inputs, calibration_sizes, run.device)
    end = max(calibration_sizes)
    if batches is None:
        cuts = [*boundaries, *calibration_sizes]
        together = batch_tokens(run.device)
        batches = padded_batches(
            samples,
            end,
            boundaries=cuts,
            together=together,
            max_tokens=max_tokens,
            pads=traits_of(model).pads,
        )
    team = team_of(model)
    batches = team.share([batch for batch in batches if batch.first < end])
    with run.watched(running.take):
        run.look(batches, lambda done: progress("calibrate", done, len(batches)))
    return running.calibration_sizes(team)


def moved(amax: Amax, device: torch.device) -> Amax:
    """Return amax on another device, moved in one transfer."""
    if not amax:
        return {}
    return dict(zip(amax, torch.stack(list(amax.values())).to(device), strict=True))


def prefixed(amax: Amax) -> Amax:
    """Return amax under the names that they have beside a result's other tensors."""
    return {f"{_PREFIX}{name}": value for name, value in amax.items()}


def unprefixed(tensors: Amax) -> Amax:
    """Return the amax among a result's tensors, by the names of inputs."""
    return {
        name.removeprefix(_PREFIX): value
        for name, value in tensors.items()
        if name.startswith(_PREFIX)
    }
