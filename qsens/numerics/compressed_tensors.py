"""Quantization as compressed-tensors defines it, which servers load: scales that divide.

Where ModelOpt multiplies by ``largest / amax``, here a value is divided by a scale that a
checkpoint stores, and half of the whole range stands for ``amax``: 7.5 for INT4, 127.5 for INT8.
All of it is computed in float32, so that codes are those that compressed-tensors gives for the same
scales and a tensor in float32, bit for bit. Scales of weights are rounded to the data type of the
weight, in which a checkpoint stores them; the one scale of a whole tensor, and those of
activations, are float32, as servers hold them.

Source: ``calculate_qparams``, ``quantize`` and ``generate_mx_scales`` of compressed-tensors 0.20.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qsens.numerics.blocks import from_blocks, to_blocks
from qsens.numerics.floats import E2M1, E4M3, Float
from qsens.numerics.formats import Format, Sharing
from qsens.numerics.integers import Integer
from qsens.numerics.scales import abs_max

#: A block scale in E4M3 that rounds to 0 is this instead.
_LEAST_E4M3 = 0.125
# Added to the bits of a float32: magnitudes from 1.75 of a power of two on count as the next one.
_MX_ROUNDS_UP = 1 << 21
_EXPONENT = 0x7F800000
_BIAS = 127


@dataclass(frozen=True)
class Scales:
    """What a tensor is scaled by: ``value = (code - zero_point) * scale / over``.

    Attributes:
        scale: float32, ``(scales, 1)``, in the order of `grouped`; in MX formats powers of two, in
            NVFP4 numbers of E4M3.
        zero_point: Whole numbers, float32, shaped as ``scale``; None where 0 is the middle.
        over: NVFP4's scale over the block scales, a float32 scalar; None in other formats.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    over: Tensor | None = None

    @property
    def effective(self) -> Tensor:
        """The number that values are divided by, ``(scales, 1)``."""
        return self.scale if self.over is None else self.scale / self.over


def fake(x: Tensor, fmt: Format, amax: Tensor | None) -> Tensor:
    """Quantize and back.

    Values that share a scale with one that is not finite become NaN; under a given ``amax``, what
    is not finite itself.

    Args:
        x: Any float dtype.
        fmt: A format of compressed-tensors.
        amax: The calibrated maximum, of one scale for the whole tensor; measured when None.

    Returns:
        A new tensor in shape and dtype of ``x``. Needs three float32 temporaries of its size.
    """
    scales = scales_of(x, fmt, amax)
    values = codes(x, fmt, scales)
    if scales.zero_point is not None:
        values -= scales.zero_point
    result = ungrouped(values.mul_(scales.effective).to(x.dtype), fmt, x.shape)
    if amax is not None:
        result += x - x  # 0 where x is finite, else NaN
    return result


def codes(x: Tensor, fmt: Format, scales: Scales) -> Tensor:
    """Return the numbers that stand for a tensor under given scales.

    Args:
        x: Any float dtype.
        fmt: The format.
        scales: Those of ``x``.

    Returns:
        float32, ``(scales, values)``, in the order of `grouped`: integers, or numbers of the
        float's grid.
    """
    values = grouped(x, fmt).float() / scales.effective
    if scales.zero_point is not None:
        values += scales.zero_point
    element = fmt.element
    if isinstance(element, Integer):
        return element.clip_(values).round_()
    return element.round_(values.clamp_(-element.largest, element.largest)).float()


def scales_of(x: Tensor, fmt: Format, amax: Tensor | None = None) -> Scales:
    """Return the scales of a tensor.

    Args:
        x: Any float dtype.
        fmt: The format.
        amax: The calibrated maximum, of one scale for the whole tensor; measured when None.
    """
    element, values = fmt.element, grouped(x, fmt)
    if not fmt.symmetric:
        assert isinstance(element, Integer)
        return _asymmetric(values, element, x.dtype)
    most = abs_max(values, (-1,)).float()
    given = None if amax is None else amax.to(x.device, torch.float32).amax()
    if fmt.sharing is Sharing.MX:
        assert isinstance(element, Float)
        return Scales(_power_of_two(most, element))
    if fmt.sharing is Sharing.NVFP4:
        return _under_one(most, most.amax() if given is None else given)
    whole = len(most) == 1 and fmt.has_one_scale(x.ndim)
    if whole and given is not None:
        most = given.reshape(1, 1)
    half = element.span / 2 if isinstance(element, Integer) else element.largest
    stored = torch.float32 if whole or fmt.dynamic else x.dtype
    return Scales(_stored(most / half, stored))


def grouped(x: Tensor, fmt: Format) -> Tensor:
    """Return the values of a tensor, those that share a scale in one row: ``(scales, values)``.

    What does not divide into blocks is filled up with zeros on the right, and below. Blocks of
    rows are those of a matrix, ``(out, all other dimensions)``.
    """
    if fmt.sharing is Sharing.DIMS:
        shared = fmt.shared_dims(x.ndim)
        kept = [dim for dim in range(x.ndim) if dim not in shared]
        rows = 1
        for dim in kept:
            rows *= x.shape[dim]
        return x.permute(*kept, *shared).reshape(rows, -1)
    if fmt.rows == 1:
        return to_blocks(x, fmt.size)
    matrix = x.flatten(1)
    down, right = -matrix.shape[0] % fmt.rows, -matrix.shape[1] % fmt.size
    padded = F.pad(matrix, (0, right, 0, down)) if down or right else matrix
    tiles = padded.reshape(padded.shape[0] // fmt.rows, fmt.rows, -1, fmt.size)
    return tiles.transpose(1, 2).reshape(-1, fmt.rows * fmt.size)


def ungrouped(values: Tensor, fmt: Format, shape: torch.Size) -> Tensor:
    """Undo `grouped`: drop what it filled up, and return a contiguous tensor of ``shape``."""
    if fmt.sharing is Sharing.DIMS:
        shared = fmt.shared_dims(len(shape))
        order = [dim for dim in range(len(shape)) if dim not in shared] + list(shared)
        back = [order.index(dim) for dim in range(len(shape))]
        return values.reshape([shape[dim] for dim in order]).permute(back).contiguous()
    if fmt.rows == 1:
        return from_blocks(values, shape)
    columns = shape[1:].numel()
    down, right = -(-shape[0] // fmt.rows), -(-columns // fmt.size)
    tiles = values.reshape(down, right, fmt.rows, fmt.size).transpose(1, 2)
    matrix = tiles.reshape(down * fmt.rows, -1)[: shape[0], :columns]
    return matrix.reshape(shape).contiguous()


def _asymmetric(values: Tensor, element: Integer, stored: torch.dtype) -> Scales:
    """Return scales under which the least value lands on the lowest code, the largest on the top.

    0 is always among the values, and is exact. What is not finite makes its scale so.
    """
    low, high = torch.aminmax(values, dim=-1, keepdim=True)
    low, high = low.float().clamp_(max=0), high.float().clamp_(min=0)
    scale = ((high - low) / element.span).to(stored).float()
    # 0 / 0 where all values are 0: their zero point is 0.
    zero = (element.lowest - low / scale).nan_to_num_(nan=0.0)
    zero = zero.clamp_(element.lowest, element.largest).round_()
    return Scales(_stored(scale, stored), zero)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales as a checkpoint stores them; one of 0 is the data type's epsilon instead."""
    rounded = scale.to(dtype).float()
    return rounded.masked_fill_(rounded == 0, torch.finfo(dtype).eps)


def _power_of_two(amax: Tensor, element: Float) -> Tensor:
    """Return MX scales: ``2^(e - floor(log2(largest)))``, with ``e`` the exponent of ``amax``.

    Magnitudes from 1.75 times a power of two on count as the next power. So scaled values are below
    7 in E2M1, where what is above 6 saturates, and up to 448 in E4M3. The exponent is clamped to a
    byte's with a bias of 127.
    """
    exponent = ((amax.view(torch.int32) + _MX_ROUNDS_UP) & _EXPONENT) >> 23
    offset = torch.tensor(element.largest).log2().floor()
    power = (exponent - offset.int().item()).clamp_(0, 2 * _BIAS + 1) - _BIAS
    scale = torch.exp2(power.double()).float()
    return scale + (amax - amax)  # inf - inf and NaN - NaN are NaN


def over_of(amax: Tensor) -> Tensor:
    """Return NVFP4's scale over block scales, ``448 * 6 / amax``, float32; 1 where that is none."""
    over = E4M3.largest * E2M1.largest / amax.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(over.isinf(), 1.0, over)


def _under_one(block_amax: Tensor, amax: Tensor) -> Scales:
    """Return NVFP4's scales: E4M3 numbers over ``448 * 6 / amax``."""
    over = over_of(amax)
    scale = over * (block_amax / E2M1.largest)
    scale = E4M3.round_(scale.clamp_(max=E4M3.largest))
    scale = scale.masked_fill_(scale == 0, _LEAST_E4M3)
    return Scales(scale + (block_amax - block_amax), over=over)
