"""Small floating-point grids, and E4M3 with one scale for every value that shares an ``amax``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: ModelOpt takes an amax up to here for zero: the smallest subnormal of float16.
ZERO_AMAX = 2.0**-24


@dataclass(frozen=True)
class Float:
    """The values of a small float: sign, exponent and ``mantissa`` bits, subnormals included.

    Attributes:
        mantissa: Stored bits of the significand.
        min_exponent: Exponent of the smallest normal value; below it the steps stay the same.
        largest: The largest finite value.
    """

    mantissa: int
    min_exponent: int
    largest: float

    def round_(self, x: Tensor) -> Tensor:
        """Round to the nearest value of the grid, ties to the even significand.

        Adding and taking away ``1.5 * 2^k`` leaves a value rounded to the last place of that sum;
        with ``k`` from the value's own exponent, that place is the grid's step there (Knuth, The
        Art of Computer Programming 2, 4.2.2). Both operations are exact but for this rounding.

        Args:
            x: float32 or bfloat16, of any shape, within ``largest`` of zero; overwritten unless the
                grid is E4M3. NaN stays NaN.

        Returns:
            The rounded values, in shape and dtype of ``x``. A value that rounds to zero becomes
            +0.0, except under E4M3. Needs one temporary of the size of ``x``.
        """
        if self == E4M3:
            return x.to(torch.float8_e4m3fn).to(x.dtype)
        if x.dtype == torch.bfloat16:
            power = x.view(torch.int16).bitwise_and(0x7F80).view(torch.bfloat16)
            stored = 7
        else:
            power = x.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
            stored = 23
        power.clamp_(min=2.0**self.min_exponent)
        lift = 1.5 * 2.0 ** (stored - self.mantissa)
        return x.add_(power, alpha=lift).sub_(power, alpha=lift)


E2M1 = Float(mantissa=1, min_exponent=0, largest=6.0)
E3M2 = Float(mantissa=2, min_exponent=-2, largest=28.0)
E4M3 = Float(mantissa=3, min_exponent=-6, largest=448.0)


def times(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply in the dtype of ``x``, in place where ``dtype`` is the same, and round to ``dtype``.

    On CUDA this is one pass over memory, where a product and a conversion are two.
    """
    if x.dtype == dtype:
        return x.mul_(factor)
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))


def fake_e4m3(x: Tensor, amax: Tensor) -> Tensor:
    """Quantize to E4M3 and back, ``amax`` landing on 448; larger values saturate.

    As ModelOpt's ``fake_e4m3fy`` and ``fake_e4m3fy_with_axis`` kernels do it, in float32: multiply
    by ``448 / amax``, round, multiply by the reciprocal of that quotient. ``amax <= 2^-24`` counts
    as 1. NaN stays NaN and, as in the kernel, an infinity saturates; the caller mends that.

    Args:
        x: float32, bfloat16 or float16.
        amax: float32, on the device of ``x``, broadcastable to ``x`` with as many dimensions.

    Returns:
        A new tensor in shape and dtype of ``x``. Needs a float32 temporary of the size of ``x``.
    """
    amax = amax.masked_fill(amax <= ZERO_AMAX, 1.0)
    scale = torch.full_like(amax, E4M3.largest) / amax  # number / tensor is 1 / tensor * number
    scaled = torch.mul(x, scale).clamp_(-E4M3.largest, E4M3.largest)
    rounded = scaled.to(torch.float8_e4m3fn)
    del scaled
    return times(rounded.to(torch.float32), scale.reciprocal(), x.dtype)
