"""Whether a checkpoint is quantized already, told by its headers and JSON files, without torch.

Its weights are then codes, which mean nothing without their scales: read as weights, they give
numbers that look like any others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsens.checkpoint.files import find_weights, read_config
from qsens.checkpoint.headers import AGAIN, Tensor
from qsens.errors import UserError
from qsens.reading import has_file, shown

# Data types that no module computes in: floats of eight bits and less, and integers.
_SMALL_FLOAT = re.compile(r"F[468](_|$)")
_INTEGER = re.compile(r"[IU]\d+$|BOOL$")
_WEIGHT = re.compile(r"(^|[._])q?weight($|[._:])")
# Integers that count or point: no module multiplies with them. Masks were bytes once.
_BUFFER = re.compile(
    r"position|coord|mask|index|idx|bucket|tracked|_ids$|(^|\.)(attn|attention)\.bias$",
    re.IGNORECASE,
)
# Those that torch gives to indices and truth values.
_BUFFER_DTYPES = ("I64", "BOOL")
# What stands behind the name of a weight, in the names of its scales and zero points.
_SCALES = ("_scale", "_scale_inv", "_scale_2", "_scales", "_zero_point", "._scale", ".absmax")
# Beside a weight: the scale of the module's input.
_INPUT_SCALE = ".input_scale"
# What ModelOpt keeps of its quantizers.
_QUANTIZER = re.compile(r"(weight|input|output)_quantizer\.")
_CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
_FILES = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quanto_qmap.json",
)


def refuse_quantized(path: Path) -> None:
    """Refuse a checkpoint that is quantized already.

    It is where a weight is of integers or of floats of eight bits, where a weight has a scale
    beside it, or where ``config.json`` or another file says how it was quantized.

    Args:
        path: Directory of the checkpoint.

    Raises:
        UserError: It is; the message names the tensor with its data type, or the file and key.
    """
    tensors = find_weights(path).tensors
    where, sign = f"model.path = {path}", _codes(tensors) or _scale(tensors)
    if sign is None:
        key = _key(read_config(path))
        file = next((name for name in _FILES if has_file(path / name, remedy=AGAIN)), None)
        if key is not None:
            sign, where = f"it has {key}", str(path / "config.json")
        elif file is not None:
            sign = f"{file} lies beside its weights"
    if sign is not None:
        raise UserError(
            f"is quantized already: {sign}",
            where=where,
            remedy="Scores say what quantizing would do: set model.path to the checkpoint in 16 or "
            "32 bits that this one was made from.",
        )


def _codes(tensors: Mapping[str, Tensor]) -> str | None:
    """Return in words the first tensor of codes."""
    for name, tensor in tensors.items():
        matrix = sum(size > 1 for size in tensor.shape) > 1
        pointing = tensor.dtype in _BUFFER_DTYPES or _BUFFER.search(name)
        multiplied = _WEIGHT.search(name) or (matrix and not pointing)
        if _SMALL_FLOAT.match(tensor.dtype) or (_INTEGER.match(tensor.dtype) and multiplied):
            return f"{shown(name)} is {tensor.dtype}"
    return None


def _scale(tensors: Mapping[str, Tensor]) -> str | None:
    """Return in words the first weight that has a scale beside it, or a quantizer."""
    for name in tensors:
        weights = [name.removesuffix(end) for end in _SCALES if name.endswith(end)]
        if name.endswith(_INPUT_SCALE):
            weights.append(f"{name.removesuffix(_INPUT_SCALE)}.weight")
        for weight in weights:
            if weight in tensors and len(tensors[weight].shape) > 1:
                return f"{shown(weight)} has {shown(name)} beside it"
        if _QUANTIZER.search(name):
            return f"it holds {shown(name)}"
    return None


def _key(config: Mapping[str, Any], prefix: str = "") -> str | None:
    """Return the first key that says how a checkpoint, or a part of it, was quantized."""
    for key, value in config.items():
        if key in _CONFIG_KEYS and value:
            return shown(f"{prefix}{key}")
        inner = _key(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        if inner is not None:
            return inner
    return None
