"""One cell's scores, read off the passes that served many. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from qsens.cells import CalibrationSet, CellSpec
from qsens.checkpoint.experts import input_names
from qsens.checkpoint.groups import Group
from qsens.data.samples import nominal_labels
from qsens.engine.amax import prefixed
from qsens.engine.candidates import Candidates
from qsens.engine.quantizer import needs_fallback
from qsens.engine.scores import CellScores, ExpertScores, ExpertTable, GroupScore, PassScores
from qsens.grid import Plan
from qsens.pipeline.loading import Loaded, groups_of


@dataclass(frozen=True)
class Share:
    """What a pass over the samples of one data set found for a cell.

    Attributes:
        of: The data set.
        loaded: What the pass ran on.
        candidates: What it computed.
        index: The cell's candidate.
        found: What it found; of the tower as well where another cell covers it.
        seconds: Seconds by phase.
        memory: GiB above the weights, predicted and taken.
    """

    of: CalibrationSet
    loaded: Loaded
    candidates: Candidates
    index: int
    found: PassScores
    seconds: Mapping[str, float]
    memory: Mapping[str, float]

    @property
    def per_sample(self) -> torch.Tensor:
        """What each scored sample adds to each group, ``(groups, samples)``, float64."""
        return self.found.per_sample[:, self.index, : self.of.scored]

    @property
    def labels(self) -> list[int]:
        """Label tokens of each scored sample."""
        return self.loaded.samples.labels(self.of.scored)

    @property
    def predictions(self) -> int:
        """Positions whose distribution counts, of the scored samples."""
        return self.loaded.samples.predictions(self.of.scored)


def cell_scores(plan: Plan, cell: CellSpec, shares: Sequence[Share]) -> CellScores:
    """Read one cell's scores off the passes over its data sets.

    Args:
        plan: The plan.
        cell: The cell.
        shares: What was found, in the order of its data sets.
    """
    model = shares[0].loaded.model
    passes = [share.found for share in shares]
    groups = groups_of(plan, cell, model)
    gradient = plan.config.autoquant.method == "gradient"
    per_sample = torch.cat([share.per_sample for share in shares], dim=1)
    labels = [count for share in shares for count in share.labels]
    predictions = sum(share.predictions for share in shares)
    nominal = torch.tensor(
        nominal_labels(labels, plan.config.autoquant.batch_size), dtype=torch.float64
    ).clamp_min(1)
    weights = nominal.square().reciprocal() if gradient else torch.ones_like(nominal)
    if gradient:
        sensitivity = (per_sample / nominal.square()).sum(dim=1)
        per_token = per_sample.sum(dim=1) / max(1, sum(labels))
    else:
        sensitivity = per_sample.sum(dim=1)
        per_token = sensitivity / predictions
    kl_div = plan.config.autoquant.method == "kl_div"
    unreached = "no sample ran through it" if kl_div else "no gradient reached it"
    spread = _together(shares, _draws)
    if spread is not None:
        spread = (spread.var(dim=-1) / spread.shape[-1]).sum(dim=1).sqrt() / predictions
    errors = _relative_errors(shares)
    at = {group.name: position for position, group in enumerate(passes[0].groups)}
    refused = {
        position: reason
        for share in reversed(shares)
        for (position, index), reason in share.found.failures.refused.items()
        if index == share.index
    }
    by_domain = {
        share.of.dataset.name: share.per_sample.sum(dim=1)
        / max(1, sum(share.labels) if gradient else share.predictions)
        for share in shares
        if len(shares) > 1
    }
    entries = []
    spoilt = _spoilt_weights(model) if not bool(per_sample.isfinite().all()) else ""
    for group in groups:
        if not group.covered:
            entries.append(GroupScore(group, "disabled", "outside the coverage"))
            continue
        position = at[group.name]
        if position in refused:
            entries.append(GroupScore(group, "failed", refused[position]))
        elif not all(found.reached[position] for found in passes):
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
                    experts=_experts(shares, group, weights),
                    by_domain={name: float(values[position]) for name, values in by_domain.items()}
                    or None,
                )
            )
    of_first = shares[0]
    _, entry = of_first.candidates.pairs[of_first.index]
    calibration_size = of_first.candidates.inputs[entry].calibration_size
    calibrated = passes[0].amax[calibration_size] if calibration_size is not None else {}
    covered = [group for group in groups if group.covered]
    notices = []
    weight, given = cell.precision.weight_quantizer, cell.precision.input_quantizer
    cfgs = [each.cfg() for each in (weight, given) if each is not None]
    if any(needs_fallback(cfg) for cfg in cfgs):
        notices.append("ModelOpt's own quantizer computed this format")
    others = {name for share in shares for name in share.candidates.of_cell} - {cell.cell}
    if others:
        notices.append(f"computed in one pass with {len(others)} other cells")
    notices += _without_tokens(entries)
    tensors = {
        "per_sample": per_sample[[at[group.name] for group in covered]],
        "label_tokens": torch.tensor(labels, dtype=torch.int64),
        "loss": torch.cat([share.found.loss[: share.of.scored] for share in shares]),
    }
    if len(shares) > 1:
        tensors["domain"] = torch.tensor(
            [number for number, share in enumerate(shares) for _ in share.labels]
        )
    floors = [
        float(share.found.floor[: share.of.scored].sum())
        for share in shares
        if share.found.floor is not None
    ]
    return CellScores(
        groups=tuple(entries),
        module_types={
            name: f"Quant{type(model.get_submodule(name)).__name__}"
            for group in groups
            for name in group.members
        },
        tensors={
            **tensors,
            **prefixed(
                {
                    each: calibrated[each]
                    for group in covered
                    for name in group.members
                    for each in input_names(name, model.get_submodule(name))
                    if each in calibrated
                }
            ),
        },
        timings={
            phase: sum(share.seconds[phase] for share in shares) for phase in of_first.seconds
        },
        padding_share=_padding_share(shares),
        notices=tuple(notices),
        floor=sum(floors) / predictions if floors else None,
    )


def _together(
    shares: Sequence[Share], of: Callable[[Share], torch.Tensor | None]
) -> torch.Tensor | None:
    """Return what every share has of its samples, put together along them; none without."""
    parts = [of(share) for share in shares]
    known = [part for part in parts if part is not None]
    return torch.cat(known, dim=1) if len(known) == len(parts) else None


def _draws(share: Share) -> torch.Tensor | None:
    draws = share.found.draws
    return None if draws is None else draws[:, share.index, : share.of.scored]


def _relative_errors(shares: Sequence[Share]) -> torch.Tensor | None:
    """Return ``||dY||^2 / ||Y||^2`` of each group over the scored samples, where measured."""

    def errors(share: Share) -> torch.Tensor | None:
        found = share.found.errors
        return None if found is None else found[:, share.index, : share.of.scored]

    def norms(share: Share) -> torch.Tensor | None:
        found = share.found.norms
        return None if found is None else found[:, : share.of.scored]

    of_errors, of_outputs = _together(shares, errors), _together(shares, norms)
    if of_errors is None or of_outputs is None:
        return None
    tiny = torch.finfo(of_outputs.dtype).tiny
    return of_errors.sum(dim=1) / of_outputs.sum(dim=1).clamp_min(tiny)


def _padding_share(shares: Sequence[Share]) -> float:
    """Return padded tokens over all tokens that went through the model, 0 to 1."""
    if len(shares) == 1:
        return shares[0].found.padding_share
    real = [share.loaded.samples.tokens(share.of.scored) for share in shares]
    through = sum(
        tokens / (1 - share.found.padding_share) for tokens, share in zip(real, shares, strict=True)
    )
    return 1 - sum(real) / through


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


def _experts(shares: Sequence[Share], group: Group, weights: torch.Tensor) -> ExpertScores | None:
    """Return the scores of the experts of a mixture.

    Args:
        shares: What the passes found.
        group: The group.
        weights: What each sample's score counts.
    """
    if group.name not in shares[0].found.experts:
        return None

    def table(share: Share) -> ExpertTable:
        return share.found.experts[group.name]

    tokens = sum(table(share).tokens[:, : share.of.scored].sum(dim=1) for share in shares)
    assert isinstance(tokens, torch.Tensor)
    scores = [table(share).per_sample[:, share.index, : share.of.scored] for share in shares]
    sums = torch.cat(scores, dim=1).double() @ weights
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
