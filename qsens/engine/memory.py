"""How much memory a pass may take, and how many tokens go through at once under it. Needs torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qsens.checkpoint.groups import Group
from qsens.checkpoint.structure import head_of
from qsens.data.samples import BATCH_TOKENS, Samples
from qsens.engine.candidates import Candidates
from qsens.engine.footprint import footprint
from qsens.engine.host_memory import available_memory, most_memory
from qsens.engine.layer_stream import device_of, stream_of
from qsens.engine.team import team_of
from qsens.errors import UserError

GIB = 1 << 30
# Environment variable: what a run after one that was out of memory may take of the budget, 0 to 1.
MEMORY_SHARE = "QSENS_MEMORY_SHARE"
# What is left to the allocator's own waste and to what the estimate does not see.
SHARE_OF_FREE = 0.8
LEAST_TOKENS = 64
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
# Tokens of batches over real ones, at most as a rule.
_PADDED = 2


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
        samples: The samples: how many tokens there are, and patches of pictures that each brings
            along.
    """
    device = device_of(model)
    if memory_gb is not None:
        free = memory_gb * GIB - weight_bytes(model)
    else:
        free = free_memory(device) * SHARE_OF_FREE
        if device.type == "cpu":  # which all processes of a team take from
            free /= team_of(model).count
    limit = max(0, int(free * memory_share()))
    takes = footprint(model, groups, candidates, losses, samples)
    fixed, per_token, records = takes.fixed, takes.per_token, takes.records
    fitting = max(LEAST_TOKENS, int((limit - fixed) / per_token))
    # Patches that a token brings along are work on weights too: fewer tokens share it as well.
    on_a_gpu = device.type == "cuda"
    window = _SHARED_LAUNCHES if on_a_gpu and losses == 1 else _WINDOW_TOKENS
    enough = int((window if losses else _FORWARD_TOKENS) / max(1.0, takes.patches / 2))
    tokens = min(enough, fitting)
    recorded = int((min(limit, _RECORDS) - fixed) / (per_token + records))
    keeps = losses > 0 and recorded >= _RECORDED_TOKENS and stream_of(model) is None
    if keeps:
        tokens, per_token = min(enough, recorded), per_token + records
    flown = tokens
    if losses and samples is not None:  # no more than there are; copies are not counted
        flown = min(tokens, _PADDED * samples.tokens(max(candidates.scored)))
    predicted = int(fixed + flown * per_token)
    head: torch.Tensor = head_of(model).weight
    more = (limit - predicted) // (head.numel() * takes.size)
    formats = max(1, min(_HEAD_FORMATS, len(candidates.weights), 1 + more))
    return Budget(
        limit=limit,
        max_tokens=tokens,
        predicted=predicted + (formats - 1) * head.numel() * takes.size,
        keeps_records=keeps,
        head_formats=formats,
    )


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


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be taken on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return available_memory()
