"""Weights that servers fuse into one, and so scale by one number. Needs torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from qsens.checkpoint.experts import is_experts
from qsens.checkpoint.groups import Group
from qsens.checkpoint.modules import weight_of
from qsens.engine.quantizer import shares_scale
from qsens.numerics.scales import abs_max


class FusedWeights:
    """The amax that the members of a group share, in formats with one scale for a whole weight.

    Args:
        model: The model.
        groups: Its groups; the experts of a layer are no fused weight of one scale.
    """

    def __init__(self, model: nn.Module, groups: Iterable[Group]) -> None:
        self._modules = {
            name: model.get_submodule(name) for group in groups for name in group.members
        }
        self._partners = {
            name: group.members
            for group in groups
            for name in group.members
            if len(group.members) > 1 and not is_experts(self._modules[name])
        }
        self._amax: dict[tuple[str, ...], float] = {}

    def amax(self, name: str, cfg: Mapping[str, Any]) -> torch.Tensor | None:
        """Return the largest amax of a weight and those fused with it; none where it has its own.

        Args:
            name: Name of the module.
            cfg: The weight quantizer's ``cfg``.

        Returns:
            A float32 scalar on the module's device.
        """
        partners = self._partners.get(name)
        if partners is None or not shares_scale(cfg):
            return None
        weights = [weight_of(self._modules[each]) for each in partners]
        if partners not in self._amax:
            self._amax[partners] = max(float(abs_max(weight)) for weight in weights)
        return torch.tensor(self._amax[partners], device=weight_of(self._modules[name]).device)
