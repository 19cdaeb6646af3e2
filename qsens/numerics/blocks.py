"""Blocks along the last dimension, each with a scale of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qsens.numerics.floats import E2M1, Float, times
from qsens.numerics.integers import Integer
from qsens.numerics.scales import abs_max, e8m0, nvfp4

#: ModelOpt's NVFP4 kernel has blocks of 16 whatever the config says.
NVFP4_BLOCK = 16


def to_blocks(x: Tensor, size: int) -> Tensor:
    """Cut the last dimension into blocks.

    A last dimension that does not divide is filled up with zeros on the right, as ModelOpt does in
    every block format; zeros change no maximum, so the last block is simply shorter.

    Args:
        x: Shape ``(..., n)``.
        size: Values per block.

    Returns:
        Shape ``(blocks, size)``, rows after rows; a view of ``x`` where it is contiguous and
        divides.
    """
    missing = -x.shape[-1] % size
    return (F.pad(x, (0, missing)) if missing else x).reshape(-1, size)


def from_blocks(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Undo `to_blocks`: drop what it filled up, and return a contiguous tensor of ``shape``."""
    count, size = shape[-1], blocks.shape[-1]
    whole = blocks.reshape(*shape[:-1], count + -count % size)
    return whole[..., :count].contiguous()


def fake_mx(x: Tensor, element: Float | Integer, size: int) -> Tensor:
    """Quantize to an MX format and back: ``element`` under a power-of-two scale per block.

    As ModelOpt's ``fused_amax_convert`` kernel does it; see `scales.e8m0` for the scales. A scaling
    by a power of two is exact, so bfloat16 needs no wider type. A block with a NaN or an infinity
    becomes NaN (the kernel makes NaN the largest value, and saturates a block with an infinity).
    Input values that are float32 subnormals are rounded like all others, where the kernel takes
    them for zero.

    Args:
        x: float32, bfloat16 or float16, shape ``(..., n)``.
        element: E2M1, E3M2, E4M3 or 8-bit integers.
        size: Values per block.

    Returns:
        A new tensor in shape and dtype of ``x``. Needs up to two temporaries of the size of ``x``,
        of its dtype for bfloat16, else float32.
    """
    blocks = to_blocks(x, size)
    multiplier, scale = e8m0(abs_max(blocks, (-1,)).float(), element.largest)
    if x.dtype == torch.bfloat16:
        multiplier, scale = multiplier.to(x.dtype), scale.to(x.dtype)
    rounded = element.round_(blocks * multiplier)
    return from_blocks(times(rounded, scale, x.dtype), x.shape)


def fake_nvfp4(x: Tensor, amax: Tensor) -> Tensor:
    """Quantize to NVFP4 and back: E2M1, blocks of 16, E4M3 scales under one scale of the tensor.

    As ModelOpt's Triton kernel for compute capability 8.9 and later does it; see `scales.nvfp4` for
    the scales. A block with a NaN or an infinity becomes NaN (the kernel makes NaN the *negative*
    largest value, and saturates infinities).

    Args:
        x: float32, bfloat16 or float16, shape ``(..., n)``.
        amax: The maximum of the tensor, a float32 scalar on the device of ``x``.

    Returns:
        A new tensor in shape and dtype of ``x``. Needs two float32 temporaries of its size.
    """
    blocks = to_blocks(x, NVFP4_BLOCK)
    multiplier, scale = nvfp4(abs_max(blocks, (-1,)).float(), amax)
    scaled = torch.mul(blocks, multiplier).clamp_(-E2M1.largest, E2M1.largest)
    return from_blocks(times(E2M1.round_(scaled), scale, x.dtype), x.shape)
