"""Groups of modules that must share one format; needs torch.

ModelOpt itself is not imported: that takes longer than all else that a pass imports together.
"""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from qsens.checkpoint.experts import expert_weights, is_experts
from qsens.checkpoint.modules import quantizable, weight_of
from qsens.names import Kind, depth_of, kind_of

# Modules of one parent that share a format, since engines fuse them: the parent, what they are
# called below it, and what tells apart several groups of one parent. The first that matches counts.
# The first are ModelOpt's (quant_grouping_rules of 0.47, held equal by a test); the last are
# of what vLLM loads into one weight, where ModelOpt has no rule.
_SHARED = tuple(
    (re.compile(rf"({parent})\.(?:{names})"), suffix)
    for parent, names, suffix in (
        (r".*?", r"q_proj|k_proj|v_proj", ""),
        # Experts: all of a layer.
        (r".*?\.mlp\.experts", r"\d+\.(?:gate_proj|up_proj|down_proj)", ""),
        (r".*?\.mixer\.experts", r"\d+\.(?:up_proj|down_proj)", ""),
        (r".*?\.mlp\.experts\.local_experts", r"\d+\.(?:linear_fc1|linear_fc2)", ""),
        (r".*?", r"gate_proj|up_proj", ""),
        (r".*?", r"\d+\.(?:w1|w2|w3)", ""),
        (r".*?", r"(?:w1_linear|w2_linear|w3_linear)\.\d+", ""),
        # Linear attention: two groups.
        (r".*?\.linear_attn", r"in_proj_qkv|in_proj_z", "/qkvz"),
        (r".*?\.linear_attn", r"in_proj_a|in_proj_b", "/ba"),
        # Latent attention's two down-projections: fused_qkv_a_proj of deepseek_v2.py.
        (r".*?", r"q_a_proj|kv_a_proj_with_mqa", "/qkv_a"),
        # LFM2's gated products: w1 of lfm2.py.
        (r".*?\.feed_forward", r"w1|w3", "/w13"),
        # Attention of BERT's names: qkv_proj of bert.py. RWKV has keys and values that are others.
        (r".*?\.(?:self|attention\.attention)", r"query|key|value", "/qkv"),
    )
)


@dataclass(frozen=True)
class Group:
    """Modules that share one format.

    Attributes:
        name: Name of the first member, as ModelOpt names the group.
        members: Names of the modules, in model order.
        kind: What the group is in a decoder layer.
        depth: Index of its layer, from 0.
        weights: Elements of all its weights.
        covered: Whether the coverage lets it be quantized.
    """

    name: str
    members: tuple[str, ...]
    kind: Kind
    depth: int | None
    weights: int
    covered: bool


def find_groups(
    model: nn.Module, vision: Iterable[str] = (), *, all_layers: bool = False
) -> list[Group]:
    """Return the groups of ``model`` in model order.

    Args:
        model: The model, not converted yet.
        vision: Module name patterns (fnmatch) of the vision tower; one match is enough for a group.
        all_layers: Whether the tower is covered as well.

    Source: ``AutoQuantizeGradientSearcher.quant_grouping_rules`` of ModelOpt; the first match wins.
    """
    patterns = tuple(vision)
    members: dict[str, list[str]] = defaultdict(list)
    modules = quantizable(model)
    for name in modules:
        members[shared_key(name)].append(name)
    groups = []
    for names in members.values():
        matches = any(fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns)
        groups.append(
            Group(
                name=names[0],
                members=tuple(names),
                kind=kind_of(names[0], vision=matches),
                depth=depth_of(names[0]),
                weights=sum(count_weights(modules[name]) for name in names),
                covered=all_layers or not matches,
            )
        )
    return groups


def tower_of(groups: Iterable[Group]) -> frozenset[str]:
    """Return the names of the modules that read pictures."""
    return frozenset(name for group in groups if group.kind == "vision" for name in group.members)


def count_weights(module: nn.Module) -> int:
    """Return the elements of a module's weights that a format applies to."""
    if is_experts(module):
        return sum(weight.numel() for weight in expert_weights(module))
    return weight_of(module).numel()


def shared_key(name: str) -> str:
    """Return what the modules of a group have in common: equal for those that share a format.

    Args:
        name: Name of a module.

    Source: ``AutoQuantizeGradientSearcher.quant_grouping_rules`` of ModelOpt 0.47, and beyond those
    ``packed_modules_mapping`` of vLLM's models.
    """
    for pattern, suffix in _SHARED:
        match = pattern.fullmatch(name)
        if match is not None:
            return match[1] + suffix
    return name
