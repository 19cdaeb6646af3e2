"""Bytes that weights take on disk in a format: codes, scales, zero points, all that is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qsens.config import PairConfig

_WORD = 32
# The shape beside codes that are packed into words: two int64.
_SHAPE_BYTES = 16
# A scale of a whole tensor, and that of a calibrated input: float32.
_ONE_SCALE = 4


def packed_bytes(shape: Sequence[int], pair: PairConfig, stored: int) -> int:
    """Return the bytes of a module's tensors once its weight is packed.

    Args:
        shape: The weight's, ``(out, in)``.
        pair: Its format.
        stored: Bytes of a number of the checkpoint: scales of channels, groups and blocks have its
            data type.

    Source: what the compressors of compressed-tensors 0.20 write, which a test holds it to.
    """
    rows, columns = shape
    weight, inputs = pair.weight_quantizer, pair.input_quantizer
    bits, sizes = weight.bits(), weight.sizes()
    width = sizes.get(-1) or columns
    groups = math.ceil(columns / width)
    calibrated = inputs is not None and inputs.needs_calibration()
    total = _ONE_SCALE if calibrated else 0
    if weight.has_block_format():
        over = _ONE_SCALE if weight.needs_calibration() else 0
        return total + rows * math.ceil(columns * bits / 8) + rows * groups + over
    if isinstance(weight.num_bits, int) and (inputs is None or bits < 8):
        total += rows * math.ceil(columns * bits / _WORD) * _WORD // 8 + _SHAPE_BYTES
        if not weight.symmetric:
            total += math.ceil(rows * bits / _WORD) * groups * _WORD // 8
    else:
        total += rows * columns
    if weight.is_whole_tensor():
        return total + _ONE_SCALE
    return total + math.ceil(rows / (sizes.get(-2) or 1)) * groups * stored


def plain_bytes(shape: Sequence[int], stored: int) -> int:
    """Return the bytes of a weight that stays as it is.

    Args:
        shape: Its shape.
        stored: Bytes of a number of the checkpoint.
    """
    return math.prod(shape) * stored
