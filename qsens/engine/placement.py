"""Where the weights of a model lie while it is worked on. Needs torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qsens.checkpoint.groups import Group
from qsens.checkpoint.structure import traits_of
from qsens.checkpoint.weight_sizes import SLOTS
from qsens.data.samples import BATCH_TOKENS
from qsens.engine.candidates import Candidates
from qsens.engine.footprint import footprint
from qsens.engine.layer_stream import device_of, layer_bytes, stream_of
from qsens.engine.memory import (
    GIB,
    LEAST_TOKENS,
    SHARE_OF_FREE,
    free_memory,
    memory_share,
    weight_bytes,
)
from qsens.errors import UserError

# Tokens that must have room beside the weights: under fewer, layers that come and go leave more.
_RESIDENT_TOKENS = BATCH_TOKENS // 4


@dataclass(frozen=True)
class Placement:
    """Where a model's weights lie while it is worked on.

    Attributes:
        streamed: Whether its layers stay in host memory, and come to the device one by one.
        weights: Bytes of weights that are on the device at once.
    """

    streamed: bool
    weights: int


def plan_placement(
    model: nn.Module,
    groups: Sequence[Group],
    candidates: Candidates,
    device: torch.device,
    *,
    memory_gb: float | None,
    losses: int,
) -> Placement:
    """Return where the weights of a model are to lie.

    On the device where there is room for a good many tokens beside them; else layer by layer. On a
    CPU nothing is gained by that: only a limit that is given asks for it.

    Args:
        model: The model, in host memory.
        groups: Its groups.
        candidates: What is computed.
        device: Where it is to run.
        memory_gb: GiB of the device, weights included; from what is free when not given.
        losses: Losses that go backward, see :func:`qsens.engine.memory.plan_budget`.

    Raises:
        UserError: Neither fits; the message has the GiB that would do.
    """
    whole = weight_bytes(model)
    if memory_gb is None and device.type == "cpu":
        return Placement(False, whole)
    layers = layer_bytes(model) if traits_of(model).chained else {}
    by_layers = whole - sum(layers.values()) + SLOTS * max(layers.values(), default=0)
    takes = footprint(model, groups, candidates, losses)
    given = memory_gb * GIB if memory_gb is not None else float(free_memory(device))
    share = memory_share() * (1.0 if memory_gb is not None else SHARE_OF_FREE)

    def needed(weights: int, tokens: int) -> float:
        return weights + (takes.fixed + tokens * takes.per_token) / share

    if needed(whole, _RESIDENT_TOKENS) <= given:
        return Placement(False, whole)
    if by_layers < whole and needed(by_layers, LEAST_TOKENS) <= given:
        return Placement(True, by_layers)
    if needed(whole, LEAST_TOKENS) <= given:
        return Placement(False, whole)
    least = needed(min(whole, by_layers), LEAST_TOKENS)
    raise UserError(
        f"a pass needs {_gib(least)} GiB: {_gib(min(whole, by_layers))} of weights, a layer at a "
        f"time where that is less, and what is made of {LEAST_TOKENS} tokens; there are "
        f"{given / GIB:.2f}",
        where="autoquant.memory_gb" if memory_gb is not None else f"device {device}",
        remedy=f"Set autoquant.memory_gb={_gib(least)}, or use a device with more memory."
        if memory_gb is not None
        else "Use a device with more memory, or end what else runs there.",
    )


def require_room(model: nn.Module, device: torch.device, memory_gb: float | None) -> None:
    """Refuse a model that has to be on a device as a whole, and does not fit.

    Args:
        model: The model, in host memory.
        device: Where it is to run.
        memory_gb: GiB of the device; from what is free when not given.

    Raises:
        UserError: Its weights alone take more.
    """
    if memory_gb is None and device.type == "cpu":  # where it is already
        return
    whole = weight_bytes(model)
    given = memory_gb * GIB if memory_gb is not None else free_memory(device)
    if whole > given:
        raise UserError(
            f"its weights take {_gib(whole)} GiB, all of which have to be there for this: there "
            f"are {given / GIB:.2f}",
            where="autoquant.memory_gb" if memory_gb is not None else f"device {device}",
            remedy="Use a device with more memory, or autoquant.device=cpu.",
        )


def has_room_for_copy(model: nn.Module, memory_gb: float | None) -> bool:
    """Return whether all of a model is on its device, and a copy of it has room beside it.

    Args:
        model: The model, where it is to run.
        memory_gb: GiB of the device; from what is free when not given.
    """
    if stream_of(model) is not None:
        return False
    held = weight_bytes(model)
    if memory_gb is not None:
        return 2 * held <= memory_gb * GIB
    return held <= free_memory(device_of(model)) * SHARE_OF_FREE


def _gib(size: float) -> float:
    """Return GiB, rounded up to two digits."""
    return math.ceil(size / GIB * 100) / 100
