"""What llm-compressor takes of a sweep's groups, by the shapes of their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qsens.config import PairConfig
from qsens.errors import UserError
from qsens.pipeline.shapes import module_shapes
from qsens.recipes.formats import llm_compressor
from qsens.schema.recipe import LeftOut
from qsens.schema.summary import Row

_UNCHECKED = "whether llm-compressor takes every module in its format was not checked"


@dataclass(frozen=True)
class Packing:
    """What a recipe for llm-compressor is chosen from.

    Attributes:
        rows: The rows of each format; groups that it leaves as they are count as disabled.
        refused: Names of groups that a format is no option for, by the format's name.
        left_out: The same in words, module by module.
        notices: What a reader should know.
    """

    rows: dict[str, tuple[Row, ...]]
    refused: dict[str, set[str]] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    notices: tuple[str, ...] = ()


def pack(
    rows: Mapping[str, Sequence[Row]], pairs: Mapping[str, PairConfig], checkpoint: Path
) -> Packing:
    """Hold the groups of a sweep against what llm-compressor takes.

    Args:
        rows: The rows of each format, by its name.
        pairs: The formats, by the same names.
        checkpoint: Directory of the checkpoint that was scored; nothing is refused where it is
            gone, and a notice says so.
    """
    taken = {name: tuple(each) for name, each in rows.items()}
    covered = {row.layer: row for each in rows.values() for row in each if row.status != "disabled"}
    try:
        shapes = module_shapes(checkpoint, covered.values())
    except UserError as error:
        return Packing(taken, notices=(f"{_UNCHECKED}: {error.where} {error.what}",))
    notices = []
    lost = [name for row in covered.values() for name in row.members if name not in shapes]
    if lost:
        notices.append(
            f"{_UNCHECKED}: {len(lost)} of its modules are not as they were scored in the "
            f"checkpoint {checkpoint}, first {lost[0]}"
        )
    alone = [name for name, each in shapes.items() if any(len(shape) != 2 for shape in each)]
    if alone:
        taken = {name: _without(each, alone) for name, each in taken.items()}
        notices.append(
            "llm-compressor leaves convolutions as they are, and no bits count them: "
            + ", ".join(alone)
        )
    refused: dict[str, set[str]] = {}
    modules: dict[tuple[str, str], list[str]] = {}
    for name in taken:
        for row in covered.values():
            for member in set(row.members) - set(alone):
                reasons = {llm_compressor.unfit(pairs[name], s) for s in shapes.get(member, ())}
                for reason in sorted(reason for reason in reasons if reason is not None):
                    refused.setdefault(name, set()).add(row.layer)
                    modules.setdefault((name, reason), []).append(member)
    left_out = (
        LeftOut(format=name, reason=reason, modules=tuple(sorted(members)))
        for (name, reason), members in modules.items()
    )
    return Packing(taken, refused, tuple(left_out), tuple(notices))


def _without(rows: Sequence[Row], modules: Sequence[str]) -> tuple[Row, ...]:
    """Return rows in which the groups of some modules are disabled."""
    unknown = {"status": "disabled", "sensitivity": None, "sensitivity_per_token": None}
    return tuple(
        row.model_copy(update=unknown) if set(row.members) & set(modules) else row for row in rows
    )
