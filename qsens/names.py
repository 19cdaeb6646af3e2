"""Names of groups and modules, and what they say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

GROUP_SUFFIX = ".quant_recipe"
# Leaves of the modules that servers fuse into one product.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

Kind = Literal["qkv", "o", "gate_up", "down", "experts", "head", "vision", "other"]


def group_name(key: str) -> str:
    """Return a group's name without ModelOpt's suffix."""
    return key.removesuffix(GROUP_SUFFIX)


def kind_of(name: str, vision: bool = False) -> Kind:
    """Say what a module or group is, from its name."""
    if vision or re.search(r"(^|\.)(visual|vision_tower|vision_model)\.", name):
        return "vision"
    leaf = name.rsplit(".", 1)[-1]
    table: Mapping[str, Kind] = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv", "qkv_proj"), "qkv"),
        **dict.fromkeys(("o_proj", "out_proj"), "o"),
        **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), "gate_up"),
        "down_proj": "down",
        "experts": "experts",
        **dict.fromkeys(("lm_head", "output_layer"), "head"),
    }
    return table.get(leaf, "other")


def depth_of(name: str) -> int | None:
    """Return the index of a module's layer, from its name; none outside the layers."""
    match = re.search(r"\.(?:layers|blocks|h)\.([0-9]{1,4})\.", name)
    return int(match.group(1)) if match else None
