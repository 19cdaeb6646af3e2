"""One cell's scores, read off a pass that served many. Needs torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qsens.checkpoint.experts import input_names
from qsens.checkpoint.groups import Group
from qsens.data.samples import nominal_labels
from qsens.engine.amax import prefixed
from qsens.engine.candidates import Candidates, Request
from qsens.engine.quantizer import needs_fallback
from qsens.engine.scores import CellScores, ExpertScores, GroupScore, PassScores
from qsens.grid import CellSpec, Plan
from qsens.pipeline.loading import Loaded, groups_of


def cell_scores(
    plan: Plan,
    cell: CellSpec,
    request: Request,
    candidates: Candidates,
    pass_scores: PassScores,
    loaded: Loaded,
) -> CellScores:
    """Read one cell's scores off a pass.

    Args:
        plan: The plan.
        cell: The cell.
        request: What it asked of the pass.
        candidates: What the pass computed.
        pass_scores: What the pass found; of the tower as well where another cell covers it.
        loaded: What it ran on.
    """
    groups = groups_of(plan, cell, loaded.model)
    index = candidates.of_cell[cell.cell]
    scored = request.scored
    per_sample = pass_scores.per_sample[:, index, :scored]
    labels = loaded.samples.labels(scored)
    predictions = loaded.samples.predictions(scored)
    nominal = torch.tensor(
        nominal_labels(loaded.samples, scored=scored, batch_size=plan.config.autoquant.batch_size),
        dtype=torch.float64,
    ).clamp_min(1)
    gradient = plan.config.autoquant.method == "gradient"
    weights = nominal.square().reciprocal() if gradient else torch.ones_like(nominal)
    if gradient:
        sensitivity = (per_sample / nominal.square()).sum(dim=1)
        per_token = per_sample.sum(dim=1) / max(1, sum(labels))
    else:
        sensitivity = per_sample.sum(dim=1)
        per_token = sensitivity / predictions
    kl_div = plan.config.autoquant.method == "kl_div"
    unreached = "no sample ran through it" if kl_div else "no gradient reached it"
    spread = None
    if pass_scores.draws is not None:
        drawn = pass_scores.draws[:, index, :scored]
        spread = (drawn.var(dim=-1) / drawn.shape[-1]).sum(dim=1).sqrt()
        spread /= predictions
    errors = pass_scores.relative_errors(index, scored)
    at = {group.name: position for position, group in enumerate(pass_scores.groups)}
    entries = []
    spoilt = _spoilt_weights(loaded.model) if not bool(per_sample.isfinite().all()) else ""
    for group in groups:
        if not group.covered:
            entries.append(GroupScore(group, "disabled", "outside the coverage"))
            continue
        position = at[group.name]
        if (position, index) in pass_scores.failures.refused:
            entries.append(
                GroupScore(group, "failed", pass_scores.failures.refused[position, index])
            )
        elif not pass_scores.reached[position]:
            entries.append(GroupScore(group, "no_gradient", unreached))
        elif not bool(per_sample[position].isfinite().all()):
            first = int((~per_sample[position].isfinite()).nonzero()[0, 0])
            entries.append(
                GroupScore(group, "non_finite", f"not finite, first at sample {first + 1}{spoilt}")
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
                    experts=_experts(pass_scores, group, index, weights),
                )
            )
    calibration_size = candidates.inputs[candidates.pairs[index][1]].calibration_size
    calibrated = pass_scores.amax[calibration_size] if calibration_size is not None else {}
    covered = [group for group in groups if group.covered]
    notices = []
    if any(needs_fallback(cfg) for cfg in (request.weight, request.input) if cfg is not None):
        notices.append("ModelOpt's own quantizer computed this format")
    if len(candidates.of_cell) > 1:
        notices.append(f"computed in one pass with {len(candidates.of_cell) - 1} other cells")
    notices += _without_tokens(entries)
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
            "loss": pass_scores.loss[:scored].contiguous(),
            **prefixed(
                {
                    each: calibrated[each]
                    for group in covered
                    for name in group.members
                    for each in input_names(name, loaded.model.get_submodule(name))
                    if each in calibrated
                }
            ),
        },
        timings={},
        padding_share=pass_scores.padding_share,
        notices=tuple(notices),
        floor=None
        if pass_scores.floor is None
        else float(pass_scores.floor[:scored].sum()) / predictions,
    )


def _spoilt_weights(model: torch.nn.Module) -> str:
    """Name the tensors of the checkpoint that hold NaN or infinity; empty where none does."""
    counts = {
        name: int((~tensor.isfinite()).sum())
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    }
    if not counts:
        return ""
    name, count = next(iter(counts.items()))
    more = f", the first of {len(counts)} such tensors" if len(counts) > 1 else ""
    return f": {name} holds NaN or infinity, {count} of its values{more}"


def _experts(
    pass_scores: PassScores, group: Group, candidate: int, weights: torch.Tensor
) -> ExpertScores | None:
    """Return the scores of the experts of a mixture.

    Args:
        pass_scores: What the pass found.
        group: The group.
        candidate: Index of the candidate.
        weights: What each sample's score counts.
    """
    if group.name not in pass_scores.experts:
        return None
    table = pass_scores.experts[group.name]
    scored = len(weights)
    tokens = table.tokens[:, :scored].sum(dim=1)
    sums = table.per_sample[:, candidate, :scored].double() @ weights
    known = (tokens > 0) & sums.isfinite()
    return ExpertScores(
        sensitivity=tuple(
            value if is_known else None
            for value, is_known in zip(sums.tolist(), known.tolist(), strict=True)
        ),
        tokens=tuple(tokens.tolist()),
    )


def _without_tokens(entries: Sequence[GroupScore]) -> list[str]:
    """Say how many experts got no token."""
    mixtures = [entry for entry in entries if entry.experts is not None]
    idle = {
        entry.group.name: numbers
        for entry in mixtures
        if entry.experts is not None and (numbers := entry.experts.without_tokens())
    }
    if not idle:
        return []
    name, numbers = next(iter(idle.items()))
    return [
        f"{sum(map(len, idle.values()))} experts of {len(idle)} layers got no token of the samples "
        f"scored, first expert {numbers[0]} of {name}: nothing is known of them"
    ]
