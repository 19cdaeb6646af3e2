"""Turn an engine's scores into a cell's manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from qsens.cells import CalibrationSet, CellSpec
from qsens.data.images import in_words, too_many
from qsens.engine.scores import CellScores, GroupScore
from qsens.grid import Plan
from qsens.names import GROUP_SUFFIX
from qsens.recipes.allocation import allocate_one
from qsens.schema.manifest import (
    SCHEMA_VERSION,
    AutoquantState,
    Dataset,
    Experts,
    GroupSensitivity,
    Layer,
    Manifest,
    Model,
    Quantization,
    RankedGroup,
    Scheme,
    Versions,
)

_NONE = "NONE(effective-bits: 16.0)"


def build_manifest(
    plan: Plan,
    cell: CellSpec,
    scores: CellScores,
    *,
    dataset: Dataset,
    device: str,
    timings: Mapping[str, float],
    memory: Mapping[str, float],
    notices: Sequence[str] = (),
) -> Manifest:
    """Return the manifest of ``cell``.

    Args:
        plan: The plan.
        cell: The cell.
        scores: What the engine found.
        dataset: What the samples were.
        device: The device in words.
        timings: Seconds by phase, the engine's own included.
        memory: GiB above the weights, predicted and taken.
        notices: What a reader should know about the checkpoint.
    """
    config, pair = plan.config, cell.precision
    covered = [score for score in scores.groups if score.group.covered]
    bits = pair.effective_bits
    allocated = allocate_one(
        [score.sensitivity for score in covered],
        [score.group.weights for score in covered],
        format_bits=bits,
        target_bits=config.autoquant.effective_bits,
    )
    quantized = {
        member: chosen
        for score, chosen in zip(covered, allocated.quantized, strict=True)
        for member in score.group.members
    }
    form = f"{pair.format}(effective-bits: {bits})"
    rows = _rows(scores.groups, form, bits)
    scored = sum(score.status == "scored" for score in covered)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        cell=cell.cell,
        cell_digest=cell.digest,
        engine=config.autoquant.engine,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        scheme=Scheme(
            name=cell.scheme,
            auto_quantize_bits=config.autoquant.effective_bits,
            auto_quantize_method=config.autoquant.method,
            auto_quantize_score_size=config.autoquant.score_size,
            auto_quantize_batch_size=config.autoquant.batch_size,
            coverage_mode=cell.coverage,
            coverage_fraction=scored / len(covered) if covered else 0.0,
            quant_formats=[pair.format],
        ),
        model=Model(
            id=str(plan.checkpoint.path),
            name=config.model.name,
            short_name=config.model.short_name,
            digest=plan.checkpoint.digest,
            architecture=plan.checkpoint.architecture,
            dtype=config.model.dtype,
        ),
        dataset=dataset,
        quantization=Quantization(
            pair=pair.name,
            granularity=cell.granularity,
            experimental=pair.experimental,
            effective_bits=bits,
            modelopt_config=_jsonable(pair.modelopt()),
        ),
        versions=Versions(
            qsens=plan.versions["qsens"],
            torch=plan.versions["torch"],
            transformers=plan.versions["transformers"],
            modelopt=plan.versions["nvidia-modelopt"],
            device=device,
        ),
        partial=_partial(cell, covered),
        notices=[*notices, *_skipped(cell), *scores.notices],
        timings={phase: round(seconds, 3) for phase, seconds in timings.items()},
        memory={name: round(value, 4) for name, value in memory.items()},
        floor=scores.floor,
        num_quantized_layers=len(scores.module_types),
        layers={
            name: Layer(quantized=quantized.get(name, False), module_type=kind)
            for name, kind in scores.module_types.items()
        },
        autoquant_state=AutoquantState(
            keys=["candidate_stats", "best", "constraints"],
            constraints={"effective_bits": allocated.effective_bits},
            score=allocated.score,
            is_satisfied=allocated.satisfied,
        ),
        layer_sensitivity=rows,
        sensitivity_ranking=[
            RankedGroup(name=name, importance=rows[name].importance)
            for name in (score.group.name + GROUP_SUFFIX for score in _ranked(scores.groups))
        ],
    )


def _rows(groups: tuple[GroupScore, ...], form: str, bits: float) -> dict[str, GroupSensitivity]:
    """Return a row a group in model order."""
    ranks = {score.group.name: rank for rank, score in enumerate(_ranked(groups), start=1)}
    rows = {}
    for score in groups:
        group = score.group
        whole = float(group.weights)
        cost = whole * bits / 16 if group.covered else whole
        measured = 0.0 if score.status == "disabled" else score.sensitivity
        rows[group.name + GROUP_SUFFIX] = GroupSensitivity(
            formats=[form, _NONE] if group.covered else [_NONE],
            scores=[measured, 0.0] if group.covered else [0.0],
            costs=[cost, whole] if group.covered else [whole],
            importance=measured,
            rank=ranks.get(group.name),
            members=list(group.members),
            kind=group.kind,
            depth=group.depth,
            status=score.status,
            reason=score.reason,
            num_bits=bits if group.covered else 16.0,
            sensitivity=score.sensitivity,
            sensitivity_per_token=score.sensitivity_per_token,
            standard_error=score.standard_error,
            relative_error=score.relative_error,
            size_cost=cost,
            experts=_experts(score),
            by_domain=None if score.by_domain is None else dict(score.by_domain),
        )
    return rows


def _ranked(groups: tuple[GroupScore, ...]) -> list[GroupScore]:
    """Return the groups that have a rank, least sensitive first, ties by name: ModelOpt's order.

    A disabled group has one format, no quantization, whose score is 0 as in ModelOpt. A group whose
    score is not known has no rank: it would come first, as if least sensitive.
    """
    known = [score for score in groups if score.status in ("scored", "disabled")]
    return sorted(known, key=lambda score: (score.sensitivity or 0.0, score.group.name))


def _experts(score: GroupScore) -> Experts | None:
    if score.experts is None:
        return None
    return Experts(
        sensitivity=[
            None if value is None else float(f"{value:.5e}") for value in score.experts.sensitivity
        ],
        tokens=list(score.experts.tokens),
        without_tokens=list(score.experts.without_tokens()),
    )


def _skipped(cell: CellSpec) -> list[str]:
    """Say which samples are skipped."""
    what = "pictures" if cell.modality == "image_text" else "records"
    return [
        f"{_of(one, cell)}{len(one.skipped)} of {one.taken} {what} are skipped; "
        f"{in_words(one.skipped)}"
        for one in cell.sets
        if one.skipped
    ]


def _of(one: CalibrationSet, cell: CellSpec) -> str:
    """Return whose samples are meant, where there are those of several data sets."""
    return f"{one.dataset.name}: " if len(cell.sets) > 1 else ""


def _partial(cell: CellSpec, covered: list[GroupScore]) -> list[str]:
    reasons = []
    for one in cell.sets:
        allowed, skipped = one.dataset.max_skipped, len(one.skipped)
        beyond = too_many(skipped, one.taken, allowed)
        missing = one.samples.missing_tokens(one.dataset, one.size)
        if one.taken < one.asked or beyond or missing:
            reasons.append(
                f"{_of(one, cell)}{one.used} of {one.asked} samples of size '{one.size}'"
                + (f", {skipped} skipped where {allowed:.0%} may be" if beyond else "")
                + (f", {missing} tokens fewer than it asks for" if missing else "")
            )
    for status, words in (
        ("non_finite", "no finite score"),
        ("no_gradient", "no gradient"),
        ("failed", "no score"),
    ):
        affected = [score for score in covered if score.status == status]
        if affected:
            first = affected[0]
            reasons.append(
                f"{len(affected)} of {len(covered)} groups got {words}, first {first.group.name}"
                + (f": {first.reason}" if first.reason else "")
            )
    return reasons


def _jsonable(value: Any) -> Any:
    """Return ``value`` with the keys of block sizes as text and tuples as lists."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value
