"""How much memory a pass may take: where weights lie under it, how many tokens go through at once.

Needs torch.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qsens.checkpoint.experts import expert_weights, is_experts
from qsens.checkpoint.groups import Group, tower_of
from qsens.checkpoint.modules import is_linear, layers_of, weight_of
from qsens.checkpoint.structure import head_of, traits_of
from qsens.checkpoint.weight_sizes import SLOTS
from qsens.data.samples import BATCH_TOKENS, Samples
from qsens.engine.candidates import Candidates
from qsens.engine.head import HEAD_ROWS
from qsens.engine.host_memory import available_memory, most_memory
from qsens.engine.layer_stream import device_of, layer_bytes, stream_of
from qsens.engine.quantizer import WEIGHT_CHUNK
from qsens.engine.team import team_of
from qsens.errors import UserError

GIB = 1 << 30
# Environment variable: what a run after one that was out of memory may take of the budget, 0 to 1.
MEMORY_SHARE = "QSENS_MEMORY_SHARE"
# What is left to the allocator's own waste and to what the estimate does not see.
_SHARE_OF_FREE = 0.8
_LEAST_TOKENS = 64
# Tokens that must have room beside the weights: under fewer, layers that come and go leave more.
_RESIDENT_TOKENS = BATCH_TOKENS // 4
# Work on a weight is shared by the tokens of a window: more than this saves little.
_WINDOW_TOKENS = 2 * BATCH_TOKENS
# So are a GPU's launches, which one loss keeps too short of work: an eighth of the seconds, on an
# H200 at the shape of Qwen3-VL-4B.
_SHARED_LAUNCHES = 8 * BATCH_TOKENS
# Forward alone, a token takes less, and kernels are launched for nothing else.
_FORWARD_TOKENS = 4 * BATCH_TOKENS
# What the records of all layers may take, and how many tokens they must reach for: a second run of
# every layer costs less than quantizing every weight for a few tokens.
_RECORDS = 6 * GIB
_RECORDED_TOKENS = BATCH_TOKENS // 4
_HEAD_FORMATS = 4
# How configurations name the experts that a token goes to.
_CHOSEN = (
    "num_experts_per_tok",
    "top_k_experts",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "num_experts_per_token",
)


@dataclass(frozen=True)
class Budget:
    """The memory of a pass.

    Attributes:
        limit: Bytes above the weights that the pass may take.
        max_tokens: Tokens in flight at most, padding included.
        predicted: Bytes above the weights that it is expected to take.
        keeps_records: Whether the record of every layer is kept, so that none runs twice.
        head_formats: Weight formats of the head that are held at once.
    """

    limit: int
    max_tokens: int
    predicted: int
    keeps_records: bool = False
    head_formats: int = 1


def plan_budget(
    model: nn.Module,
    groups: Sequence[Group],
    candidates: Candidates,
    *,
    memory_gb: float | None,
    losses: int = 1,
    samples: Samples | None = None,
) -> Budget:
    """Return how many tokens fit.

    Args:
        model: The model, where it is to run.
        groups: Its groups.
        candidates: What the pass computes.
        memory_gb: GiB of the device, weights included; from what is free when not given.
        losses: Losses that go backward, each with gradients of its own; 0 where nothing does.
        samples: The samples: how many patches of pictures a token brings along.
    """
    device = device_of(model)
    if memory_gb is not None:
        free = memory_gb * GIB - weight_bytes(model)
    else:
        free = free_memory(device) * _SHARE_OF_FREE
        if device.type == "cpu":  # which all processes of a team take from
            free /= team_of(model).count
    limit = max(0, int(free * memory_share()))
    rows = _Rows.of(model, groups, samples)
    size, wide = _widths(model, losses)
    fixed, per_token, records = _footprint(model, groups, candidates, size, wide, losses, rows)
    fitting = max(_LEAST_TOKENS, int((limit - fixed) / per_token))
    # Patches that a token brings along are work on weights too: fewer tokens share it as well.
    on_a_gpu = device.type == "cuda"
    window = _SHARED_LAUNCHES if on_a_gpu and losses == 1 else _WINDOW_TOKENS
    enough = int((window if losses else _FORWARD_TOKENS) / max(1.0, rows.patches / 2))
    tokens = min(enough, fitting)
    recorded = int((min(limit, _RECORDS) - fixed) / (per_token + records))
    keeps = losses > 0 and recorded >= _RECORDED_TOKENS and stream_of(model) is None
    if keeps:
        tokens, per_token = min(enough, recorded), per_token + records
    predicted = int(fixed + tokens * per_token)
    head: torch.Tensor = head_of(model).weight
    more = (limit - predicted) // (head.numel() * size)
    formats = max(1, min(_HEAD_FORMATS, len(candidates.weights), 1 + more))
    return Budget(
        limit=limit,
        max_tokens=tokens,
        predicted=predicted + (formats - 1) * head.numel() * size,
        keeps_records=keeps,
        head_formats=formats,
    )


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
        losses: Losses that go backward, see :func:`plan_budget`.

    Raises:
        UserError: Neither fits; the message has the GiB that would do.
    """
    whole = weight_bytes(model)
    if memory_gb is None and device.type == "cpu":
        return Placement(False, whole)
    layers = layer_bytes(model) if traits_of(model).chained else {}
    by_layers = whole - sum(layers.values()) + SLOTS * max(layers.values(), default=0)
    size, wide = _widths(model, losses)
    rows = _Rows.of(model, groups, None)
    fixed, per_token, _ = _footprint(model, groups, candidates, size, wide, losses, rows)
    given = memory_gb * GIB if memory_gb is not None else float(free_memory(device))
    share = memory_share() * (1.0 if memory_gb is not None else _SHARE_OF_FREE)

    def needed(weights: int, tokens: int) -> float:
        return weights + (fixed + tokens * per_token) / share

    if needed(whole, _RESIDENT_TOKENS) <= given:
        return Placement(False, whole)
    if by_layers < whole and needed(by_layers, _LEAST_TOKENS) <= given:
        return Placement(True, by_layers)
    if needed(whole, _LEAST_TOKENS) <= given:
        return Placement(False, whole)
    least = needed(min(whole, by_layers), _LEAST_TOKENS)
    raise UserError(
        f"a pass needs {_gib(least)} GiB: {_gib(min(whole, by_layers))} of weights, a layer at a "
        f"time where that is less, and what is made of {_LEAST_TOKENS} tokens; there are "
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
    return held <= free_memory(device_of(model)) * _SHARE_OF_FREE


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a device that a model's weights take: of streamed layers, two at once."""
    stream = stream_of(model)
    if stream is not None:
        return stream.weight_bytes
    return sum(
        each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers())
    )


def memory_share() -> float:
    """Return the share of its budget that a pass may take, above 0 and at most 1.

    Raises:
        UserError: The environment says something else.
    """
    text = os.environ.get(MEMORY_SHARE) or "1"
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(
            f"'{text}' is no share",
            where=f"environment variable {MEMORY_SHARE}",
            remedy="Set it to a number above 0 and at most 1, or unset it.",
        )
    return share


def peak(device: torch.device) -> int:
    """Return the bytes that were taken at most since ``reset_peak`` (on a CPU: ever)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return most_memory()


def reset_peak(device: torch.device) -> int:
    """Start measuring; return the bytes that are taken now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _gib(size: float) -> float:
    """Return GiB, rounded up to two digits."""
    return math.ceil(size / GIB * 100) / 100


def _widths(model: nn.Module, losses: int) -> tuple[int, int]:
    """Return the bytes of a value that a model makes, and of one of a quantized module's output."""
    stored = next(model.parameters()).element_size()
    # Measured divergences are taken in float32; so are changes of outputs under several losses.
    wide = stored if losses == 1 else max(4, stored)
    return stored if losses else wide, wide


@dataclass(frozen=True)
class _Rows:
    """How many rows a token is to each part of a model, at most over the samples.

    Attributes:
        layers: Names of the layers.
        tower: Names of the modules that read pictures.
        patches: Patches of pictures a token.
        visual: The same once they are merged.
        kept: Values a token that are kept between the layers: what goes in.
    """

    layers: tuple[str, ...]
    tower: frozenset[str]
    patches: float
    visual: float
    kept: float

    @classmethod
    def of(cls, model: nn.Module, groups: Sequence[Group], samples: Samples | None) -> _Rows:
        """Return those of a model and samples."""
        tower = tower_of(groups)
        counts = []
        if samples is not None and samples.pictures:
            counts = [
                (picture.patches / len(ids), picture.shown / len(ids))
                for picture, ids in zip(samples.pictures, samples.ids, strict=True)
            ]
        patches = max((each for each, _ in counts), default=0.0)
        visual = max((each for _, each in counts), default=0.0)
        kept = 0.0
        # What is not run again is one layer: all of it is held at once.
        layers = layers_of(model) if traits_of(model).chained else {}
        for name, layer in layers.items():
            inner = [part for part in layer.modules() if is_linear(part)]
            width = weight_of(inner[0]).shape[1] if inner else 0
            reads = any(module.startswith(f"{name}.") for module in tower)
            kept += width * (patches if reads else 1.0)
        return cls(tuple(layers), tower, patches, visual, kept)

    def of_module(self, name: str, module: nn.Module) -> tuple[str, float]:
        """Return the layer of a module, empty where it is in none, and its rows a token."""
        layer = next((layer for layer in self.layers if name.startswith(f"{layer}.")), "")
        if name not in self.tower:
            return layer, 1.0
        at_patches = layer or not isinstance(module, nn.Linear)
        return layer, self.patches if at_patches else self.visual


def _footprint(
    model: nn.Module,
    groups: Sequence[Group],
    candidates: Candidates,
    size: int,
    wide: int,
    losses: int,
    rows: _Rows,
) -> tuple[float, float, float]:
    """Return the bytes of a pass: those that depend on no token, those of a token, its records.

    Args:
        model: The model.
        groups: Its groups.
        candidates: What the pass computes.
        size: Bytes of a value that the model makes.
        wide: Bytes of a value of a quantized module's output.
        losses: Losses that go backward.
        rows: How many rows a token is.
    """
    head = head_of(model)
    stored = head.weight.element_size()
    # Outputs made anew, inputs in the parts that a product in float32 takes them in.
    anew = wide if wide > size else 0
    parts = 6 if wide > stored else 0
    more = max(0, losses - 1)  # gradients beside those that the record counts
    # A candidate of a small size scores few of the tokens: counted as the share that it does.
    share = [scored / max(candidates.scored) for scored in candidates.scored]
    of_weight: Counter[int] = Counter()
    of_input: dict[int, float] = {}
    for (weight_index, entry), part in zip(candidates.pairs, share, strict=True):
        of_weight[weight_index] += part  # type: ignore[assignment]
        of_input[entry] = max(of_input.get(entry, 0.0), part)
    most = max(of_weight.values())
    inside: dict[str, float] = {}
    gradients: dict[str, float] = {}
    widest = largest = 0.0
    for group in groups:
        if not group.covered:
            continue
        for name in group.members:
            module = model.get_submodule(name)
            if is_experts(module):
                layer, _ = rows.of_module(name, module)
                held, kept, working = _of_experts(model, module, size, wide, most, losses)
                largest = max(largest, held)
                inside[layer] = inside.get(layer, 0.0) + kept
                hidden = expert_weights(module)[0].shape[2]
                gradients[layer] = gradients.get(layer, 0.0) + more * size * hidden
                stacked = 2 * sum(of_input.values()) + most
                widest = max(widest, hidden * (size * 3 + wide * (stacked + most)) + working)
                continue
            weight = weight_of(module)
            largest = max(largest, weight.numel())
            if module is head:
                continue
            layer, each = rows.of_module(name, module)
            out, into = each * weight.shape[0], each * weight[0].numel()
            # One layer at a time: what autograd keeps while it runs again, and the rows taken.
            inside[layer] = inside.get(layer, 0.0) + 1.5 * size * (into + out)
            gradients[layer] = gradients.get(layer, 0.0) + more * size * out
            # Quantized inputs, also stacked for two kinds of weights; the rows; one product.
            stacked = 2 * sum(of_input.values()) + most
            products = out * (2 * size + most * wide + anew)
            widest = max(widest, into * (size + wide * stacked + parts * most) + products)
    hidden, vocabulary = head.weight.shape[1], head.weight.shape[0]
    chunk = min(largest, WEIGHT_CHUNK)
    held = size + (wide if wide > stored else 0)
    fixed = largest * held + chunk * 3 * 4 + HEAD_ROWS * vocabulary * (3 * 4 + 2 * size)
    at_head = hidden * (size * 3 + wide * most)
    per_token = rows.kept * size * 1.1 + max(
        max(inside.values(), default=0.0) + max(gradients.values(), default=0.0) + widest,
        at_head,
    )
    return fixed, per_token, sum(inside.values()) - max(inside.values(), default=0.0)


def _of_experts(
    model: nn.Module, module: nn.Module, size: int, wide: int, most: float, losses: int
) -> tuple[int, float, float]:
    """Return elements of all weights, and bytes a token: the record, the work beside it.

    Args:
        most: Candidates that one weight format has.
    """
    first, second = expert_weights(module)
    hidden, inner = second.shape[1:]
    chosen = _experts_of_token(model, len(first))
    # Autograd keeps what every expert of a token reads, its two halves, and what it adds.
    kept = size * (2 * hidden + chosen * (3 * hidden + 4 * inner))
    # What experts add, as they are and under one input format at a time; norms of all pairs.
    norms = chosen * most * (1 + losses) * 4
    working = chosen * (size * hidden + wide * (3 * hidden + 4 * inner)) + norms
    return first.numel() + second.numel(), kept, working


def _experts_of_token(model: Any, count: int) -> int:
    """Return how many experts a token goes to, as configurations say it; all where none does."""
    config = model.config.get_text_config()
    given = (getattr(config, key, None) for key in _CHOSEN)
    return next((each for each in given if isinstance(each, int)), count)


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be taken on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return available_memory()
