"""ModelOpt takes the YAML as it is, and every module gets the format that was chosen."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
import yaml

from qsens.config import PairConfig, choices, load_sweep
from qsens.recipes.formats import modelopt
from qsens.recipes.formats.evidence import choose
from qsens.schema.recipe import Recipe
from qsens.schema.summary import Row

PAIRS: dict[str, PairConfig] = {
    pair.name: pair
    for pair in load_sweep(
        "demo-text", [f"quant_pair={','.join(choices('quant_pair'))}"]
    ).config.quant_pair
}
# What a weight costs, by number format and block: written down here, not taken from the pairs.
BITS = {
    ((2, 1), 32): 4 + 8 / 32,
    ((2, 1), 16): 4 + 8 / 16,
    (4, 128): 4 + 16 / 128,
    ((4, 3), None): 8.0,
    ((4, 3), 32): 8 + 8 / 32,
    (8, None): 8.0,
}


def recipe_of(rows: dict[str, list[Row]], bits: float, **other: Any) -> Recipe:
    return choose(
        rows,
        PAIRS,
        bits,
        sweep_id="sweep",
        model="demo",
        checkpoint_digest="0" * 64,
        size="small",
        method="gradient",
        **other,
    )


@pytest.mark.parametrize(("bits", "keep_head"), [(6.0, True), (9.5, True), (5.0, False)])
def test_every_module_gets_what_was_chosen(
    demo_model: Any, demo_rows: dict[str, list[Row]], bits: float, keep_head: bool
) -> None:
    import modelopt.torch.quantization as mtq
    import torch

    recipe = recipe_of(demo_rows, bits, keep_head=keep_head)
    config = yaml.safe_load(modelopt.dump(recipe))
    tokens = torch.arange(8)[None, :]
    mtq.quantize(demo_model, config, lambda model: model(input_ids=tokens))

    chosen = {name: choice for choice in recipe.choices for name in choice.members}
    used, total = 0.0, 0
    for name, module in demo_model.named_modules():
        if not hasattr(module, "weight_quantizer"):
            continue
        weight, inputs = module.weight_quantizer, module.input_quantizer
        choice = chosen.get(name)
        if choice is None:
            assert "visual" in name or name.endswith("embed_tokens")
            assert not weight.is_enabled
            assert not inputs.is_enabled
            continue
        total += module.weight.numel()
        assert weight.is_enabled == (choice.format is not None)
        if choice.format is None:
            assert not inputs.is_enabled
            used += 16 * module.weight.numel()
            continue
        pair = PAIRS[choice.format]
        block = weight.block_sizes[-1] if weight.block_sizes else None
        used += BITS[weight.num_bits, block] * module.weight.numel()
        assert weight.num_bits == pair.weight_quantizer.num_bits
        assert inputs.is_enabled == (pair.input_quantizer is not None)
        if pair.input_quantizer is not None:
            assert inputs.num_bits == pair.input_quantizer.num_bits
            if pair.input_quantizer.needs_calibration():
                assert float(inputs.amax) > 0
        assert not module.output_quantizer.is_enabled
    assert used / total == pytest.approx(recipe.bits, rel=1e-12)
    assert recipe.bits <= bits
    # With the head at 16 bits the least is 5.52: at 5 bits it has a format like any other module,
    # whatever ModelOpt's presets say about lm_head.
    assert demo_model.lm_head.weight_quantizer.is_enabled is not keep_head


def test_fused_siblings_have_one_format(demo_rows: dict[str, list[Row]]) -> None:
    recipe = recipe_of(demo_rows, 6.0)
    by_module = {name: choice.format for choice in recipe.choices for name in choice.members}
    for layer in range(4):
        stem = f"model.language_model.layers.{layer}"
        qkv = {by_module[f"{stem}.self_attn.{leaf}_proj"] for leaf in "qkv"}
        mlp = {by_module[f"{stem}.mlp.{leaf}_proj"] for leaf in ("gate", "up")}
        assert len(qkv) == len(mlp) == 1
    assert len(set(by_module.values())) > 2


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_modelopt_accepts_every_pair(name: str, demo_rows: dict[str, list[Row]]) -> None:
    from modelopt.torch.quantization.config import QuantizeConfig

    recipe = recipe_of({name: demo_rows[name]}, 12.0)
    config = yaml.safe_load(modelopt.dump(recipe))
    QuantizeConfig.model_validate(config)
    patterns = [entry["quantizer_name"] for entry in config["quant_cfg"]]
    assert patterns[0] == "*"
    assert all(pattern.endswith("_quantizer") for pattern in patterns[1:])
    assert config["algorithm"] == PAIRS[name].algorithm


def test_a_name_is_no_pattern() -> None:
    row = Row(
        layer="odd[0].*?: # proj",
        members=("odd[0].*?: # proj",),
        kind="other",
        depth=None,
        status="scored",
        num_bits=8.0,
        sensitivity=1.0,
        sensitivity_per_token=1.0,
        size_cost=8.0,
        position=1,
        share=1.0,
    )
    recipe = recipe_of({"wint8_afp16": [row]}, 8.0, notices=["two\nlines: [a]"])
    config = yaml.safe_load(modelopt.dump(recipe))
    assert len(config["quant_cfg"]) == 2
    pattern = config["quant_cfg"][1]["quantizer_name"]
    assert fnmatch.fnmatchcase("odd[0].*?: # proj.weight_quantizer", pattern)
    assert not fnmatch.fnmatchcase("odd0.x: # proj.weight_quantizer", pattern)
