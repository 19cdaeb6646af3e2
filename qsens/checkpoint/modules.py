"""Modules of a loaded model: its layers, the weight of a module. Needs torch."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def weight_of(module: nn.Module) -> torch.Tensor:
    """Return a linear module's or a convolution's weight, ``(out, ...)``."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that transformers can recompute, by name: decoder and vision layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer)
    }
