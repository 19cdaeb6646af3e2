"""Fake quantization by a quantizer's ``cfg``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qsens.errors import UserError
from qsens.numerics import compressed_tensors, kernels
from qsens.numerics.blocks import fake_mx, fake_nvfp4, from_blocks, to_blocks
from qsens.numerics.floats import fake_e4m3
from qsens.numerics.formats import Format, Sharing, format_of
from qsens.numerics.integers import Integer, fake_integer
from qsens.numerics.scales import abs_max

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def supports(cfg: Mapping[str, Any]) -> bool:
    """Say whether `fake_quantize` covers a quantizer's ``cfg``; if not, ModelOpt's own must do."""
    try:
        format_of(cfg)
    except UserError:
        return False
    return True


@torch.no_grad()
def compute_amax(x: Tensor, cfg: Mapping[str, Any]) -> Tensor | None:
    """Return what ModelOpt's max calibrator would keep of one tensor.

    Args:
        x: Any float dtype, not empty.
        cfg: A quantizer's config; see `fake_quantize`.

    Returns:
        Maxima in the dtype of ``x``: a scalar per tensor (NVFP4 too); with ``axis``, one per kept
        index and with the dimensions of ``x``, ``(C, 1)`` for a weight; with static blocks,
        ``(blocks, 1)``, rows after rows. A single maximum is always a scalar. None where
        nothing is calibrated, as for any format of compressed-tensors but those with one scale for
        the whole tensor. A NaN makes its maximum NaN (ModelOpt's raises AssertionError).

    Raises:
        UserError: The config is not one that `supports` covers.
    """
    fmt = format_of(cfg)
    if fmt.dynamic:
        return None
    if fmt.by_compressed_tensors and not fmt.has_one_scale(x.ndim):
        return None
    return _squeeze_single(_measure(x, fmt))


@torch.no_grad()
def fake_quantize(
    x: Tensor, cfg: Mapping[str, Any], amax: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Round a tensor to what a number format can hold, scaled as its reference scales it.

    A format of compressed-tensors is computed as :mod:`qsens.numerics.compressed_tensors` says. All
    others are equal to ModelOpt 0.47's kernels value by value, on CPU and CUDA; the functions for
    each family say how. What is *not* as there:

    - The sign of a zero may differ (an MX kernel never sets it for a zero input).
    - NaN and infinities never become finite. With a measured scale (``amax`` not given, dynamic
      formats, MX and NVFP4 blocks), all values that share the scale become NaN; under a given
      ``amax``, that value alone. ModelOpt's integer and E4M3 kernels pass NaN on but saturate
      infinities, its MX and NVFP4 kernels saturate both, and its calibrator raises on either.
    - For a maximum with several dimensions above 1 (a scale per token of ``(batch, tokens,
      channels)``, batch and tokens above 1) ModelOpt leaves its kernels for eager code, where the
      E4M3 scale is ``1 / amax * 448``, off by a unit in the last place now and then, and an integer
      format's amax of just 2^-24 gives zeros. Here a token's numbers do not depend on the shape of
      its batch.
    - float64 is computed in float32, which ModelOpt's MX and NVFP4 kernels refuse.

    A last dimension that does not divide into blocks is taken as if filled up with zeros, as in
    ModelOpt: the last block is shorter. Nothing is recorded for autograd.

    Args:
        x: float32, bfloat16, float16 or float64, any shape and device; not modified.
        cfg: A quantizer's config as a plain mapping: ``num_bits``, ``axis``, ``block_sizes``,
            ``type``, ``narrow_range``, ``reference``, ``symmetric``. ``enable``,
            ``effective_bits`` and ``backend`` change nothing.
        amax: Calibrated amax, at least 0, in any float dtype; shaped as `compute_amax` returns
            them, or any shape with as many values. A single value serves the whole tensor; of
            several for NVFP4, the largest counts. Measured on ``x`` when not given.
        out: Receives the result: contiguous, with shape, dtype and device of ``x``.

    Returns:
        ``out``, or a new tensor with shape, dtype and device of ``x``. On a GPU that needs no other
        memory; plain torch holds at most two float32 temporaries of the size of ``x`` (for bfloat16
        in MX formats, bfloat16 ones).

    Raises:
        UserError: The config is not one that `supports` covers, the dtype is none of those above,
            or ``amax`` has the wrong number of values.
        ValueError: ``amax`` is given for a dynamic format, which has no use for it.
    """
    fmt = format_of(cfg)
    if x.dtype not in _DTYPES:
        raise UserError(
            f"{x.dtype} cannot be quantized",
            where="fake_quantize",
            remedy="Convert the tensor to float32, bfloat16 or float16 first.",
        )
    if amax is not None and fmt.dynamic:
        raise ValueError("amax given for a dynamic format, which measures its own")
    if x.numel() and kernels.covers(x, fmt, amax):
        return kernels.quantize(x, fmt, amax, out)
    if x.numel() == 0:
        result = x.clone()
    elif x.dtype == torch.float64:
        result = _quantize(x.float(), fmt, amax).to(x.dtype)
    else:
        result = _quantize(x, fmt, amax)
    return result if out is None else out.copy_(result)


@torch.no_grad()
def fake_quantize_each(x: Tensor, cfg: Mapping[str, Any]) -> Tensor:
    """Round stacked tensors, each as if it were alone: equal to `fake_quantize` of each.

    Args:
        x: ``(n, ...)``, as `fake_quantize` takes it.
        cfg: A quantizer's config; see `fake_quantize`.
    """
    fmt, x = format_of(cfg), x.contiguous()
    if fmt.sharing is Sharing.NVFP4 and x.numel() and kernels.covers(x, fmt, None):
        return kernels.quantize_each(x, fmt)
    return torch.stack([fake_quantize(one, cfg) for one in x])


def _quantize(x: Tensor, fmt: Format, amax: Tensor | None) -> Tensor:
    if fmt.by_compressed_tensors:
        return compressed_tensors.fake(x, fmt, amax)
    if fmt.sharing is Sharing.MX:
        return fake_mx(x, fmt.element, fmt.size)
    if fmt.sharing is Sharing.NVFP4:
        top = abs_max(x if amax is None else amax)
        return fake_nvfp4(x, top.to(x.device, torch.float32))

    values = to_blocks(x, fmt.size) if fmt.sharing is Sharing.BLOCKS else x
    scaled_by = _measure(x, fmt) if amax is None else _fit(amax, x, fmt)
    scaled_by = scaled_by.to(x.device, torch.float32)
    if isinstance(fmt.element, Integer):
        result = fake_integer(values, scaled_by, fmt.element)
    else:
        result = fake_e4m3(values, scaled_by)
    if fmt.sharing is Sharing.BLOCKS:
        result = from_blocks(result, x.shape)
    if amax is not None:  # a measured maximum that is not finite has made NaN of all it scales
        result -= x - x  # 0 where x is finite, else NaN
    return result


def _measure(x: Tensor, fmt: Format) -> Tensor:
    """Return amax that broadcast to ``x``, or to its blocks, with as many dimensions."""
    if fmt.sharing is Sharing.BLOCKS:
        return abs_max(to_blocks(x, fmt.size), (-1,))
    if fmt.sharing is Sharing.NVFP4:
        return abs_max(x)
    shared = fmt.shared_dims(x.ndim)
    if len(shared) == x.ndim:
        return abs_max(x).reshape((1,) * x.ndim)
    return abs_max(x, shared)


def _fit(amax: Tensor, x: Tensor, fmt: Format) -> Tensor:
    """Give calibrated amax the shape that `_measure` returns."""
    shape: tuple[int, ...]
    if fmt.sharing is Sharing.BLOCKS:
        rows = x.numel() // x.shape[-1]
        shape = (rows * -(-x.shape[-1] // fmt.size), 1)
    else:
        shared = fmt.shared_dims(x.ndim)
        shape = tuple(1 if dim in shared else size for dim, size in enumerate(x.shape))
    if amax.numel() == 1:
        return amax.reshape((1,) * len(shape))
    if amax.numel() != math.prod(shape):
        raise UserError(
            f"amax has {amax.numel()} values where the tensor has {math.prod(shape)} scales",
            where=f"amax {tuple(amax.shape)}, tensor {tuple(x.shape)}",
            remedy="Calibrate with the config and the tensor shape that are quantized.",
        )
    return amax.reshape(shape)


def _squeeze_single(amax: Tensor) -> Tensor:
    return amax.reshape(()) if amax.numel() == 1 else amax
