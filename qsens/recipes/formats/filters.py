"""The name filters that ModelOpt's presets carry: modules that most runtimes expect at 16 bits.

A sweep scores such modules like all others, and a recipe may choose a format for them; it then says
so, since what loads the model may not know how to.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

FILTERS = (
    "*block_sparse_moe.gate*",
    "*linear_attn.conv1d*",
    "*self_attention.conv1d*",
    "*linear_attn.in_proj_a*",
    "*linear_attn.in_proj_b*",
    "*lm_head*",
    "*mixer.conv1d*",
    "*mlp.gate.*",
    "*mlp.shared_expert_gate.*",
    "*output_layer*",
    "*proj_out.*",
    "*router*",
    "mtp.*",
    "output.*",
    "*embed_vision*",
    "*vision_tower*",
    "*visual*",
    "*vision_model*",
    "*multi_modal_projector*",
)
"""Patterns (fnmatch) of quantizers' names, as ``_default_disabled_quantizer_cfg`` has them."""


def filtered(members: Iterable[str]) -> dict[str, int]:
    """Return how many of ``members``, names of modules, each filter matches, where any."""
    names = [f"{member}.weight_quantizer" for member in members]
    kept = {
        pattern: sum(fnmatch.fnmatchcase(name, pattern) for name in names) for pattern in FILTERS
    }
    return {pattern: count for pattern, count in kept.items() if count}


def notices(members: Iterable[str]) -> list[str]:
    """Return a notice for each filter that would leave some of ``members`` alone.

    Args:
        members: Names of the modules that a recipe quantizes.
    """
    return [
        f"{count} quantized module{'s match' if count > 1 else ' matches'} {pattern}, which "
        f"ModelOpt's presets leave at 16 bits: check that your runtime loads "
        f"{'them' if count > 1 else 'it'}, or say --keep '{pattern}'"
        for pattern, count in filtered(members).items()
    ]
