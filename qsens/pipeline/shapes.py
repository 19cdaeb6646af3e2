"""Shapes of the modules of a sweep, from the headers of its checkpoint. Never imports torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from qsens.checkpoint.quantized import shapes
from qsens.errors import UserError
from qsens.names import Kind, inner_name
from qsens.pipeline.preflight import covered_shapes
from qsens.recipes.format_choices import weights_of
from qsens.schema.summary import Row

Shape = tuple[int, ...]


def module_shapes(checkpoint: Path, rows: Iterable[Row]) -> dict[str, dict[str, Shape]]:
    """Return the shapes of the weights of each module, ``(out, in, ...)``, by its name and theirs.

    A dense module has one weight; a layer of experts has those of every expert. A head without a
    weight of its own has the embedding's. Modules whose weights are not found, or do not add up to
    what the sweep scored, are left out: the checkpoint is another one by now.

    Args:
        checkpoint: The checkpoint's directory.
        rows: The rows of one cell.

    Raises:
        UserError: The checkpoint is gone, or broken.
    """
    try:
        stored = shapes(checkpoint)
    except OSError as error:
        raise UserError(
            f"cannot be read: {error}", where=str(checkpoint), remedy="Put it back."
        ) from error
    oriented = {**stored, **covered_shapes(stored, ())}
    named = by_inner_name(stored)
    by_module: dict[str, dict[str, Shape]] = {}
    for row in rows:
        weights = {member: stored_weights(member, row.kind, named) for member in row.members}
        elements = sum(math.prod(stored[name]) for names in weights.values() for name in names)
        if all(weights.values()) and elements == weights_of(row):
            for member, names in weights.items():
                by_module[member] = {name: oriented[name] for name in names}
    return by_module


def by_inner_name(stored: Iterable[str]) -> dict[str, str]:
    """Return names in the files by what follows their outer parts, in which they may be older."""
    return {inner_name(name): name for name in stored}


def stored_weights(member: str, kind: Kind, named: Mapping[str, str]) -> list[str]:
    """Return the names in the files of a module's weights; a tied head's is the embedding's.

    Args:
        member: Name of the module.
        kind: What its group is.
        named: See :func:`by_inner_name`.
    """
    inner = inner_name(member)
    if kind == "experts":
        return [name for key, name in named.items() if key.startswith(f"{inner}.")]
    own = named.get(f"{inner}.weight")
    if own is None and kind == "head":
        own = named.get("embed_tokens.weight")
    return [own] if own is not None else []
