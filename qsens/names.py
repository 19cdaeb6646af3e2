"""Names of groups and modules, and what they say."""

from __future__ import annotations

import re
from typing import Literal

GROUP_SUFFIX = ".quant_recipe"
# Leaves of the modules that servers fuse into one product.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

# What names of modules, and of the weights in files, may begin with, each at its own place.
_OUTER = ("model", "language_model")

Kind = Literal["qkv", "o", "gate_up", "down", "experts", "head", "vision", "other"]

_LEAVES: tuple[tuple[Kind, str], ...] = (
    ("qkv", "q_proj k_proj v_proj qkv qkv_proj query_key_value c_attn Wqkv query key value"),
    ("qkv", "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj in_proj_qkv in_proj_qkvz"),
    ("o", "o_proj out_proj"),
    ("gate_up", "gate_proj up_proj gate_up_proj fc1 c_fc fc_in dense_h_to_4h"),
    ("down", "down_proj fc2 fc_out dense_4h_to_h"),
    ("experts", "experts"),
    ("head", "lm_head output_layer"),
)
_KINDS = {leaf: kind for kind, leaves in _LEAVES for leaf in leaves.split()}


def inner_name(name: str) -> str:
    """Return a name without what it begins with: files and servers have that in another order."""
    head, _, rest = name.partition(".")
    return inner_name(rest) if head in _OUTER and rest else name


def group_name(key: str) -> str:
    """Return a group's name without ModelOpt's suffix."""
    return key.removesuffix(GROUP_SUFFIX)


def kind_of(name: str, vision: bool = False) -> Kind:
    """Say what a module or group is, from its name."""
    if vision or re.search(r"(^|\.)(visual|vision_tower|vision_model)\.", name):
        return "vision"
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "c_proj":  # of GPT-2's kind: behind attention, and behind what follows it
        return "o" if re.search(r"\.attn\.", name) else "down"
    return _KINDS.get(leaf, "other")


def depth_of(name: str) -> int | None:
    """Return the index of a module's layer, from its name; none outside the layers."""
    match = re.search(r"\.(?:layers|blocks|h)\.([0-9]{1,4})\.", name)
    return int(match.group(1)) if match else None
