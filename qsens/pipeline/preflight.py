"""What can be refused before any GPU time is spent: formats that fit no weight, a full disk.

Never imports torch.
"""

from __future__ import annotations

import fnmatch
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from qsens.config import PairConfig, SweepConfig
from qsens.errors import UserError
from qsens.grid import Plan
from qsens.reading import has_directory, has_file
from qsens.store import Store

# The tensors that hold all experts of a layer, where files hold them so.
_FUSED = ("gate_up_proj", "down_proj")

Shapes = Mapping[str, tuple[int, ...]]

_MIB = 1 << 20
_ANOTHER = "Choose another one: QSENS_RESULTS, runner.output_dir."
# A group in the manifest, in three reports and in the sweep's summary.
_ROW_BYTES = 4096
_SAMPLE_BYTES = 8
# An expert in the manifest of a cell: its score and its tokens.
_EXPERT_BYTES = 64
# The script that all pages share, the plan, temporary files.
_FIXED_BYTES = 16 * _MIB


def covered_shapes(shapes: Shapes, vision_patterns: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return the weights of a checkpoint that may be quantized, as far as its headers tell.

    A mixture's experts are matrices, however they lie in the files; its router is left alone.

    Args:
        shapes: Shape of every tensor, by name.
        vision_patterns: Module name patterns (fnmatch) that are left alone.
    """
    return {
        name: _of_expert(name, shape, shapes)
        for name, shape in shapes.items()
        if len(shape) >= 2
        # An embedding is a matrix; a patch embedding is a convolution.
        and ("embed" not in name or len(shape) > 2)
        and not _is_router(name, shapes)
        and not any(
            fnmatch.fnmatch(name.removesuffix(".weight"), pattern) for pattern in vision_patterns
        )
    }


def check_formats(config: SweepConfig, shapes: Shapes) -> list[str]:
    """Refuse a format that is possible for no weight of the checkpoint.

    Args:
        config: The sweep.
        shapes: The weights that may be quantized, by name; see :func:`covered_shapes`.

    Returns:
        A notice for each format that some weights do not fit: those are filled up with zeros to
        whole blocks, as ModelOpt does, or their groups fail.

    Raises:
        UserError: A pair names dimensions that no weight has.
    """
    notices = []
    for own, granularity in config.formats:
        pair = own.with_granularity(granularity)
        at = "" if granularity.name == "default" else f" at {granularity.name}"
        notices += _notices(pair, f"{pair.name}{at}", shapes)
    return notices


def check_disk(plan: Plan, shapes: Shapes) -> None:
    """Refuse a sweep whose results do not fit on the disk.

    The estimate: a float64 a group and scored sample, and some kilobytes a group for manifest and
    reports; once where results are kept, if they are not there yet, and once where they are
    published. Every weight is counted as a group, all experts of a layer as one.

    Args:
        plan: The sweep.
        shapes: Shape of every tensor of the checkpoint, by name.

    Raises:
        UserError: Too little is free, or a file stands where a directory has to.
    """
    store = Store(plan)
    weights = {name: shape for name, shape in shapes.items() if len(shape) >= 2}
    groups = len({re.sub(r"\.experts\..*", ".experts", name) for name in weights})
    experts = sum(
        shape[0] if name.endswith(f".experts.{_FUSED[0]}") else 1
        for name, shape in weights.items()
        if re.search(r"\.experts\.(gate_up_proj|\d+\.gate_proj\.weight)$", name)
    )
    needed = _FIXED_BYTES
    for cell in plan.cells:
        copies = 1 if store.is_done(cell) else 2
        row = _SAMPLE_BYTES * cell.scored + _ROW_BYTES
        needed += copies * (groups * row + experts * _EXPERT_BYTES)
    for directory in {existing(plan.results), existing(store.model_dir())}:
        free = shutil.disk_usage(directory).free
        if free < needed:
            raise UserError(
                f"{len(plan.cells)} cells need about {math.ceil(needed / _MIB)} MiB, "
                f"{free // _MIB} MiB are free",
                where=f"disk of {directory}",
                remedy="Free some space (`qsens prune`), or set QSENS_RESULTS to a larger disk.",
            )


def _of_expert(name: str, shape: tuple[int, ...], shapes: Shapes) -> tuple[int, ...]:
    """Return the shape of one expert's matrix, ``(out, in)``; any other weight's as it is.

    Files that hold all experts in one tensor may hold each of them transposed. ``down`` gives back
    as many channels as ``gate_up`` reads, whichever way round both lie.
    """
    stem, _, leaf = name.rpartition(".")
    if len(shape) != 3 or leaf not in _FUSED:
        return shape
    first, second = (shapes.get(f"{stem}.{part}", (0, 0, 1)) for part in _FUSED)
    return (shape[2], shape[1]) if first[1] == second[2] else (shape[1], shape[2])


def _is_router(name: str, shapes: Shapes) -> bool:
    """Return whether a weight chooses the experts of a token."""
    stem = name.removesuffix("gate.weight")
    return stem != name and any(other.startswith(f"{stem}experts.") for other in shapes)


def _notices(pair: PairConfig, name: str, shapes: Shapes) -> list[str]:
    quantizer = pair.weight_quantizer
    named = {**dict.fromkeys(quantizer.axes()), **quantizer.sizes()}
    fitting = {
        weight: shape
        for weight, shape in shapes.items()
        if all(-len(shape) <= dimension < len(shape) for dimension in named)
    }
    if shapes and not fitting:
        raise UserError(
            f"{name} names dimension {max(named, key=abs)} of weights, and no weight of the "
            "checkpoint that may be quantized has it",
            where=f"quant_pair {pair.name}",
            remedy="Mend the pair's weight_quantizer, or leave the pair out.",
        )
    notices = []
    if len(fitting) < len(shapes):
        rest = len(shapes) - len(fitting)
        notices.append(f"{name}: {rest} of {len(shapes)} weights lack a dimension that it names")
    short = [
        weight
        for weight, shape in fitting.items()
        if any(size and shape[dimension] % size for dimension, size in named.items())
    ]
    if short:
        notices.append(
            f"{name}: {len(short)} of {len(shapes)} weights do not divide into its blocks, first "
            f"{short[0]}: the last block of a row is shorter"
        )
    return notices


def existing(path: Path) -> Path:
    """Return the nearest directory that exists, ``path`` or one above it.

    Raises:
        UserError: A file stands in the way, or nobody may look.
    """
    nearest = path
    while not has_directory(nearest, remedy=_ANOTHER):
        if has_file(nearest, remedy=_ANOTHER):
            raise UserError(
                f"{nearest} is a file, and results go below it",
                where=f"directory {path}",
                remedy=_ANOTHER,
            )
        nearest = nearest.parent
    return nearest
