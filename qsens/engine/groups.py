"""Groups of modules that must share one format, by ModelOpt's own rules.

Needs torch and modelopt.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from modelopt.torch.quantization.algorithms import AutoQuantizeGradientSearcher
from torch import nn

from qsens.engine.checkpoint import is_quantizable
from qsens.engine.experts import expert_weights, is_experts
from qsens.names import Kind, depth_of, kind_of


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
    searcher = AutoQuantizeGradientSearcher()
    searcher.model = model
    members: dict[str, list[str]] = defaultdict(list)
    modules = {name: module for name, module in model.named_modules() if is_quantizable(module)}
    for name in modules:
        members[_group_key(searcher, name)].append(name)
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


def count_weights(module: nn.Module) -> int:
    """Return the elements of a module's weights that a format applies to."""
    if is_experts(module):
        return sum(weight.numel() for weight in expert_weights(module))
    return module.get_parameter("weight").numel()


def _group_key(searcher: AutoQuantizeGradientSearcher, name: str) -> str:
    for rule in searcher.quant_grouping_rules:
        key = searcher._apply_quant_group_rule(name, rule)
        if key is not None:
            return str(key)
    return name
