"""What config.json says: every module in its format, whatever a server calls it."""

from __future__ import annotations

import re

import pytest

from qsens.config import load_sweep

pytest.importorskip("compressed_tensors")

from compressed_tensors.quantization import QuantizationConfig

from qsens.export.settings import patterns, quantization_config

LAYER = [f"layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")]
OURS = [
    *(f"model.language_model.{name}" for name in LAYER),
    "model.visual.blocks.0.attn.proj",
    "lm_head",
]
# As vLLM calls the same modules of Qwen3-VL.
SERVERS = [
    *(f"language_model.model.{name}" for name in LAYER),
    "visual.blocks.0.attn.proj",
    "language_model.lm_head",
]


def formats() -> dict[str, object]:
    given = ["quant_pair=wint8_aint8-ct_token,wint4_afp16-ct_group64"]
    return {
        f"{pair.name}-{granularity.name}": pair.with_granularity(granularity)
        for pair, granularity in load_sweep("single", given).config.formats
    }


@pytest.mark.parametrize("names", [OURS, SERVERS], ids=["transformers", "vLLM"])
def test_a_pattern_matches_its_module_alone_under_either_name(names: list[str]) -> None:
    for at, pattern in enumerate(patterns(OURS, OURS)):
        expression = pattern.removeprefix("re:")
        assert [bool(re.match(expression, name)) for name in names] == [
            other == at for other in range(len(names))
        ]


def test_names_that_end_alike_are_told_apart() -> None:
    names = ["model.layers.0.fc", "model.vision.layers.0.fc", "model.language_model.layers.1.fc"]
    for name, pattern in zip(names, patterns(names, names), strict=True):
        matched = [other for other in names if re.match(pattern.removeprefix("re:"), other)]
        assert name in matched
        assert matched == [name]


def test_one_layout_is_named_and_several_are_mixed() -> None:
    int8, int4 = formats()
    chosen = dict.fromkeys(OURS[:2], int8)
    others = [*OURS[2:]]
    one = quantization_config(formats(), chosen, others)  # type: ignore[arg-type]
    assert (one["format"], len(one["config_groups"])) == ("int-quantized", 1)
    assert len(one["ignore"]) == len(others)
    several = quantization_config(  # type: ignore[arg-type]
        formats(), {**chosen, OURS[2]: int4}, others[1:]
    )
    assert several["format"] == "mixed-precision"
    read = QuantizationConfig.model_validate(several)
    layouts = {group["format"] for group in several["config_groups"].values()}
    assert layouts == {"int-quantized", "pack-quantized"}
    assert str(read.quantization_status.value) == "compressed"
    (group,) = [g for g in read.config_groups.values() if g.weights.num_bits == 4]
    assert (group.weights.group_size, group.input_activations) == (64, None)
