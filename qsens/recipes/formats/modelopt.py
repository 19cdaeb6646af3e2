"""A recipe as ModelOpt takes it: one ``quant_cfg`` entry for every quantizer that is on."""

from __future__ import annotations

import re
from typing import Any

import yaml

from qsens.recipes.formats.evidence import experts_of, header, members_of
from qsens.schema.recipe import Recipe


def config(recipe: Recipe) -> dict[str, Any]:
    """Return the configuration that ``mtq.quantize`` takes.

    The first entry turns every quantizer off; each module of the recipe is then named by itself, so
    that no name filter of a preset (``*lm_head*``) stands behind it: the last match wins.
    """
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    experts = experts_of(recipe)
    for name, pair in recipe.formats.items():
        parts = [("weight_quantizer", pair.weight_cfg())]
        if pair.input_quantizer is not None:
            parts.append(("input_quantizer", pair.input_quantizer.cfg()))
        for member in members_of(recipe, name):
            # Experts have two products; ModelOpt's names match the quantizers of each expert.
            products = ("gate_up_proj_", "down_proj_") if member in experts else ("",)
            for quantizer, cfg in parts:
                for product in products:
                    pattern = f"{literal(member)}.{product}{quantizer}"
                    entries.append({"quantizer_name": pattern, "cfg": cfg})
    calibrated = any(pair.algorithm == "max" for pair in recipe.formats.values())
    return {"quant_cfg": entries, "algorithm": "max" if calibrated else None}


def dump(recipe: Recipe) -> str:
    """Return the configuration as YAML; ``yaml.safe_load`` gives what ``mtq.quantize`` takes."""
    head = header(recipe, "modelopt.torch.quantization.quantize after yaml.safe_load")
    return head + yaml.dump(
        _plain(config(recipe)), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=200
    )


class _Dumper(yaml.SafeDumper):
    """Writes every entry in full: aliases are hard to read and to edit."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return whether ``data`` is written in full wherever it stands."""
        return True


def literal(name: str) -> str:
    """Return a pattern (fnmatch) that matches ``name`` alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _plain(value: Any) -> Any:
    """Return ``value`` with tuples as lists, which YAML's safe loader knows."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
