"""A tiny Qwen3-MoE in memory, one of whose experts gets no token, and samples for it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from qsens.data.samples import Samples

EXPERTS = 6
# The expert of each layer that gets no token.
IDLE = (4, 1)


def samples() -> Samples:
    """Return six samples of three lengths."""
    draw = torch.Generator().manual_seed(3)
    lengths = (5, 7, 5, 4, 7, 5)
    ids = tuple(
        tuple(torch.randint(0, 40, (length,), generator=draw).tolist()) for length in lengths
    )
    return Samples(ids=ids, truncated=(False,) * len(ids))


def model(**more: Any) -> Qwen3MoeForCausalLM:
    """Return a random model: 64 channels, experts of 96, of which every token goes to two.

    As it is, no router of it sends a token of :func:`samples` to the idle expert of its layer;
    ``more`` changes its configuration.
    """
    torch.manual_seed(11)
    settings = {
        "vocab_size": 48,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "initializer_range": 0.15,
        "experts_implementation": "eager",
    }
    found = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings | more)).eval().requires_grad_(False)
    for layer, idle in zip(found.model.layers, IDLE, strict=True):
        if not hasattr(layer.mlp, "experts"):
            continue
        layer.mlp.experts.gate_up_proj[:, ::13] *= 4  # outliers, so that granularity shows
        if not more:
            avoid(found, layer.mlp.gate, idle)
    return found


def avoid(whole: torch.nn.Module, router: Any, expert: int) -> None:
    """Change a router so that no token of the samples goes to ``expert``."""
    read = []
    handle = router.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    for ids in samples().ids:
        whole(input_ids=torch.tensor([ids]))
    handle.remove()
    rows = torch.cat([each.flatten(0, -2) for each in read])
    # Fewer rows than channels: some direction has the same product with all of them.
    wanted = torch.full((len(rows), 1), -30.0)
    router.weight[expert] = torch.linalg.lstsq(rows, wanted).solution[:, 0]
