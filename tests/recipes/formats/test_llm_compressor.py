"""The compressed-tensors package takes the recipe, and gives every module the scheme chosen."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from qsens.config import PairConfig
from qsens.errors import UserError
from qsens.recipes.formats import llm_compressor
from qsens.recipes.formats.evidence import choose
from qsens.schema.summary import Row
from tests.recipes.every_format import at_all_granularities

compressed = pytest.importorskip("compressed_tensors.quantization")


def quantization_config(text: str) -> Any:
    """Read a recipe as llm-compressor does, into the schema of compressed-tensors."""
    (stage,) = yaml.safe_load(text).values()
    ((name, modifier),) = stage["quantization_modifiers"].items()
    assert name == "QuantizationModifier"
    return compressed.QuantizationConfig.model_validate(modifier)


def test_every_pair_is_valid_or_refused_by_name(pairs: dict[str, PairConfig]) -> None:
    assert len(pairs) == 22
    valid = []
    for name, pair in pairs.items():
        reason = llm_compressor.refusal(pair)
        if reason is not None:
            with pytest.raises(UserError, match="cannot express") as caught:
                llm_compressor.scheme(pair)
            assert name in str(caught.value)
            continue
        found = compressed.QuantizationScheme(targets=["Linear"], **llm_compressor.scheme(pair))
        assert (found.input_activations is None) == (pair.activation == "fp16")
        valid.append(name)
    assert len(valid) == 22


# Presets of compressed-tensors that are the same format as a pair here.
SAME = {
    "wfp4_afp4": "MXFP4",
    "wmxfp8_amxfp8": "MXFP8",
    "wmxfp8_afp16": "MXFP8A16",
    "wfp8_afp8": "FP8",
    "wfp4_afp16": "MXFP4A16",
    "wnvfp4_afp16": "NVFP4A16",
    "wnvfp4_anvfp4": "NVFP4",
    "wint4_afp16": "W4A16",
}


@pytest.mark.parametrize(("name", "preset"), SAME.items())
def test_known_pairs_are_the_presets(name: str, preset: str, pairs: dict[str, PairConfig]) -> None:
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    ours = compressed.QuantizationScheme(targets=["Linear"], **llm_compressor.scheme(pairs[name]))
    assert ours.model_dump() == preset_name_to_scheme(preset, ["Linear"]).model_dump()


@pytest.mark.parametrize(
    ("weight", "inputs", "words"),
    [
        ({"num_bits": (5, 2)}, None, "floats of format E5M2"),
        ({"num_bits": 12}, None, "integers of 12 bits"),
        ({"num_bits": 8, "axis": 1}, None, "scaled along axis 1"),
        ({"num_bits": 4, "block_sizes": {"0": 64}}, None, "in blocks along axes 0"),
        (
            {"num_bits": 8, "block_sizes": {"-1": 32, "type": "dynamic", "scale_bits": (8, 0)}},
            None,
            "INT8 in blocks of 32 under scales of",
        ),
        ({"num_bits": 8}, {"num_bits": 8, "type": "dynamic", "axis": 0}, "another axis"),
    ],
)
def test_what_it_cannot_express_is_refused_by_name(
    weight: dict[str, Any], inputs: dict[str, Any] | None, words: str
) -> None:
    pair = PairConfig.model_validate(
        {
            "name": "wodd_aodd",
            "weight": "odd",
            "activation": "odd",
            "format": "ODD",
            "weight_quantizer": weight,
            "input_quantizer": inputs,
            "effective_bits": 8,
        }
    )
    with pytest.raises(UserError, match=words) as caught:
        llm_compressor.scheme(pair)
    assert "wodd_aodd" in str(caught.value)


def test_applied_to_the_demo_checkpoint(
    demo_model: Any, demo_rows: dict[str, list[Row]], pairs: dict[str, PairConfig]
) -> None:
    recipe = choose(
        demo_rows,
        pairs,
        6.5,
        sweep_id="sweep",
        model="demo",
        checkpoint_digest="0" * 64,
        size="small",
        method="gradient",
        keep=["*layers.0.*down_proj"],
        keep_head=True,
    )
    compressed.apply_quantization_config(
        demo_model, quantization_config(llm_compressor.dump(recipe))
    )
    schemes = {
        name: module.quantization_scheme
        for name, module in demo_model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    chosen = {
        name: choice.format
        for choice in recipe.choices
        if choice.format is not None
        for name in choice.members
    }
    assert schemes.keys() == chosen.keys()
    assert len(set(chosen.values())) > 2
    for name, module in chosen.items():
        expected = llm_compressor.scheme(pairs[module])
        assert schemes[name].weights.num_bits == expected["weights"]["num_bits"]
        assert schemes[name].weights.strategy == expected["weights"]["strategy"]
        inputs = schemes[name].input_activations
        assert (inputs is None) == (pairs[module].input_quantizer is None)
    unquantized = {"lm_head", "model.language_model.layers.0.mlp.down_proj"}
    assert not unquantized & schemes.keys()
    assert not any("visual" in name for name in schemes)


@pytest.mark.parametrize("columns", [16, 48, 64, 96, 192, 272, 576, 640])
def test_a_width_is_refused_where_compressed_tensors_refuses_it(
    columns: int, pairs: dict[str, PairConfig]
) -> None:
    import torch

    seen = set()
    for name, pair in at_all_granularities(pairs).items():
        module = torch.nn.Linear(columns, 24, bias=False)
        scheme = compressed.QuantizationScheme(targets=["Linear"], **llm_compressor.scheme(pair))
        compressed.initialize_module_for_quantization(module, scheme)
        for parameter in module.parameters():
            if parameter is not module.weight:
                parameter.data = torch.ones_like(parameter)
        module.quantization_status = compressed.QuantizationStatus.FROZEN
        error = ""
        try:
            module(torch.randn(2, columns))
        except (ValueError, RuntimeError) as raised:
            error = str(raised)
        # Groups of weights, and of inputs.
        refused = "divisble by the given group_size" in error or "unflatten" in error
        assert refused or not error, (name, error)
        reason = llm_compressor.unfit(pair, (24, columns))
        assert (reason is not None) == refused, (name, reason)
        assert reason is None or f"{columns} columns do not divide into blocks of" in reason
        seen.add(refused)
    assert seen == ({True, False} if columns % 128 else {False})


def test_blocks_of_rows_and_columns_must_divide_the_columns_alone() -> None:
    scales = {"num_bits": (4, 3), "block_sizes": {"-1": 128, "-2": 128}}
    pair = PairConfig(
        name="wblock_afp16",
        weight="block",
        activation="fp16",
        format="BLOCK",
        weight_quantizer=scales,
        effective_bits=8.0,
    )
    assert llm_compressor.unfit(pair, (100, 256)) is None
    assert llm_compressor.unfit(pair, (256, 100)) == "100 columns do not divide into blocks of 128"
