"""The weight files of a packed checkpoint, written one after the other. Needs torch.

One source file is open at a time, and what is made of it is held until it is written: memory is
bounded by two files, whatever the checkpoint's size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qsens.checkpoint.files import INDEX, SINGLE, Weights
from qsens.checkpoint.headers import read_tensors
from qsens.config import PairConfig
from qsens.engine.quantizer import shares_scale
from qsens.export.packed_weight import pack
from qsens.numerics.scales import abs_max
from qsens.writing import write_file, write_text

Progress = Callable[[str, int, int], None]
# How safetensors says what the operating system said.
_ERRNO = re.compile(r"os error (\d+)")


@dataclass(frozen=True)
class PackedModule:
    """A module that is packed.

    Attributes:
        name: What its tensors begin with in the packed files.
        source: Name of its weight in the source's files.
        pair: Its format.
        fused: Names there of all weights that servers fuse with it, its own too.
        inputs: Calibrated amax of its input, where its format needs one.
        keeps: Whether the source's tensor stays as well: a head's that is the embedding's.
    """

    name: str
    source: str
    pair: PairConfig
    fused: tuple[str, ...]
    inputs: Tensor | None = None
    keeps: bool = False


def write_shards(
    weights: Weights,
    modules: Sequence[PackedModule],
    directory: Path,
    dtype: torch.dtype,
    progress: Progress,
) -> int:
    """Write a file for each of the source's, and their index; files that are there are kept.

    Args:
        weights: The source's.
        modules: What is packed; all else stays as it is, but for matrices in float32.
        directory: Where they go.
        dtype: Data type that weights were scored in, which those get.
        progress: Called with a phase, files written, and files in all.

    Returns:
        Bytes of all files.

    Raises:
        DiskFull: The disk is full; what is whole is kept.
    """
    by_source: dict[str, list[PackedModule]] = {}
    for module in modules:
        by_source.setdefault(module.source, []).append(module)
    amax: dict[tuple[str, ...], Tensor] = {}
    names = _names(weights)
    places: dict[str, str] = {}
    for done, file in enumerate(weights.files):
        progress("pack", done, len(weights.files))
        target = directory / names[file]
        if not target.exists():
            _write(file, target, weights, by_source, amax, dtype)
        places |= dict.fromkeys(read_tensors(target), target.name)
    progress("pack", len(weights.files), len(weights.files))
    total = sum((directory / name).stat().st_size for name in names.values())
    if len(names) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")
    return total


def _names(weights: Weights) -> dict[Path, str]:
    """Return what the file made of each of the source's is called."""
    if len(weights.files) == 1:
        return {weights.files[0]: SINGLE}
    count = len(weights.files)
    return {
        file: f"model-{number:05d}-of-{count:05d}.safetensors"
        for number, file in enumerate(weights.files, 1)
    }


def _write(
    file: Path,
    target: Path,
    weights: Weights,
    by_source: Mapping[str, Sequence[PackedModule]],
    amax: dict[tuple[str, ...], Tensor],
    dtype: torch.dtype,
) -> None:
    made: dict[str, Tensor] = {}
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - it is no mapping
            tensor = opened.get_tensor(name)
            packed = by_source.get(name, ())
            for module in packed:
                shared = _shared_amax(module, weights, amax, dtype)
                parts = pack(tensor.to(dtype), module.pair, amax=shared, inputs=module.inputs)
                made |= {f"{module.name}.{part}": each for part, each in parts.items()}
            if not packed or any(module.keeps for module in packed):
                # Matrices as they were scored; a model may want its vectors in float32.
                scored = tensor.ndim > 1 and tensor.dtype == torch.float32
                made[name] = tensor.to(dtype) if scored else tensor
    with write_file(target) as temporary:
        try:
            save_file(made, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            number = _ERRNO.search(str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), str(error)) from error


def _shared_amax(
    module: PackedModule,
    weights: Weights,
    known: dict[tuple[str, ...], Tensor],
    dtype: torch.dtype,
) -> Tensor | None:
    """Return the amax of weights that have one scale; none where a weight has its own."""
    if len(module.fused) < 2 or not shares_scale(module.pair.weight_quantizer.cfg()):
        return None
    if module.fused not in known:
        known[module.fused] = torch.stack(
            [abs_max(_read(weights, name).to(dtype)).float() for name in module.fused]
        ).amax()
    return known[module.fused]


def _read(weights: Weights, name: str) -> Tensor:
    opened: Any
    with safe_open(weights.tensors[name].file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor
