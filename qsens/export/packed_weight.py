"""A weight packed as compressed-tensors stores it, by its own compressors. Needs torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor, nn

from qsens.config import PairConfig
from qsens.config.pairs import QuantizerConfig
from qsens.numerics.compressed_tensors import over_of, scales_of
from qsens.numerics.formats import format_of
from qsens.recipes.formats import llm_compressor


def scheme_of(pair: PairConfig, targets: tuple[str, ...] = ()) -> QuantizationScheme:
    """Return a pair as a scheme of compressed-tensors, the layout of its weights stated.

    Args:
        pair: The pair.
        targets: Names or patterns of the modules that get it.
    """
    scheme = QuantizationScheme(targets=list(targets), **llm_compressor.scheme(pair))
    scheme.format = infer_module_format(nn.Linear, scheme)
    return scheme


def pack(
    weight: Tensor, pair: PairConfig, *, amax: Tensor | None = None, inputs: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the tensors that stand for a weight, by what they are called below its module's name.

    Codes and scales are those of :mod:`qsens.numerics.compressed_tensors`, bit for bit.

    Args:
        weight: ``(out, in)``, in the data type that it was scored in.
        pair: Its format, of compressed-tensors.
        amax: That of all weights which are fused with it, in formats with one scale for them;
            measured when not given.
        inputs: Calibrated amax of the module's input, where the pair needs one.
    """
    scheme, fmt = scheme_of(pair), format_of(pair.weight_quantizer.cfg())
    scales = scales_of(weight, fmt, amax)
    columns = math.ceil(weight.shape[1] / fmt.size) if fmt.size else 1
    rows = math.ceil(weight.shape[0] / fmt.rows)
    one = len(scales.scale) == 1 and fmt.has_one_scale(2)
    shape = (1,) if one else (rows, columns)
    state = {"weight": weight.float(), "weight_scale": scales.scale.reshape(shape)}
    if scales.zero_point is not None:
        state["weight_zero_point"] = scales.zero_point.reshape(shape).to(torch.int8)
    if scales.over is not None:
        state["weight_global_scale"] = scales.over.reshape(1)
    compressor: Any = BaseCompressor.get_value_from_registry(scheme.format)
    packed: dict[str, Tensor] = compressor.compress(state, scheme)
    if packed["weight_scale"].dtype == torch.float32 and not one:
        packed["weight_scale"] = packed["weight_scale"].to(weight.dtype)  # exact: so it was rounded
    if pair.input_quantizer is not None and pair.input_quantizer.needs_calibration():
        assert inputs is not None, "a calibrated input without its amax"
        packed |= _input_scale(pair.input_quantizer, inputs)
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def _input_scale(quantizer: QuantizerConfig, amax: Tensor) -> dict[str, Tensor]:
    """Return the scale of a calibrated input; of NVFP4 that over its block scales."""
    most = amax.float().reshape(1)
    if quantizer.has_block_format():
        return {"input_global_scale": over_of(most)}
    return {"input_scale": most / format_of(quantizer.cfg()).element.largest}
