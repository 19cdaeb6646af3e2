"""How a checkpoint is quantized already, told by its headers and JSON files, without torch.

Its weights are then codes, which mean nothing without their scales: read as weights, they give
numbers that look like any others. What is understood here is loaded dequantized, see
:mod:`qsens.checkpoint.dequantize`; all else is refused.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qsens.checkpoint.files import find_weights, read_config
from qsens.checkpoint.headers import AGAIN, Tensor, read_integers
from qsens.errors import UserError
from qsens.reading import has_file, shown

Layout = Literal["scaled", "mxfp4", "nvfp4", "compressed-tensors"]
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
# A scale may be of eight bits itself.
_IS_SCALE = re.compile(r"[._]scale(_inv|_2)?$")
# Scales of what is no weight: of a module's input, of a cache. They change nothing that is scored.
_BESIDE = re.compile(
    r"\.(input_(global_)?scale(_ub)?|input_zero_point|activation_scale|([kv]|[kv]_cache)_scale)$"
)
# What inputs are multiplied by, and weights were divided by (AWQ, SmoothQuant).
_SMOOTHED = ".pre_quant_scale"
# Data types that scales of floats have; of bytes, those of an exponent (E8M0).
_SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
# What ModelOpt keeps of its quantizers.
_QUANTIZER = re.compile(r"(weight|input|output)_quantizer\.")
_CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
_FILES = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quanto_qmap.json",
)
# The layouts that compressed-tensors' own code decompresses, of those that it names.
_COMPRESSED = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)
# Where it keeps a weight's codes.
_CODES = (".weight_packed", ".weight")
_READ = (
    "FP8 (fp8, fbgemm_fp8), GPT-OSS's MXFP4, compressed-tensors, and ModelOpt's FP8 and NVFP4 are "
    "read dequantized; of any other kind, set model.path to the checkpoint in 16 or 32 bits that "
    "this one was made from."
)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as codes with scales.

    Attributes:
        layout: ``scaled``: codes that are floats of eight bits, times a scale each block;
            ``mxfp4``, ``nvfp4``: codes of four bits; ``compressed-tensors``: by its own code.
        codes: The codes, with the shape that the weight has once it is dequantized.
        parts: Names in the files by what they are: ``codes``, ``scale`` and ``scale_2``, or as
            compressed-tensors calls them.
        block: Rows and columns that share a scale, where that is so.
    """

    layout: Layout
    codes: Tensor
    parts: Mapping[str, str]
    block: tuple[int, int] | None = None


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized.

    Attributes:
        format: In words: ``FP8 in blocks of 128x128``.
        weights: The weights that are, by the names that they have where they are not.
        settings: ``quantization_config``, as the checkpoint has it.
    """

    format: str
    weights: Mapping[str, QuantizedWeight]
    settings: Mapping[str, Any]

    def dequantized(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint has which is not quantized, by name.

        Args:
            tensors: Those of the files, by name.
        """
        read = {part for weight in self.weights.values() for part in weight.parts.values()}
        kept = {
            name: tensor
            for name, tensor in tensors.items()
            if name not in read and not _BESIDE.search(name)
        }
        return kept | {name: weight.codes for name, weight in self.weights.items()}

    def notice(self, dtype: str) -> str:
        """Return what a reader of scores has to know.

        Args:
            dtype: Data type that the model is loaded in.
        """
        return (
            f"the checkpoint is quantized already, {len(self.weights)} weights of it "
            f"({self.format}): they are dequantized to {dtype}, and scores say what quantizing "
            "them once more would do"
        )


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight, by name, as it is where it is not quantized.

    Raises:
        UserError: The weight files are not whole, or quantized in a way that cannot be read.
    """
    tensors = find_weights(path).tensors
    quantization = read_quantization(path, tensors)
    held = quantization.dequantized(tensors) if quantization is not None else tensors
    return {name: tensor.shape for name, tensor in held.items()}


def read_quantization(path: Path, tensors: Mapping[str, Tensor]) -> Quantization | None:
    """Return how a checkpoint is quantized; none where it is not.

    It is where a weight is of integers or of floats of eight bits, where a weight has a scale
    beside it, or where ``config.json`` or another file says how it was quantized.

    Args:
        path: Directory of the checkpoint.
        tensors: Its tensors, by name.

    Raises:
        UserError: It is, and cannot be read dequantized; the message names the tensor with its data
            type, or the file and key, and what is missing.
    """
    key, settings = _settings(read_config(path))
    file = next((name for name in _FILES if has_file(path / name, remedy=AGAIN)), None)
    sign = _codes(tensors) or _scale(tensors)
    if sign is None and key is None and file is None:
        return None
    where = f"model.path = {path}"
    method = str(settings.get("quant_method", settings.get("quant_algo", "")))
    if not method and file == _FILES[0]:
        method = "modelopt"
    reader = _READERS.get(method)
    if reader is None or sign is None:
        if sign is None:
            sign = f"it has {key}" if key is not None else f"{file} lies beside its weights"
            where = str(path / "config.json") if key is not None else where
        how = f", by {shown(method)}" if method else ""
        raise UserError(f"is quantized already{how}: {sign}", where=where, remedy=_READ)
    weights = {}
    for name, weight in reader(tensors, settings, where):
        weights[name] = weight
        if name in tensors and weight.parts["codes"] != name:
            raise _refusal(f"it holds {shown(name)} twice, with codes and without", where)
    found = Quantization(_in_words(method, settings, weights), weights, settings)
    left = {name: one for name, one in found.dequantized(tensors).items() if name not in weights}
    sign = _codes(left) or _scale(left)
    if sign is not None:
        raise _refusal(f"of {shown(method)} it is not known what to do where {sign}", where)
    return found


Read = Iterator[tuple[str, QuantizedWeight]]


def _scaled(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], where: str) -> Read:
    """Yield weights of FP8 with scales, and ModelOpt's of NVFP4."""
    size = settings.get("weight_block_size")
    stated = size if isinstance(size, list) and len(size) == 2 else None
    if stated is not None and not all(type(each) is int and each > 0 for each in stated):
        raise _refusal(f"its weight_block_size is {shown(size)}", where)
    for name, codes in tensors.items():
        scales = (f"{name}_scale_inv", f"{name}_scale", f"{name.removesuffix('.weight')}.scale")
        scale = next((one for one in scales if one in tensors and one != name), None)
        second = f"{name}_scale_2"
        if codes.dtype in ("F8_E4M3", "F8_E5M2") and not _IS_SCALE.search(name):
            if scale is None:
                raise _refusal(f"{shown(name)} is {codes.dtype} and has no scale", where)
            block = _block(codes.shape, tensors[scale].shape, stated)
            if block is None or tensors[scale].dtype not in _SCALE_TYPES:
                raise _refusal(
                    f"{shown(scale)} of {tensors[scale].dtype} and shape "
                    f"{list(tensors[scale].shape)} does not fit {shown(name)} of "
                    f"{list(codes.shape)}",
                    where,
                )
            yield name, QuantizedWeight("scaled", codes, {"codes": name, "scale": scale}, block)
        elif codes.dtype == "U8" and scale is not None and second in tensors:
            *rows, columns = codes.shape
            fits = tensors[scale].shape == (*rows, columns * 2 // 16)
            if not fits or tensors[scale].dtype != "F8_E4M3":
                raise _refusal(f"{shown(scale)} does not fit {shown(name)}", where)
            yield (
                name,
                QuantizedWeight(
                    "nvfp4",
                    replace(codes, shape=(*rows, columns * 2)),
                    {"codes": name, "scale": scale, "scale_2": second},
                ),
            )


def _block(
    shape: tuple[int, ...], scale: tuple[int, ...], stated: list[int] | None
) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale; none where the shapes do not fit."""
    if len(shape) < 2:
        return None
    rows, columns = shape[-2:]
    if set(scale) <= {1}:
        return rows, columns
    if len(scale) < 2:  # one a row
        return (1, columns) if scale == (rows,) else None
    if len(scale) == 4 and scale[1] == scale[3] == 1:  # as ModelOpt keeps blocks
        scale = (scale[0], scale[2])
    across, along = scale[-2:]
    if scale[:-2] != shape[:-2] or not across or not along:
        return None
    block = (stated[0], stated[1]) if stated else (-(-rows // across), -(-columns // along))
    fits = (-(-rows // block[0]), -(-columns // block[1])) == (across, along)
    even = stated is not None or not (rows % across or columns % along)
    return block if fits and even else None


def _mxfp4(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], where: str) -> Read:
    """Yield GPT-OSS's experts: 16 bytes of codes a block, and a weight that lies transposed."""
    for name, codes in tensors.items():
        stem = name.removesuffix("_blocks")
        scale = f"{stem}_scales"
        if stem == name or codes.dtype != "U8":
            continue
        if scale not in tensors or (*tensors[scale].shape, 16) != codes.shape:
            raise _refusal(f"{shown(name)} has no {shown(scale)} that fits", where)
        *experts, rows, blocks, _ = codes.shape
        yield (
            stem,
            QuantizedWeight(
                "mxfp4",
                replace(codes, shape=(*experts, blocks * 32, rows)),
                {"codes": name, "scale": scale},
            ),
        )


def _compressed(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], where: str) -> Read:
    """Yield the weights of a checkpoint of compressed-tensors."""
    held = settings.get("config_groups")
    groups = list(held.values()) if isinstance(held, dict) else []
    groups = [group for group in groups if isinstance(group, dict)]
    formats = {str(group.get("format") or settings.get("format")) for group in groups}
    others = sorted(formats - set(_COMPRESSED))
    sparse = settings.get("sparsity_config") or {}
    if not isinstance(sparse, dict) or sparse.get("format") not in (None, "dense"):
        others.append("with sparse weights")
    if settings.get("transform_config"):  # weights are rotated, and inputs have to be
        others.append("with a transform_config")
    if others or not groups:
        named = shown(others[0]) if others else "without config_groups"
        raise _refusal(f"compressed-tensors {named} is not read", where)
    if _is_missing("compressed_tensors"):
        raise UserError(
            "is quantized already, and compressed-tensors is not installed, which reads it",
            where=where,
            remedy='Install it: pip install "qsens[compressed-tensors]".',
        )
    for name, codes in tensors.items():
        ending = next((end for end in _CODES if name.endswith(end)), None)
        if ending is None or f"{name.removesuffix(ending)}.weight_scale" not in tensors:
            continue
        stem = name.removesuffix(ending)
        parts = {
            part: f"{stem}.{part}"
            for part in ("weight_scale", "weight_zero_point", "weight_global_scale")
            if f"{stem}.{part}" in tensors
        }
        shape = codes.shape
        if f"{stem}.weight_shape" in tensors:
            parts["weight_shape"] = f"{stem}.weight_shape"
            shape = read_integers(tensors[parts["weight_shape"]])
        elif codes.dtype == "U8":  # two of four bits a byte
            shape = (*shape[:-1], shape[-1] * 2)
        if f"{stem}.weight_g_idx" in tensors:
            parts["weight_g_idx"] = f"{stem}.weight_g_idx"
        yield (
            f"{stem}.weight",
            QuantizedWeight(
                "compressed-tensors", replace(codes, shape=shape), {"codes": name, **parts}
            ),
        )


_READERS: Mapping[str, Callable[[Mapping[str, Tensor], Mapping[str, Any], str], Read]] = {
    "fp8": _scaled,
    "fbgemm_fp8": _scaled,
    "modelopt": _scaled,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
}


def _is_missing(package: str) -> bool:
    """Return whether a package is not installed where torch is: a host that plans needs neither."""
    found = importlib.util.find_spec
    return found("torch") is not None and found(package) is None


def _in_words(
    method: str, settings: Mapping[str, Any], weights: Mapping[str, QuantizedWeight]
) -> str:
    if method == "compressed-tensors":
        groups = settings["config_groups"].values()
        formats = sorted({str(group.get("format") or settings["format"]) for group in groups})
        return f"{method}, {' and '.join(formats)}"
    return " and ".join(sorted({_scheme(weight) for weight in weights.values()}))


def _scheme(weight: QuantizedWeight) -> str:
    """Return in words how a weight is quantized."""
    if weight.block is None:
        return weight.layout.upper()
    rows, columns = weight.codes.shape[-2:]
    if weight.block == (rows, columns):
        return "FP8 with a scale a tensor"
    if weight.block == (1, columns):
        return "FP8 with a scale a channel"
    return f"FP8 in blocks of {weight.block[0]}x{weight.block[1]}"


def _refusal(what: str, where: str) -> UserError:
    return UserError(f"is quantized already: {what}", where=where, remedy=_READ)


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
        if name.endswith(".input_scale"):
            weights.append(f"{name.removesuffix('.input_scale')}.weight")
        for weight in weights:
            if weight in tensors and len(tensors[weight].shape) > 1:
                return f"{shown(weight)} has {shown(name)} beside it"
        if _QUANTIZER.search(name) or name.endswith(_SMOOTHED):
            return f"it holds {shown(name)}"
    return None


def _settings(config: Mapping[str, Any], prefix: str = "") -> tuple[str | None, Mapping[str, Any]]:
    """Return the first key that says how a checkpoint, or a part of it, was quantized; and it."""
    for key, value in config.items():
        if key in _CONFIG_KEYS and value:
            return shown(f"{prefix}{key}"), value if isinstance(value, dict) else {}
        if isinstance(value, dict):
            inner = _settings(value, f"{prefix}{key}.")
            if inner[0] is not None:
                return inner
    return None, {}
