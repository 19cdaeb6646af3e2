"""The quantizers of the engine: our numerics, and ModelOpt's own where they do not reach.

Needs torch; modelopt only where it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from qsens.numerics import compute_amax, fake_quantize, supports
from qsens.numerics.formats import format_of

_BACKEND = "qsens"
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
        cfg: A ModelOpt quantizer's ``cfg``.
        amax: Calibrated maximum; taken from ``x`` when not given.
        out: Receives the result, contiguous; a new tensor does when not given.
    """
    if supports(cfg):
        return fake_quantize(x, cfg, amax, out=out)
    result = _modelopt(x, cfg, amax)
    return result if out is None else out.copy_(result)


def quantize_weight(weight: torch.Tensor, cfg: Mapping[str, Any]) -> torch.Tensor:
    """Fake-quantize a weight, about ``WEIGHT_CHUNK`` elements at a time.

    Equal, bit for bit, to quantizing it at once: it is cut where no scale is shared, and where one
    scale serves the whole weight, that is measured first.

    Args:
        weight: ``(out, ...)``, two dimensions or more, any float dtype.
        cfg: A ModelOpt quantizer's ``cfg``.
    """
    if weight.numel() <= WEIGHT_CHUNK or not supports(cfg):
        return quantize(weight, cfg)
    dims = [dim for dim in format_of(cfg).separable_dims(weight.ndim) if weight.shape[dim] > 1]
    whole = None
    if not dims:
        # A dynamic format takes no maximum; of one scale for all, the static one has the same.
        cfg = {**cfg, "type": "static"}
        whole = compute_amax(weight, cfg)
        if whole is not None and whole.numel() == 1 and not whole.isfinite():
            # All values share the scale, so all are NaN; under a given maximum, one alone would.
            return torch.full_like(weight, math.nan)
    dim = dims[0] if dims else 0
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    step = max(1, WEIGHT_CHUNK * weight.shape[dim] // weight.numel())
    parts = zip(torch.split(weight, step, dim), torch.split(result, step, dim), strict=True)
    for part, out in parts:
        if out.is_contiguous():
            fake_quantize(part, cfg, whole, out=out)
        else:
            out.copy_(fake_quantize(part.contiguous(), cfg, whole))
    return result


def needs_fallback(cfg: Mapping[str, Any]) -> bool:
    """Return whether ModelOpt's own quantizer computes ``cfg``."""
    return not supports(cfg)


def on_cpu(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ModelOpt configuration that gives on a CPU what ModelOpt's GPU kernels give.

    ModelOpt has no CPU kernel for formats with block scales of their own type (MX, NVFP4), and on a
    CPU its E4M3 scale is ``1 / amax * 448`` where the kernels divide 448 by ``amax``: a unit in the
    last place, which moves scores of layers with large outliers by percents. A quantization backend
    with our numerics is registered with it, and those quantizers are told to use it.

    Args:
        cfg: A configuration as ``mtq.quantize`` takes it.
    """
    from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
        is_registered_quant_backend,
        register_quant_backend,
    )

    if not is_registered_quant_backend(_BACKEND):
        register_quant_backend(_BACKEND, _backend)
    entries = []
    for entry in cfg["quant_cfg"]:
        given = entry.get("cfg", {})
        blocks = given.get("block_sizes") or {}
        if "scale_bits" in blocks or (not blocks and given.get("num_bits") in ((4, 3), [4, 3])):
            entry = {**entry, "cfg": {**entry["cfg"], "backend": _BACKEND}}
        entries.append(entry)
    return {**cfg, "quant_cfg": entries}


def _backend(x: torch.Tensor, quantizer: Any) -> torch.Tensor:
    cfg = {"num_bits": quantizer.num_bits, "block_sizes": quantizer.block_sizes}
    if quantizer.block_sizes is None:
        cfg = {"num_bits": quantizer.num_bits, "axis": quantizer.axis}
    amax = None if quantizer.is_mx_format else getattr(quantizer, "_amax", None)
    return fake_quantize(x, cfg, amax)


def _modelopt(x: torch.Tensor, cfg: Mapping[str, Any], amax: torch.Tensor | None) -> torch.Tensor:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    quantizer = TensorQuantizer(QuantizerAttributeConfig(**cfg)).to(x.device)
    if amax is not None:
        quantizer.amax = amax
    with torch.no_grad():
        result: torch.Tensor = quantizer(x)
    return result
