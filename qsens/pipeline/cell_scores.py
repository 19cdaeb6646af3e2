"""One cell's scores, read off a pass that served many. Needs torch."""

from __future__ import annotations

import torch

from qsens.engine.candidates import Candidates, Request
from qsens.engine.quantizer import needs_fallback
from qsens.engine.samples import nominal_labels
from qsens.engine.scores import CellScores, GroupScore, PassScores
from qsens.grid import Cell, Plan
from qsens.pipeline.loading import Loaded, groups_of


def cell_scores(
    plan: Plan,
    cell: Cell,
    request: Request,
    candidates: Candidates,
    found: PassScores,
    loaded: Loaded,
) -> CellScores:
    """Read one cell's scores off a pass.

    Args:
        plan: The plan.
        cell: The cell.
        request: What it asked of the pass.
        candidates: What the pass computed.
        found: What it found; of the tower as well where another cell covers it.
        loaded: What it ran on.
    """
    groups = groups_of(plan, cell, loaded.model)
    index = candidates.of_cell[cell.cell]
    scored = request.scored
    per_sample = found.per_sample[:, index, :scored]
    labels = loaded.samples.labels(scored)
    predictions = loaded.samples.predictions(scored)
    nominal = torch.tensor(
        nominal_labels(loaded.samples, scored=scored, batch_size=plan.config.autoquant.batch_size),
        dtype=torch.float64,
    ).clamp_min(1)
    if plan.config.autoquant.method == "gradient":
        sensitivity = (per_sample / nominal.square()).sum(dim=1)
        per_token = per_sample.sum(dim=1) / max(1, sum(labels))
    else:
        sensitivity = per_sample.sum(dim=1)
        per_token = sensitivity / predictions
    kl_div = plan.config.autoquant.method == "kl_div"
    unreached = "no sample ran through it" if kl_div else "no gradient reached it"
    spread = None
    if found.draws is not None:
        drawn = found.draws[:, index, :scored]
        spread = (drawn.var(dim=-1) / drawn.shape[-1]).sum(dim=1).sqrt()
        spread /= predictions
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
    covered = [group for group in groups if group.covered]
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
            "per_sample": per_sample[[at[group.name] for group in covered]],
            "label_tokens": torch.tensor(labels, dtype=torch.int64),
            "loss": found.loss[:scored].contiguous(),
            **{
                f"amax.input.{name}": calibrated[name]
                for group in covered
                for name in group.members
                if name in calibrated
            },
        },
        timings={},
        padding_share=found.padding_share,
        notices=tuple(notices),
    )
