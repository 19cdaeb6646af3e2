"""Symmetric integers with one scale for every value that shares an ``amax``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qsens.numerics.floats import ZERO_AMAX


@dataclass(frozen=True)
class Integer:
    """Signed integers of ``bits`` bits.

    Attributes:
        bits: Bits with the sign, 2 to 8.
        narrow: Leave out the lowest value, so that the range is symmetric.
    """

    bits: int
    narrow: bool = False

    @property
    def largest(self) -> float:
        """The largest value, on which ``amax`` lands."""
        return 2.0 ** (self.bits - 1) - 1

    @property
    def lowest(self) -> float:
        """The lowest value."""
        return -self.largest - (not self.narrow)

    @property
    def span(self) -> float:
        """Steps from the lowest value to the largest."""
        return self.largest - self.lowest

    def clip_(self, x: Tensor) -> Tensor:
        """Clamp ``x`` in place to the range; NaN stays NaN."""
        return x.clamp_(self.lowest, self.largest)

    def round_(self, x: Tensor) -> Tensor:
        """Round ``x`` in place to the nearest integer in range, ties to even; NaN stays NaN."""
        return x.round_().clamp_(self.lowest, self.largest)


def fake_integer(x: Tensor, amax: Tensor, element: Integer) -> Tensor:
    """Quantize to integers and back, ``amax`` landing on the largest integer.

    As ModelOpt's ``fake_tensor_quant`` kernels do it, in float32: multiply by ``largest / amax``,
    round, clamp, *divide* by the same quotient. ``amax < 2^-24`` gives zeros. Values beyond
    ``amax`` saturate, below at ``lowest / largest * amax`` unless ``element`` is narrow. NaN stays
    NaN and, as in the kernel, an infinity saturates; the caller mends that.

    Args:
        x: float32, bfloat16 or float16.
        amax: float32, on the device of ``x``, broadcastable to ``x`` with as many dimensions.
        element: The range of integers.

    Returns:
        A new tensor in shape and dtype of ``x``. Needs a float32 temporary of the size of ``x``.
    """
    zero = amax < ZERO_AMAX
    scale = torch.full_like(amax, element.largest) / amax  # number / tensor is 1 / tensor * number
    rounded = element.round_(torch.mul(x, scale.masked_fill(zero, 0.0)))
    scale.masked_fill_(zero, 1.0)
    if x.dtype == rounded.dtype:
        return rounded.div_(scale)
    return torch.div(rounded, scale, out=torch.empty_like(rounded, dtype=x.dtype))
