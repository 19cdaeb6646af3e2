"""From the largest magnitude among values to the scale that they share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qsens.numerics.floats import E2M1, E4M3

_FLOAT32_TINY = torch.finfo(torch.float32).tiny
_FLOAT32_MAX = torch.finfo(torch.float32).max


def abs_max(x: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    """Return the largest magnitude, without a temporary of the size of ``x``.

    Args:
        x: Any float dtype, not empty.
        dims: The dimensions to reduce, kept with size 1; all of them, to a scalar, when None.

    Returns:
        The amax in the dtype of ``x``. A NaN makes its maximum NaN.
    """
    if dims is None:
        low, high = torch.aminmax(x)
    elif len(dims) == 1:
        low, high = torch.aminmax(x, dim=dims[0], keepdim=True)
    elif dims:
        low, high = x.amin(tuple(dims), keepdim=True), x.amax(tuple(dims), keepdim=True)
    else:
        return x.abs()
    return torch.maximum(high.abs(), low.abs())


def e8m0(amax: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Return the power-of-two scales of MX blocks: ``2^ceil(log2(amax / largest))``.

    This is ModelOpt's rule (``compute_scale_e8m0_NV``), under which nothing saturates. The rule in
    the OCP Microscaling specification 1.0, 6.3, ``2^(floor(log2(amax)) - floor(log2(largest)))``,
    may give half of it. ModelOpt builds the kernel with ``--use_fast_math``: it divides by a
    multiplication with the reciprocal and flushes float32 subnormals, so a block whose quotient is
    below 2^-126 becomes zeros. Both are done here too.

    Args:
        amax: Maxima of the blocks, float32, at least 0.
        largest: The largest value of the element format.

    Returns:
        ``(multiplier, scale)`` in float32 and the shape of ``amax``, the one the reciprocal of the
        other, both exact; both 0 for a block that becomes zeros. The scale of a block whose maximum
        is not finite is NaN.
    """
    quotient = amax * (1.0 / largest)
    quotient = quotient.masked_fill_(quotient < _FLOAT32_TINY, 0.0)
    # Adding all ones below the exponent carries into it unless the significand is 1.0: a ceiling.
    exponent = (quotient.view(torch.int32) + 0x7FFFFF) >> 23
    multiplier = ((254 - exponent) << 23).masked_fill_(exponent == 0, 0).view(torch.float32)
    scale = (exponent << 23).view(torch.float32)
    return multiplier, scale + (amax - amax)  # inf - inf and NaN - NaN are NaN


def nvfp4(block_amax: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales of NVFP4 blocks: an E4M3 number times a scale of the whole tensor.

    With ``g = amax / (6 * 448)`` the scale is ``e4m3(min(block_amax / (6 * g), 448)) * g``, as in
    ModelOpt's Triton kernel (``fp4_fake_quant_kernel``, ``fp8_quantize_scale``): ``g <= 0`` counts
    as 1e-12, a scale below 1e-5 as 1. A CUDA division by a Python number is a multiplication by its
    reciprocal, and so, in effect, is Triton's ``/`` (``div.full.f32``); each is written so here,
    because bfloat16 inputs hit exact ties, where that shows.

    Args:
        block_amax: Maxima of the blocks, float32.
        amax: The maximum of the tensor, a float32 scalar.

    Returns:
        ``(multiplier, scale)`` in float32 and the shape of ``block_amax``, the one the rounded
        reciprocal of the other. Both are NaN where a maximum is not finite.
    """
    g = amax * (1.0 / (E2M1.largest * E4M3.largest))
    g = g.masked_fill(g <= 0, 1e-12)
    per_g = (E2M1.largest * g).reciprocal().clamp(max=_FLOAT32_MAX)  # 0 * inf would be NaN
    codes = E4M3.round_((block_amax * per_g).clamp_(max=E4M3.largest))
    scale = codes.mul_(g)
    scale = scale.masked_fill_(scale < 1e-5, 1.0)
    scale += block_amax - block_amax  # inf - inf and NaN - NaN are NaN
    return scale.reciprocal(), scale
