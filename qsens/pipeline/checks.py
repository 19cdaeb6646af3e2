"""What can be refused before any GPU time is spent: formats that fit no weight, a full disk.

Never imports torch.
"""

from __future__ import annotations

import fnmatch
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from qsens.config import PairConfig, SweepConfig
from qsens.config.pairs import QuantizerConfig
from qsens.errors import UserError
from qsens.grid import Plan
from qsens.store import Store

Shapes = Mapping[str, tuple[int, ...]]

_MIB = 1 << 20
# A group in the manifest, in three reports and in the sweep's summary.
_ROW_BYTES = 4096
_SAMPLE_BYTES = 8
# The script that all pages share, the plan, temporary files.
_FIXED_BYTES = 16 * _MIB


def covered_shapes(shapes: Shapes, vision_patterns: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return the weights of a checkpoint that may be quantized, as far as its headers tell.

    Args:
        shapes: Shape of every tensor, by name.
        vision_patterns: Module name patterns (fnmatch) that are left alone.
    """
    return {
        name: shape
        for name, shape in shapes.items()
        if len(shape) >= 2
        # An embedding is a matrix; a patch embedding is a convolution.
        and ("embed" not in name or len(shape) > 2)
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
    for own in config.quant_pair:
        for granularity in config.quant_granularity:
            if own.refusal(granularity) is None:
                pair = own.with_granularity(granularity)
                at = "" if granularity.name == "default" else f" at {granularity.name}"
                notices += _notices(pair, f"{pair.name}{at}", shapes)
    return notices


def check_disk(plan: Plan, shapes: Shapes) -> None:
    """Refuse a sweep whose results do not fit on the disk.

    The estimate: a float64 a group and scored sample, and some kilobytes a group for manifest and
    reports; once where results are kept, if they are not there yet, and once where they are
    published. Every weight is counted as a group.

    Args:
        plan: The sweep.
        shapes: Shape of every tensor of the checkpoint, by name.

    Raises:
        UserError: Too little is free.
    """
    store = Store(plan)
    groups = sum(len(shape) >= 2 for shape in shapes.values())
    needed = _FIXED_BYTES
    for cell in plan.cells:
        copies = 1 if store.is_done(cell) else 2
        needed += copies * groups * (_SAMPLE_BYTES * plan.samples_scored(cell) + _ROW_BYTES)
    for directory in {_existing(plan.results), _existing(store.model_dir())}:
        free = shutil.disk_usage(directory).free
        if free < needed:
            raise UserError(
                f"{len(plan.cells)} cells need about {math.ceil(needed / _MIB)} MiB, "
                f"{free // _MIB} MiB are free",
                where=f"disk of {directory}",
                remedy="Free some space (`qsens prune`), or set QSENS_RESULTS to a larger disk.",
            )


def _notices(pair: PairConfig, name: str, shapes: Shapes) -> list[str]:
    quantizer = pair.weight_quantizer
    named = _dimensions(quantizer)
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


def _dimensions(quantizer: QuantizerConfig) -> dict[int, int | None]:
    """Return the dimensions of a weight that a quantizer names, with the block size where set."""
    found: dict[int, int | None] = {}
    axis = quantizer.axis
    for dimension in (axis,) if isinstance(axis, int) else axis or ():
        found[dimension] = None
    for key, size in (quantizer.block_sizes or {}).items():
        if key.lstrip("-").isdigit():
            found[int(key)] = size if isinstance(size, int) else None
    return found


def _existing(path: Path) -> Path:
    """Return the nearest directory that exists, ``path`` or one above it."""
    while not path.is_dir():
        path = path.parent
    return path
