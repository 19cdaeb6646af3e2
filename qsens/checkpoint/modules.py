"""Modules of a loaded model: its layers, which of them a format applies to. Needs torch."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from qsens.checkpoint.experts import is_experts
from qsens.checkpoint.structure import traits_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_quantizable(module: nn.Module) -> bool:
    """Return whether a format applies to a module: a linear one, a convolution, or experts.

    Not to a convolution of single channels or of windows that are no patches, nor to a class that
    does something else with its weight than the class that it is made from, such as a router.
    """
    return is_linear(module) or is_convolution(module) or is_experts(module)


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model that a format applies to, by name, in its order.

    Those that its traits leave alone, such as routers, are left out.
    """
    patterns = traits_of(model).left_alone
    return {
        name: module
        for name, module in model.named_modules()
        if is_quantizable(module) and with_open_index(name) not in patterns
    }


def left_alone(model: nn.Module) -> list[str]:
    """Return the names of linear modules and convolutions that no format applies to."""
    applies = quantizable(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and name not in applies
    ]


def with_open_index(name: str) -> str:
    """Return a module's name with the indices of layers and experts left open, as ``*``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module gives ``x W^T + b``."""
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward or _gives_product(type(module))  # type: ignore[arg-type]
    return isinstance(module, Conv1D)


def is_convolution(module: nn.Module) -> bool:
    """Return whether a module is a convolution that is linear in patches, such as an embedding's.

    Each output reads all channels of one patch, and each patch is read once.
    """
    return (
        isinstance(module, _CONVOLUTIONS)
        and any(type(module).forward is kind.forward for kind in _CONVOLUTIONS)
        and module.groups == 1
        and module.stride == module.kernel_size
        and module.padding in ("valid", (0,) * len(module.kernel_size))
    )


def patches_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what a convolution reads, one patch after the other, each shaped as its weight.

    Args:
        module: The convolution.
        x: Its input, ``(pictures, channels, ...)``; what is left at an edge belongs to no patch.

    Returns:
        ``(pictures * patches, channels, ...)``.
    """
    kernel: tuple[int, ...] = module.kernel_size  # type: ignore[assignment]
    dims = range(2, 2 + len(kernel))
    for dim, size in zip(dims, kernel, strict=True):
        x = x.narrow(dim, 0, x.shape[dim] // size * size)
    # Each dimension becomes two: where a patch is, and where in it.
    for dim, size in zip(reversed(dims), reversed(kernel), strict=True):
        x = x.reshape(*x.shape[:dim], -1, size, *x.shape[dim + 1 :])
    places = [2 + 2 * at for at in range(len(kernel))]
    inner = [3 + 2 * at for at in range(len(kernel))]
    return x.permute(0, *places, 1, *inner).flatten(0, len(kernel))


def channels_last(output: torch.Tensor) -> torch.Tensor:
    """Return what a convolution gives, one patch after the other, ``(patches, channels)``."""
    return output.movedim(1, -1).flatten(0, -2)


def weight_of(module: nn.Module) -> torch.Tensor:
    """Return a linear module's or a convolution's weight, ``(out, ...)``."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def bias_of(module: nn.Module) -> torch.Tensor | None:
    """Return a linear module's or a convolution's bias, ``(out,)``; none where there is none."""
    bias: torch.Tensor | None = module.bias  # type: ignore[assignment]
    return bias


def apply(module: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return what a module gives with another weight, which is shaped as :func:`weight_of` is."""
    if is_linear(module):
        return F.linear(x, weight, bias_of(module))
    output: torch.Tensor = module._conv_forward(x, weight, bias_of(module))  # type: ignore[operator]
    return output


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that transformers can recompute, by name: decoder and vision layers.

    Of one within another, the outer.
    """
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            parts = name.split(".")
            if not any(".".join(parts[:end]) in layers for end in range(1, len(parts))):
                layers[name] = module
    return layers


@functools.cache
def _gives_product(kind: Any) -> bool:
    """Return whether a class with a forward pass of its own gives the product all the same."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            module = kind(5, 3)
            x = torch.randn(2, 5)
            return torch.allclose(module(x), F.linear(x, module.weight, module.bias))
        except Exception:  # it takes other arguments, or gives something else
            return False
