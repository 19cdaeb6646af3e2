"""Calibration: the maximum of every input over the first samples, a snapshot at each size.

Needs torch. One run over the samples serves every size and every format: for the ``max``
algorithm, the maximum does not depend on the format, and a running maximum in sample order passes
every nested size on its way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from qsens.engine.groups import Group
from qsens.engine.model_pass import ModelPass
from qsens.engine.samples import Batch, Samples, padded_batches
from qsens.engine.scores import Progress, silent

Maxima = dict[str, torch.Tensor]
"""The largest magnitude of each module's input over the real tokens: float32 scalars on the CPU."""


@torch.no_grad()
def calibrate(
    model: nn.Module,
    samples: Samples,
    groups: Sequence[Group],
    *,
    snapshots: Sequence[int],
    boundaries: Sequence[int] = (),
    max_tokens: int | None = None,
    batches: Sequence[Batch] | None = None,
    progress: Progress = silent,
) -> dict[int, Maxima]:
    """Return the maxima over the first ``n`` samples, for every ``n`` in ``snapshots``.

    Args:
        model: The model, in evaluation mode.
        samples: The samples, at least as many as the largest snapshot.
        groups: The groups; those that are not covered are left out.
        snapshots: Sample counts to stop at.
        boundaries: Sample counts that no batch crosses; the snapshots are added.
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
    device = next(model.parameters()).device
    running = {name: torch.zeros((), device=device) for name in modules}
    run = ModelPass(model, modules)
    end = max(snapshots)
    if batches is None:
        cuts = [*boundaries, *snapshots]
        batches = padded_batches(samples, end, boundaries=cuts, max_tokens=max_tokens)
    batches = [batch for batch in batches if batch.first < end]
    real: torch.Tensor | None = None
    # Held, so that no other tensor can take its place in memory while it is compared with.
    last: tuple[str, torch.Tensor] | None = None

    def keep(name: str, x: torch.Tensor) -> None:
        nonlocal last
        if last is not None and last[1] is x:
            running[name] = running[last[0]]  # q, k and v read one input
            return
        last = name, x
        rows = x.flatten(0, -2)
        rows = rows if real is None else rows[real]
        largest = torch.linalg.vector_norm(rows, ord=torch.inf, dtype=torch.float32)
        running[name] = torch.maximum(running[name], largest)

    found: dict[int, Maxima] = {}
    with run.watched(keep):
        for index, batch in enumerate(batches):
            for count in snapshots:
                if count <= batch.first and count not in found:
                    found[count] = dict(running)
            real = batch.real_tokens()
            real = None if real is None else real.to(device)
            hidden = run.hidden(batch.to(device))
            for name, module in modules.items():
                if module is run.head:
                    keep(name, hidden)
            progress("calibrate", index + 1, len(batches))
    for count in snapshots:
        found.setdefault(count, dict(running))
    return {count: _to_cpu(found[count]) for count in snapshots}


def _to_cpu(maxima: Maxima) -> Maxima:
    """Move all maxima in one transfer."""
    if not maxima:
        return {}
    moved = torch.stack(list(maxima.values())).cpu()
    return dict(zip(maxima, moved.unbind(), strict=True))
