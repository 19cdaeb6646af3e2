"""ModelOpt's quantizers: its own, for formats that ours lack, and its models on our numerics."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
    is_registered_quant_backend,
    register_quant_backend,
)

from qsens.config.block_sizes import BlockSizes
from qsens.errors import UserError
from qsens.numerics import fake_quantize, supports

Cfg = Mapping[str, Any]

_BACKEND = "qsens"


def on_cpu(cfg: Cfg) -> dict[str, Any]:
    """Return a ModelOpt configuration that gives on a CPU what ModelOpt's GPU kernels give.

    ModelOpt has no CPU kernel for formats with block scales of their own type (MX, NVFP4), and on a
    CPU its E4M3 scale is ``1 / amax * 448`` where the kernels divide 448 by ``amax``: a unit in the
    last place, which moves scores of layers with large outliers by percents. A quantization backend
    with our numerics is registered with it, and those quantizers are told to use it.

    Args:
        cfg: A configuration as ``mtq.quantize`` takes it.
    """

    def lacks(given: Cfg) -> bool:
        if BlockSizes.of(given.get("block_sizes")).scale_bits is not None:
            return True
        return not given.get("block_sizes") and given.get("num_bits") in ((4, 3), [4, 3])

    return _with_backend(cfg, lacks)


def by_numerics(cfg: Cfg) -> dict[str, Any]:
    """Return a ModelOpt configuration whose formats our numerics compute, wherever they can.

    They give what ModelOpt's kernels give, bit for bit, and no CUDA extension is built for them,
    which takes minutes.

    Args:
        cfg: A configuration as ``mtq.quantize`` takes it.
    """
    return _with_backend(cfg, supports)


def _with_backend(cfg: Cfg, chosen: Callable[[Cfg], bool]) -> dict[str, Any]:
    """Return a ModelOpt configuration in which some quantizers use our numerics."""
    if not is_registered_quant_backend(_BACKEND):
        register_quant_backend(_BACKEND, _backend)
    entries = []
    for entry in cfg["quant_cfg"]:
        if "cfg" in entry and chosen(entry["cfg"]):
            entry = {**entry, "cfg": {**entry["cfg"], "backend": _BACKEND}}
        entries.append(entry)
    return {**cfg, "quant_cfg": entries}


def _backend(x: torch.Tensor, quantizer: Any) -> torch.Tensor:
    cfg = {"num_bits": quantizer.num_bits, "block_sizes": quantizer.block_sizes}
    if quantizer.block_sizes is None:
        cfg = {"num_bits": quantizer.num_bits, "axis": quantizer.axis}
    amax = None if quantizer.is_mx_format else getattr(quantizer, "_amax", None)
    return fake_quantize(x, cfg, amax)


def tensor_quantizer(
    x: torch.Tensor, cfg: Mapping[str, Any], amax: torch.Tensor | None
) -> torch.Tensor:
    """Fake-quantize ``x`` by ModelOpt's own quantizer.

    Args:
        x: Any float tensor.
        cfg: A ModelOpt quantizer's ``cfg``.
        amax: Calibrated maximum; taken from ``x`` when not given.

    Raises:
        UserError: ModelOpt refuses the configuration.
    """
    try:
        quantizer = TensorQuantizer(QuantizerAttributeConfig(**cfg)).to(x.device)
        if amax is not None:
            quantizer.amax = amax
        with torch.no_grad():
            result: torch.Tensor = quantizer(x)
    except (AssertionError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"ModelOpt's own quantizer refuses it: {first}",
            where=f"cfg {dict(cfg)!r}",
            remedy="Mend the pair, or leave it out.",
        ) from error
    return result


@contextmanager
def quiet() -> Iterator[None]:
    """Keep ModelOpt's bars and hints off stdout, which belongs to the command's JSON."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
