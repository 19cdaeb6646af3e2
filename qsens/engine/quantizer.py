"""The quantizers of the engine: our numerics, and ModelOpt's own where they do not reach.

Needs torch; modelopt only where it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from qsens.numerics import compute_amax, fake_quantize, fake_quantize_each, supports
from qsens.numerics.formats import Sharing, format_of

# Elements of a weight that are quantized at once: bounds the temporaries of a large head.
WEIGHT_CHUNK = 1 << 26


def quantize(
    x: torch.Tensor,
    cfg: Mapping[str, Any],
    amax: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fake-quantize ``x``; a config that the numerics do not cover goes to ModelOpt's quantizer.

    Args:
        x: Any float tensor.
        cfg: A quantizer's ``cfg``, see :func:`qsens.numerics.fake_quantize`.
        amax: Calibrated maximum; taken from ``x`` when not given.
        out: Receives the result, contiguous; a new tensor does when not given.
    """
    if supports(cfg):
        return fake_quantize(x, cfg, amax, out=out)
    # Importing ModelOpt takes seconds, which no format of ours is to pay.
    from qsens.engine.modelopt.quantizers import tensor_quantizer

    result = tensor_quantizer(x, cfg, amax)
    return result if out is None else out.copy_(result)


def quantize_weight(
    weight: torch.Tensor, cfg: Mapping[str, Any], amax: torch.Tensor | None = None
) -> torch.Tensor:
    """Fake-quantize a weight, about ``WEIGHT_CHUNK`` elements at a time.

    Equal, bit for bit, to quantizing it at once: it is cut where no scale is shared, and where one
    scale serves the whole weight, that is measured first.

    Args:
        weight: ``(out, ...)``, two dimensions or more, any float dtype.
        cfg: A quantizer's ``cfg``.
        amax: That of the whole weight, or of the weights that share its scale, see
            :func:`shares_scale`; measured when not given.
    """
    weight = weight.contiguous()  # some layouts hold it transposed
    if weight.numel() <= WEIGHT_CHUNK or not supports(cfg):
        return quantize(weight, cfg, amax)
    fmt = format_of(cfg)
    dims = [dim for dim in fmt.separable_dims(weight.ndim) if weight.shape[dim] > 1]
    whole = amax
    if not dims and whole is None:
        # A dynamic format takes no maximum; of one scale for all, the static one has the same.
        cfg = {**cfg, "type": "static"}
        whole = compute_amax(weight, cfg)
        if whole is not None and whole.numel() == 1 and not whole.isfinite():
            # All values share the scale, so all are NaN; under a given maximum, one alone would.
            return torch.full_like(weight, math.nan)
    dim = dims[0] if dims else 0
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    step = max(1, WEIGHT_CHUNK * weight.shape[dim] // weight.numel())
    step += -step % fmt.rows
    parts = zip(torch.split(weight, step, dim), torch.split(result, step, dim), strict=True)
    for part, out in parts:
        if out.is_contiguous():
            fake_quantize(part, cfg, whole, out=out)
        else:
            out.copy_(fake_quantize(part.contiguous(), cfg, whole))
    return result


def quantize_experts(weights: torch.Tensor, cfg: Mapping[str, Any]) -> torch.Tensor:
    """Fake-quantize the weights of all experts, each as if it were alone.

    Args:
        weights: ``(experts, out, in)``, any float dtype.
        cfg: A ModelOpt quantizer's ``cfg``.
    """
    if supports(cfg):
        matrices = format_of(cfg)
        if 0 in matrices.separable_dims(2) and weights.shape[1] % matrices.rows == 0:
            # Rows, or blocks of rows, share no scale: neither do experts.
            return quantize_weight(weights.flatten(0, 1), cfg).view(weights.shape)
        one_scale = matrices.sharing is Sharing.DIMS and not matrices.separable_dims(2)
        if one_scale and not cfg.get("block_sizes") and not matrices.by_compressed_tensors:
            return quantize_weight(weights.flatten(1), {**cfg, "axis": 0}).view(weights.shape)
        if matrices.sharing is Sharing.NVFP4 and not matrices.by_compressed_tensors:
            return fake_quantize_each(weights, cfg)
    return torch.stack([quantize_weight(weight, cfg) for weight in weights])


def shares_scale(cfg: Mapping[str, Any], ndim: int = 2) -> bool:
    """Return whether weights that a server fuses have one scale, that of their largest amax.

    Servers hold one scale for the whole of a fused weight, where a format has one for a whole
    tensor. Formats of compressed-tensors are computed so; ModelOpt scales each weight by itself.
    """
    if not supports(cfg):
        return False
    fmt = format_of(cfg)
    return fmt.by_compressed_tensors and fmt.has_one_scale(ndim)


def needs_fallback(cfg: Mapping[str, Any]) -> bool:
    """Return whether ModelOpt's own quantizer computes ``cfg``."""
    return not supports(cfg)
