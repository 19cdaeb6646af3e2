"""What llm-compressor and a runtime take of a sweep's groups, by their modules and shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qsens.config import PairConfig
from qsens.errors import UserError
from qsens.pipeline.shapes import Shape, module_shapes
from qsens.recipes.formats import llm_compressor
from qsens.recipes.runtime import Deployment, Weight
from qsens.schema.recipe import LeftOut
from qsens.schema.summary import Row


@dataclass(frozen=True)
class Packing:
    """What a recipe is chosen from.

    Attributes:
        rows: The rows of each format; groups that are left as they are count as disabled.
        together: Names of groups that share one format.
        refused: Names of groups that a format is no option for, by the format's name.
        left_out: The same in words, module by module.
        notices: What a reader should know.
    """

    rows: Mapping[str, tuple[Row, ...]]
    together: tuple[set[str], ...] = ()
    refused: dict[str, set[str]] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    notices: tuple[str, ...] = ()


def pack(
    rows: Mapping[str, Sequence[Row]],
    pairs: Mapping[str, PairConfig],
    checkpoint: Path,
    *,
    packs: bool,
    deployment: Deployment | None = None,
) -> Packing:
    """Hold the groups of a sweep against what llm-compressor and a runtime take.

    Args:
        rows: The rows of each format, by its name.
        pairs: The formats, by the same names.
        checkpoint: Directory of the checkpoint that was scored; nothing is refused for its shape
            where it is gone, and a notice says so.
        packs: Whether llm-compressor is to take them.
        deployment: The runtime that is to; none where none in particular.
    """
    taken = {name: tuple(each) for name, each in rows.items()}
    if not packs and deployment is None:
        return Packing(taken)
    everything = {row.layer: row for each in rows.values() for row in each}
    covered = {layer: row for layer, row in everything.items() if row.status != "disabled"}
    runtime = deployment.runtime.words if deployment is not None else None
    takers = " and ".join(filter(None, ("llm-compressor" if packs else None, runtime)))
    shapes, notices = _shapes(checkpoint, covered.values(), takers)
    alone = [name for name, each in shapes.items() if any(len(s) != 2 for s in each.values())]
    if alone:
        taken = {name: _without(each, alone) for name, each in taken.items()}
        covered = {at: row for at, row in covered.items() if not set(row.members) & set(alone)}
        verb = "leave" if packs and runtime else "leaves"
        notices.append(
            f"{takers} {verb} convolutions as they are, and no bits count them: " + ", ".join(alone)
        )
    fused = _fused(deployment, everything.values())
    refused: dict[str, set[str]] = {}
    modules: dict[tuple[str, str], list[str]] = {}
    of_group = {member: layer for layer, row in covered.items() for member in row.members}
    for name in taken:
        for member, layer in of_group.items():
            kind = covered[layer].kind
            parts = fused.get(member, (member,))
            weights = [
                Weight(
                    name=stored.removesuffix(".weight") if kind == "experts" else member,
                    kind=kind,
                    shape=shape,
                    fused_rows=_rows(shapes, parts) or shape[0],
                )
                for stored, shape in shapes.get(member, {}).items()
            ]
            reasons = set(_reasons(pairs[name], weights, packs=packs, deployment=deployment))
            if deployment is not None:
                reason = deployment.module_refusal(pairs[name], member, kind)
                left = [part for part in parts if part not in of_group]
                if reason is None and left:
                    reason = f"{runtime} fuses it with {left[0]}, which stays at 16 bits"
                reasons = {reason} if reason is not None else reasons
            for reason in sorted(reasons):
                refused.setdefault(name, set()).add(layer)
                modules.setdefault((name, reason), []).append(member)
    together = [
        {of_group[part] for part in parts if part in of_group}
        for parts in dict.fromkeys(fused.values())
    ]
    return Packing(
        taken,
        together=tuple(each for each in together if len(each) > 1),
        refused=refused,
        left_out=tuple(
            LeftOut(format=name, reason=reason, modules=tuple(sorted(members)))
            for (name, reason), members in modules.items()
        ),
        notices=tuple(notices),
    )


def _shapes(
    checkpoint: Path, rows: Iterable[Row], takers: str
) -> tuple[dict[str, dict[str, Shape]], list[str]]:
    """Return the shapes of modules, and what is not known of them."""
    unchecked = f"whether {takers} can take every module in its format was not checked"
    rows = tuple(rows)
    try:
        shapes = module_shapes(checkpoint, rows)
    except UserError as error:
        return {}, [f"{unchecked}: {error.where} {error.what}"]
    lost = [name for row in rows for name in row.members if name not in shapes]
    if not lost:
        return shapes, []
    return shapes, [
        f"{unchecked}: {len(lost)} of its modules are not as they were scored in the "
        f"checkpoint {checkpoint}, first {lost[0]}"
    ]


def _fused(deployment: Deployment | None, rows: Iterable[Row]) -> dict[str, tuple[str, ...]]:
    """Return what each module is fused with by a runtime, itself among them."""
    if deployment is None:
        return {}
    sets = deployment.fused(member for row in rows for member in row.members)
    return {member: parts for parts in sets for member in parts}


def _rows(shapes: Mapping[str, Mapping[str, Shape]], parts: Sequence[str]) -> int | None:
    """Return the output channels of a fused layer; none where each part keeps its own."""
    if len(parts) == 1 or len({part.rpartition(".")[0] for part in parts}) > 1:
        return None
    return sum(shape[0] for part in parts for shape in shapes.get(part, {}).values())


def _reasons(
    pair: PairConfig, weights: Sequence[Weight], *, packs: bool, deployment: Deployment | None
) -> Iterator[str]:
    for weight in weights:
        reason = deployment.unfit(pair, weight) if deployment is not None else None
        if reason is None and packs:
            reason = llm_compressor.unfit(pair, weight.shape)
        if reason is not None:
            yield reason


def _without(rows: Sequence[Row], modules: Sequence[str]) -> tuple[Row, ...]:
    """Return rows in which the groups of some modules are disabled."""
    unknown = {"status": "disabled", "sensitivity": None, "sensitivity_per_token": None}
    return tuple(
        row.model_copy(update=unknown) if set(row.members) & set(modules) else row for row in rows
    )
