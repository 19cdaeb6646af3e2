"""Number formats without torch: code points from bit patterns, search for the nearest."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def code_points(exponent: int, mantissa: int, *, last_is_nan: bool = False) -> NDArray[np.float64]:
    """All values from 0 up, in the order of their codes, by the formula of IEEE 754, 3.4."""
    bias = 2 ** (exponent - 1) - 1
    values = []
    for code in range(2 ** (exponent + mantissa) - last_is_nan):
        e, m = divmod(code, 2**mantissa)
        if e == 0:
            values.append(2.0 ** (1 - bias) * (m / 2**mantissa))
        else:
            values.append(2.0 ** (e - bias) * (1 + m / 2**mantissa))
    return np.array(values)


E2M1 = code_points(2, 1)
E3M2 = code_points(3, 2)
E4M3 = code_points(4, 3, last_is_nan=True)


def nearest(x: Floats, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest of ``points`` by search over all, ties to the even code; beyond: the last."""
    magnitude = np.abs(x.astype(np.float64))
    distance = np.abs(magnitude[..., None] - points)
    code = distance.argmin(-1)
    tie = (distance == distance.min(-1, keepdims=True)).sum(-1) == 2
    code += tie & (code % 2 == 1)
    return np.copysign(points[code], x)


def mx_exponent(amax: float, largest: float) -> int:
    """The smallest ``k`` with ``largest * 2^k >= amax``, in exact arithmetic."""
    k = 0
    while Fraction(largest) * Fraction(2) ** k >= Fraction(amax):
        k -= 1
    while Fraction(largest) * Fraction(2) ** k < Fraction(amax):
        k += 1
    return k


def mx(x: Floats, points: NDArray[np.float64], size: int = 32) -> NDArray[np.float64]:
    """MX blocks along the last dimension, one after the other; float64 holds all of it exactly."""
    result = np.zeros(x.shape)
    for row, out in zip(x.reshape(-1, x.shape[-1]), result.reshape(-1, x.shape[-1]), strict=True):
        for start in range(0, len(row), size):
            block = row[start : start + size].astype(np.float64)
            amax = float(np.abs(block).max())
            if amax:
                scale = 2.0 ** mx_exponent(amax, float(points[-1]))
                out[start : start + size] = nearest(block / scale, points) * scale
    return result


def nvfp4(x: Floats, amax: float, size: int = 16) -> NDArray[np.float32]:
    """NVFP4 with numpy's float32, each operation rounded once, divisions as products."""
    f32 = np.float32
    result = np.zeros(x.shape, f32)
    g = f32(amax) * f32(1 / 2688)
    for row, out in zip(x.reshape(-1, x.shape[-1]), result.reshape(-1, x.shape[-1]), strict=True):
        for start in range(0, len(row), size):
            block = row[start : start + size].astype(f32)
            ratio = np.abs(block).max() * (f32(1) / (f32(6) * g))
            scale = f32(nearest(np.array([min(ratio, f32(448))]), E4M3)[0]) * g
            if scale < 1e-5:
                scale = f32(1)
            codes = nearest(block * (f32(1) / scale), E2M1).astype(f32)
            out[start : start + size] = codes * scale
    return result


def integers(x: Floats, amax: Floats, bits: int, *, narrow: bool = False) -> NDArray[np.float32]:
    """Integers with numpy's float32; ``rint`` is to even."""
    bound = np.float32(2 ** (bits - 1) - 1)
    amax = np.asarray(amax, np.float32)
    zero = amax < 2.0**-24
    scale = bound / np.where(zero, np.float32(1), amax)
    lowest = -bound if narrow else -bound - 1
    codes = np.clip(np.rint(x.astype(np.float32) * scale), lowest, bound)
    return np.where(zero, np.float32(0), codes / scale)


def e4m3(x: Floats, amax: Floats) -> NDArray[np.float32]:
    """E4M3 under one float32 scale, with numpy's float32."""
    amax = np.asarray(amax, np.float32)
    scale = np.float32(448) / np.where(amax <= 2.0**-24, np.float32(1), amax)
    codes = nearest(x.astype(np.float32) * scale, E4M3).astype(np.float32)
    return codes * (np.float32(1) / scale)
