"""Weights of a checkpoint that is quantized already, given back one after the other. Needs torch.

transformers dequantizes some of them itself, each kind by code and packages of its own, and refuses
blocks that do not divide a weight (DeepSeek's ``kv_a_proj_with_mqa`` has 576 rows in blocks of
128). Here a checkpoint looks as if it were not quantized: the same names, shapes and numbers, so
that whatever a class does with its weights works as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qsens.checkpoint.headers import Tensor as StoredTensor
from qsens.checkpoint.quantized import Quantization, QuantizedWeight

# Values of FP4 (E2M1) by code, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Of E8M0, the same.
_BIAS = 127
_NVFP4_BLOCK = 16


def lazy_tensors(
    tensors: Mapping[str, StoredTensor], quantization: Quantization, dtype: torch.dtype
) -> dict[str, Any]:
    """Return a checkpoint's tensors by name, each read, and dequantized, when it is sliced.

    Slicing (``tensor[...]``) is how transformers reads what is handed to it as ``state_dict``.

    Args:
        tensors: Its tensors, by name.
        quantization: How they are quantized.
        dtype: Data type of the weights that are dequantized.
    """

    @cache
    def opened(file: Path) -> Any:
        return safe_open(file, framework="pt")

    def read(name: str) -> Tensor:
        tensor: Tensor = opened(tensors[name].file).get_tensor(name)
        return tensor

    schemes = _schemes(quantization)
    return {
        name: _Dequantized(quantization.weights[name], schemes, read, dtype)
        if name in quantization.weights
        else opened(tensor.file).get_slice(name)
        for name, tensor in quantization.dequantized(tensors).items()
    }


class _Dequantized:
    """A weight that is dequantized when it is sliced."""

    def __init__(
        self, weight: QuantizedWeight, schemes: Mapping[str, Any], read: Any, dtype: torch.dtype
    ) -> None:
        self._weight = weight
        self._schemes = schemes
        self._read = read
        self._dtype = dtype

    def __getitem__(self, index: Any) -> Tensor:
        parts = {part: self._read(name) for part, name in self._weight.parts.items()}
        return dequantize(self._weight, parts, self._schemes, self._dtype)[index]


def dequantize(
    weight: QuantizedWeight,
    parts: Mapping[str, Tensor],
    schemes: Mapping[str, Any],
    dtype: torch.dtype,
) -> Tensor:
    """Return a weight's numbers, in float32 rounded once to ``dtype``.

    Args:
        weight: How it is quantized.
        parts: Its parts, as the files hold them.
        schemes: Those of compressed-tensors, see :func:`_schemes`.
        dtype: Data type of the result.
    """
    if weight.layout == "compressed-tensors":
        return _decompressed(weight, parts, schemes).to(dtype)
    out = torch.empty(_stored_shape(weight), dtype=dtype)
    # One expert after the other: in float32 all of them are several times the codes.
    experts = out.unsqueeze(0) if out.ndim == 2 else out
    held = {name: part.unsqueeze(0) if out.ndim == 2 else part for name, part in parts.items()}
    for index, expert in enumerate(experts):
        own = {name: part[index] if name != "scale_2" else part for name, part in held.items()}
        if weight.block is not None:
            expert.copy_(_scaled(own["codes"], own["scale"], weight.block))
        elif weight.layout == "mxfp4":
            scale = _powers(own["scale"])
            expert.copy_((_four_bits(own["codes"]) * scale.unsqueeze(-1)).flatten(-2))
        else:
            scale = own["scale"].float() * parts["scale_2"].float()
            values = _four_bits(own["codes"]).reshape(*scale.shape, _NVFP4_BLOCK)
            expert.copy_((values * scale.unsqueeze(-1)).flatten(-2))
    return out.mT.contiguous() if weight.layout == "mxfp4" else out


def _stored_shape(weight: QuantizedWeight) -> tuple[int, ...]:
    """Return a weight's shape as its codes lie."""
    *experts, rows, columns = weight.codes.shape
    transposed = weight.layout == "mxfp4"
    return (*experts, columns, rows) if transposed else (*experts, rows, columns)


def _scaled(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Return codes times the scale of each block; the last blocks may be cut off."""
    rows, columns = codes.shape
    grid = _powers(scale) if scale.dtype == torch.uint8 else scale.float()
    grid = grid.reshape(-(-rows // block[0]), -(-columns // block[1]))
    spread = grid.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return codes.float() * spread


def _powers(exponents: Tensor) -> Tensor:
    """Return the powers of two that bytes are the exponents of (E8M0)."""
    return torch.ldexp(torch.ones(exponents.shape), exponents.int() - _BIAS)


def _four_bits(codes: Tensor) -> Tensor:
    """Return the values of two codes a byte, the lower bits first: twice as many columns."""
    values = torch.tensor(_E2M1)
    pairs = torch.stack((codes & 0xF, codes >> 4), -1).flatten(-2)
    return values[pairs.int()]


def _schemes(quantization: Quantization) -> Mapping[str, Any]:
    """Return the groups of compressed-tensors, each with its format; none of other layouts."""
    if all(weight.layout != "compressed-tensors" for weight in quantization.weights.values()):
        return {}
    from compressed_tensors.quantization import QuantizationConfig

    settings = quantization.settings
    groups: dict[str, Any] = QuantizationConfig.model_validate(settings).config_groups
    for scheme in groups.values():
        scheme.format = scheme.format or settings["format"]
    return groups


def _decompressed(
    weight: QuantizedWeight, parts: Mapping[str, Tensor], schemes: Mapping[str, Any]
) -> Tensor:
    """Return what compressed-tensors' own code makes of a weight."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.utils.match import match_name

    _, _, codes = weight.parts["codes"].rpartition(".")
    module = weight.parts["codes"].removesuffix(f".{codes}")
    groups = schemes.values()
    named = [one for one in groups if any(match_name(module, to) for to in one.targets)]
    scheme = (named or [one for one in groups if "Linear" in one.targets])[0]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    state = {codes if name == "codes" else name: part for name, part in parts.items()}
    weights: Tensor = compressor.decompress(state, scheme)["weight"]
    return weights


def without_quantization(settings: Any) -> None:
    """Let transformers take a configuration for one of a checkpoint that is not quantized.

    Args:
        settings: The configuration; changed in place, with those of its parts.
    """
    for part in (settings, *(getattr(settings, name, None) for name in settings.sub_configs)):
        if part is not None and hasattr(part, "quantization_config"):
            del part.quantization_config
