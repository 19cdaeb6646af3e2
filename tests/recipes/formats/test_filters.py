"""The name filters of ModelOpt's presets, against ModelOpt's own list."""

from __future__ import annotations

from qsens.recipes.formats.filters import FILTERS, filtered, notices


def test_filters_are_those_of_modelopt() -> None:
    from modelopt.torch.quantization.config import _default_disabled_quantizer_cfg

    names = [
        entry["quantizer_name"]
        for entry in _default_disabled_quantizer_cfg
        if not entry.get("parent_class") and not entry["enable"]
    ]
    assert list(FILTERS) == names


def test_a_module_is_named_with_the_filter_that_it_matches() -> None:
    members = ["lm_head", "model.visual.blocks.0.attn.qkv", "model.layers.0.mlp.gate_proj"]
    assert filtered(members) == {"*lm_head*": 1, "*visual*": 1}
    assert filtered(["model.layers.3.mlp.gate", "model.layers.4.mlp.gate"]) == {"*mlp.gate.*": 2}
    assert notices(["model.layers.0.mlp.gate_proj"]) == []
