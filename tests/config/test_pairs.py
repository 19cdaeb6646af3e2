"""The pair files: what each one says, and that presets of ModelOpt are named truly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qsens.config import PairConfig, Roots, choices, load_sweep

REPO = Path(__file__).resolve().parents[2]
ROOTS = Roots(root=REPO, results=REPO, configs=(REPO / "configs",))

# Weight bits with block scales, whether nobody deploys it, and the format's name.
PAIRS = {
    "wfp4_afp16": (4.25, False, "MXFP4_WEIGHT_ONLY"),
    "wfp4_afp8": (4.25, False, "W4A8_MXFP4_FP8_CFG"),
    "wfp4_aint8": (4.25, True, "MXFP4_WEIGHT_INT8_ACTIVATION"),
    "wfp4_aint4": (4.25, True, "MXFP4_WEIGHT_INT4_TOKEN_ACTIVATION"),
    "wfp8_afp16": (8.0, False, "FP8_WEIGHT_ONLY"),
    "wfp8_afp8": (8.0, False, "FP8_DEFAULT_CFG"),
    "wfp8_aint8": (8.0, True, "FP8_WEIGHT_INT8_ACTIVATION"),
    "wfp8_aint4": (8.0, True, "FP8_WEIGHT_INT4_TOKEN_ACTIVATION"),
    "wint8_afp16": (8.0, False, "INT8_WEIGHT_ONLY_CFG"),
    "wint8_afp8": (8.0, True, "INT8_WEIGHT_FP8_ACTIVATION"),
    "wint8_aint8": (8.0, False, "INT8_DEFAULT_CFG"),
    "wint8_aint4": (8.0, True, "INT8_WEIGHT_INT4_TOKEN_ACTIVATION"),
    "wint4_afp16": (4.125, False, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
    "wint4_afp8": (4.125, False, "INT4_BLOCKWISE_WEIGHT_FP8_ACTIVATION"),
    "wint4_aint8": (4.125, False, "INT4_BLOCKWISE_WEIGHT_INT8_ACTIVATION"),
    "wint4_aint4": (4.125, True, "INT4_BLOCKWISE_WEIGHT_INT4_TOKEN_ACTIVATION"),
    "wnvfp4_anvfp4": (4.5, False, "NVFP4_DEFAULT_CFG"),
    "wnvfp4_afp8": (4.5, False, "NVFP4_WEIGHT_FP8_ACTIVATION"),
    "wnvfp4_afp16": (4.5, False, "W4A16_NVFP4_CFG"),
    "wfp4_afp4": (4.25, False, "MXFP4_DEFAULT_CFG"),
    "wmxfp8_amxfp8": (8.25, False, "MXFP8_DEFAULT_CFG"),
    "wmxfp8_afp16": (8.25, False, "MXFP8_WEIGHT_ONLY"),
}
MX = {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}
NV = {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
WEIGHTS = {
    "fp4": {"num_bits": (2, 1), "block_sizes": MX},
    "fp8": {"num_bits": (4, 3), "axis": None},
    "int8": {"num_bits": 8, "axis": 0},
    "int4": {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}},
    "nvfp4": {"num_bits": (2, 1), "block_sizes": NV},
    "mxfp8": {"num_bits": (4, 3), "block_sizes": MX},
}
INPUTS: dict[str, dict[str, Any] | None] = {
    "fp16": None,
    "fp8": {"num_bits": (4, 3), "axis": None},
    "int8": {"num_bits": 8, "axis": None},
    "int4": {"num_bits": 4, "block_sizes": {-1: None}, "type": "dynamic"},
    "nvfp4": {"num_bits": (2, 1), "block_sizes": NV},
    "fp4": {"num_bits": (2, 1), "block_sizes": MX},
    "mxfp8": {"num_bits": (4, 3), "block_sizes": MX},
}


@pytest.fixture(scope="module")
def pairs() -> dict[str, PairConfig]:
    names = ",".join(choices("quant_pair", ROOTS))
    loaded = load_sweep("single", [f"quant_pair={names}"], roots=ROOTS)
    return {pair.name: pair for pair in loaded.config.quant_pair}


def test_the_files_are_the_pairs_that_are_documented(pairs: dict[str, PairConfig]) -> None:
    assert {
        name: (pair.effective_bits, pair.experimental, pair.format) for name, pair in pairs.items()
    } == PAIRS


@pytest.mark.parametrize("name", PAIRS)
def test_quantizers_follow_from_the_name(name: str, pairs: dict[str, PairConfig]) -> None:
    weight, activation = name.removeprefix("w").split("_a")
    pair = pairs[name]
    assert (pair.weight, pair.activation) == (weight, activation)
    assert pair.weight_quantizer.cfg() == WEIGHTS[weight]
    inputs = pair.input_quantizer
    assert (inputs.cfg() if inputs else None) == INPUTS[activation]


@pytest.mark.parametrize("name", PAIRS)
def test_only_calibrated_inputs_need_calibration(name: str, pairs: dict[str, PairConfig]) -> None:
    inputs = pairs[name].input_quantizer
    # NVFP4 calibrates the scale over its block scales; INT4 takes its scale from each token.
    calibrated = {"fp8": True, "int8": True, "int4": False, "nvfp4": True, "fp4": False}
    calibrated["mxfp8"] = False
    if inputs is not None:
        assert inputs.needs_calibration() is calibrated[pairs[name].activation]


def test_effective_bits_count_the_scale_of_each_block(pairs: dict[str, PairConfig]) -> None:
    assert pairs["wfp4_aint8"].effective_bits == (32 * 4 + 8) / 32
    assert pairs["wnvfp4_afp8"].effective_bits == (16 * 4 + 8) / 16
    assert pairs["wint4_afp8"].effective_bits == (128 * 4 + 16) / 128


def test_a_plan_keeps_every_quantizer(pairs: dict[str, PairConfig]) -> None:
    for pair in pairs.values():
        assert PairConfig.model_validate_json(pair.model_dump_json()) == pair


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"num_bits": 8, "axis": -1}, "type: dynamic"),
        ({"num_bits": 8, "block_sizes": {"-1": 128}}, "type: dynamic"),
        ({"num_bits": 8, "axis": 0, "block_sizes": {"-1": 128}}, "axis together with block_sizes"),
        ({"num_bits": 8, "block_sizes": {"-1": 0}, "type": "dynamic"}, "block size 0"),
        ({"num_bits": 8, "block_sizes": {"-1": "64"}, "type": "dynamic"}, "block size '64'"),
    ],
)
def test_inputs_that_cannot_be_computed_are_refused(
    inputs: dict[str, Any], said: str, pairs: dict[str, PairConfig]
) -> None:
    data = pairs["wint8_aint8"].model_dump() | {"input_quantizer": inputs}
    with pytest.raises(ValidationError, match=said):
        PairConfig.model_validate(data)


def as_modelopt_reads(config: dict[str, Any]) -> list[dict[str, Any] | None]:
    """Return the cfg that a configuration gives every weight and every input quantizer."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig

    found = []
    for name in ("*weight_quantizer", "*input_quantizer"):
        cfg = None
        for entry in config["quant_cfg"]:
            if entry["quantizer_name"] == name:
                cfg = entry.get("cfg") if entry.get("enable", True) else None
        # A list holds quantizers in sequence, which no pair of ours has.
        read = QuantizerAttributeConfig(**cfg).model_dump() if isinstance(cfg, dict) else cfg
        found.append(read)
    return found


def without_bits(found: list[dict[str, Any] | None]) -> list[dict[str, Any] | None]:
    return [{**cfg, "effective_bits": None} if isinstance(cfg, dict) else cfg for cfg in found]


def test_the_names_of_presets_are_true(pairs: dict[str, PairConfig]) -> None:
    mtq = pytest.importorskip("modelopt.torch.quantization")
    presets = {name: getattr(mtq, name) for name in mtq.config.choices if hasattr(mtq, name)}
    named = {pair.name for pair in pairs.values() if pair.format in presets}
    assert named == {
        "wfp4_afp4",
        "wfp4_afp8",
        "wfp8_afp8",
        "wmxfp8_amxfp8",
        "wint8_afp16",
        "wint8_aint8",
        "wint4_afp16",
        "wnvfp4_anvfp4",
        "wnvfp4_afp16",
    }
    for pair in pairs.values():
        own = without_bits(as_modelopt_reads(pair.modelopt()))
        if pair.name in named:
            preset = as_modelopt_reads(presets[pair.format])
            assert own == without_bits(preset), pair.name
            # Where ModelOpt counts block scales itself, it counts as we do.
            assert preset[0] is not None
            assert preset[0]["effective_bits"] in (None, pair.effective_bits), pair.name
            continue
        for name, preset in presets.items():
            # AWQ, SmoothQuant and the like are more than a number format.
            if preset.get("algorithm") in ("max", None):
                assert own != without_bits(as_modelopt_reads(preset)), f"{pair.name} is {name}"
