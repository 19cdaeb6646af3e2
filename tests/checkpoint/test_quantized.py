"""Checkpoints that are quantized already, by headers and JSON files; and those that are not."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

import pytest

from qsens.checkpoint.files import find_weights
from qsens.checkpoint.quantized import Quantization, read_quantization, shapes
from qsens.errors import UserError

Tensors = dict[str, tuple[str, list[int]]]
_BITS = {
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "BF16": 16,
    "F16": 16,
    "I16": 16,
}
PROJ = "model.layers.0.mlp.down_proj"
WEIGHT = f"{PROJ}.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
PLAIN: Tensors = {
    "model.embed_tokens.weight": ("BF16", [32, 16]),
    "model.norm.weight": ("F32", [16]),
    "model.visual.patch_embed.proj.weight": ("F16", [16, 3, 2, 2]),
}


def write(path: Path, tensors: Tensors, **config: Any) -> Path:
    """Write a checkpoint of zeros by hand: no library knows all of these data types."""
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * _BITS.get(dtype, 8) // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.mkdir(exist_ok=True)
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return path


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        pytest.param({WEIGHT: ("F8_E4M3", [16, 16])}, f"{WEIGHT} is F8_E4M3", id="fp8"),
        pytest.param({WEIGHT: ("F8_E5M2", [16, 16])}, f"{WEIGHT} is F8_E5M2", id="fp8-e5m2"),
        pytest.param({WEIGHT: ("I8", [16, 16])}, f"{WEIGHT} is I8", id="int8"),
        pytest.param({WEIGHT: ("I64", [16, 16])}, f"{WEIGHT} is I64", id="int64"),
        pytest.param(
            {WEIGHT: ("U8", [16, 8]), f"{WEIGHT}_scale": ("F8_E4M3", [16, 1])},
            f"{WEIGHT} is U8",
            id="nvfp4",
        ),
        pytest.param(
            {f"{PROJ}.qweight": ("I32", [2, 16]), f"{PROJ}.qzeros": ("I32", [1, 2])},
            f"{PROJ}.qweight is I32",
            id="awq-gptq",
        ),
        pytest.param(
            {f"{PROJ}.weight_packed": ("I32", [16, 2]), f"{PROJ}.weight_shape": ("I64", [2])},
            f"{PROJ}.weight_packed is I32",
            id="compressed-tensors",
        ),
        pytest.param(
            {f"{EXPERTS}_blocks": ("U8", [2, 8, 1, 16]), f"{EXPERTS}_scales": ("U8", [2, 8, 1])},
            f"{EXPERTS}_blocks is U8",
            id="mxfp4",
        ),
        pytest.param({EXPERTS: ("I8", [2, 8, 16])}, f"{EXPERTS} is I8", id="experts-int8"),
        pytest.param({WEIGHT: ("U8", [128, 1])}, f"{WEIGHT} is U8", id="bitsandbytes-4-bit"),
        pytest.param({WEIGHT: ("U32", [16, 2])}, f"{WEIGHT} is U32", id="mlx"),
        pytest.param({f"{PROJ}.W_q": ("U8", [16, 8])}, f"{PROJ}.W_q is U8", id="hqq"),
        pytest.param({f"{WEIGHT}._data": ("I8", [16, 16])}, f"{WEIGHT}._data is I8", id="quanto"),
        pytest.param({f"{PROJ}.codes": ("I16", [16, 2, 1])}, f"{PROJ}.codes is I16", id="aqlm"),
        pytest.param({WEIGHT: ("U8", [256])}, f"{WEIGHT} is U8", id="packed-flat"),
        *(
            pytest.param(
                {WEIGHT: ("BF16", [16, 16]), f"{PROJ}.{scale}": ("F32", [16, 1])},
                f"{WEIGHT} has {PROJ}.{scale} beside it",
                id=scale,
            )
            for scale in ("weight_scale", "weight_scale_inv", "weight_zero_point", "input_scale")
        ),
        pytest.param(
            {WEIGHT: ("BF16", [16, 16]), f"{PROJ}.weight_quantizer._amax": ("F32", [16, 1])},
            f"it holds {PROJ}.weight_quantizer._amax",
            id="modelopt-state",
        ),
    ],
)
def test_codes_and_scales_are_refused_by_name(tensors: Tensors, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(write(tmp_path / "c", PLAIN | tensors))
    assert caught.value.what == f"is quantized already: {said}"
    assert "16 or 32 bits" in caught.value.remedy


def read(path: Path) -> Quantization | None:
    return read_quantization(path, find_weights(path).tensors)


def reads(path: Path, tensors: Tensors, **settings: Any) -> Quantization:
    found = read(write(path / "c", PLAIN | tensors, quantization_config=settings))
    assert found is not None
    return found


FP8 = {WEIGHT: ("F8_E4M3", [300, 130])}


@pytest.mark.parametrize(
    ("tensors", "settings", "said"),
    [
        pytest.param(
            {f"{PROJ}.qweight": ("I32", [2, 16]), f"{PROJ}.qzeros": ("I32", [1, 2])},
            {"quant_method": "gptq", "bits": 4},
            f", by gptq: {PROJ}.qweight is I32",
            id="gptq",
        ),
        pytest.param(
            {WEIGHT: ("U8", [128, 1]), f"{WEIGHT}.absmax": ("F32", [4])},
            {"quant_method": "bitsandbytes"},
            f", by bitsandbytes: {WEIGHT} is U8",
            id="bitsandbytes",
        ),
        pytest.param(
            FP8, {"quant_method": "fp8"}, f": {WEIGHT} is F8_E4M3 and has no scale", id="no-scale"
        ),
        pytest.param(
            FP8 | {f"{WEIGHT}_scale_inv": ("F32", [3, 1])},
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            f": {WEIGHT}_scale_inv of F32 and shape [3, 1] does not fit {WEIGHT} of [300, 130]",
            id="cut-scale",
        ),
        pytest.param(
            FP8 | {f"{WEIGHT}_scale_inv": ("F32", [7, 2])},
            {"quant_method": "fp8"},
            f": {WEIGHT}_scale_inv of F32 and shape [7, 2] does not fit {WEIGHT} of [300, 130]",
            id="blocks-that-nobody-states",
        ),
        pytest.param(
            FP8 | {f"{WEIGHT}_scale_inv": ("I32", [3, 2])},
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            f": {WEIGHT}_scale_inv of I32 and shape [3, 2] does not fit {WEIGHT} of [300, 130]",
            id="scales-of-integers",
        ),
        pytest.param(
            FP8 | {f"{WEIGHT}_scale_inv": ("F32", [3, 2])},
            {"quant_method": "fp8", "weight_block_size": [0, "a"]},
            ": its weight_block_size is [0, 'a']",
            id="blocks-of-nothing",
        ),
        pytest.param(
            FP8 | {f"{WEIGHT}_scale": ("F32", []), f"{PROJ}.pre_quant_scale": ("F32", [130])},
            {"quant_method": "modelopt"},
            f": of modelopt it is not known what to do where it holds {PROJ}.pre_quant_scale",
            id="smoothed",
        ),
        *(
            pytest.param(
                FP8 | {f"{WEIGHT}_scale": ("F32", [])},
                {
                    "quant_method": "compressed-tensors",
                    "format": "float-quantized",
                    "config_groups": {"group_0": {"targets": ["Linear"]}, "group_1": 5},
                    **more,
                },
                f": compressed-tensors {said} is not read",
                id=said,
            )
            for more, said in (
                ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "with sparse weights"),
                ({"sparsity_config": [1]}, "with sparse weights"),
                ({"transform_config": {"config_groups": {"R1": {}}}}, "with a transform_config"),
                ({"config_groups": []}, "without config_groups"),
            )
        ),
        pytest.param(
            {f"{EXPERTS}_blocks": ("U8", [2, 8, 1, 16]), f"{EXPERTS}_scales": ("U8", [2, 8, 2])},
            {"quant_method": "mxfp4"},
            f": {EXPERTS}_blocks has no {EXPERTS}_scales that fits",
            id="mxfp4-scales",
        ),
        pytest.param(
            {
                WEIGHT: ("BF16", [64, 8]),
                f"{EXPERTS}_blocks": ("U8", [2, 8, 1, 16]),
                f"{EXPERTS}_scales": ("U8", [2, 8, 1]),
                EXPERTS: ("BF16", [2, 32, 8]),
            },
            {"quant_method": "mxfp4"},
            f": it holds {EXPERTS} twice, with codes and without",
            id="twice",
        ),
        pytest.param(
            FP8 | {f"{WEIGHT}_scale_inv": ("F32", []), f"{PROJ}.W_q": ("U8", [16, 8])},
            {"quant_method": "fp8"},
            f": of fp8 it is not known what to do where {PROJ}.W_q is U8",
            id="left-over",
        ),
        pytest.param(
            FP8 | {f"{WEIGHT}_scale": ("F32", [])},
            {
                "quant_method": "compressed-tensors",
                "format": "marlin-24",
                "config_groups": {"group_0": {"targets": ["Linear"]}},
            },
            ": compressed-tensors marlin-24 is not read",
            id="marlin",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_what_is_missing(
    tensors: Tensors, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        reads(tmp_path, tensors, **settings)
    assert caught.value.what == f"is quantized already{said}"
    assert "compressed-tensors" in caught.value.remedy


def test_names_and_shapes_are_those_of_the_weights_once_dequantized(tmp_path: Path) -> None:
    """Planning asks for matrices: scales are none, and packed ones have other shapes."""
    scaled = FP8 | {f"{WEIGHT}_scale_inv": ("F32", [3, 2]), f"{PROJ}.input_scale": ("F32", [])}
    found = reads(tmp_path, scaled, quant_method="fp8", weight_block_size=[128, 128])
    assert found.format == "FP8 in blocks of 128x128"
    plain = {name: tuple(shape) for name, (_, shape) in PLAIN.items()}
    assert shapes(tmp_path / "c") == plain | {WEIGHT: (300, 130)}
    four = {
        WEIGHT: ("U8", [16, 32]),
        f"{WEIGHT}_scale": ("F8_E4M3", [16, 4]),
        f"{WEIGHT}_scale_2": ("F32", []),
    }
    assert reads(tmp_path, four, quant_method="modelopt").format == "NVFP4"
    assert shapes(tmp_path / "c") == plain | {WEIGHT: (16, 64)}
    blocks = {f"{EXPERTS}_blocks": ("U8", [2, 8, 3, 16]), f"{EXPERTS}_scales": ("U8", [2, 8, 3])}
    assert reads(tmp_path, blocks, quant_method="mxfp4").format == "MXFP4"
    assert shapes(tmp_path / "c") == plain | {EXPERTS: (2, 96, 8)}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, ", by fp8: it has quantization_config"),
        (
            {"text_config": {"quantization_config": {"quant_method": "awq"}}},
            ", by awq: it has text_config.quantization_config",
        ),
        (
            {"thinker_config": {"text_config": {"quantization_config": {"bits": 4}}}},
            ": it has thinker_config.text_config.quantization_config",
        ),
        ({"compression_config": {"format": "dense"}}, ": it has compression_config"),
    ],
)
def test_a_configuration_is_refused_by_its_key(
    config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        read(write(tmp_path / "c", PLAIN, **config))
    assert caught.value.what == f"is quantized already{said}"
    assert caught.value.where.endswith("config.json")


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json"])
def test_a_file_of_a_quantizer_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "c", PLAIN)
    (path / name).write_text("{}")
    with pytest.raises(UserError, match=f"is quantized already.*: {name} lies beside"):
        read(path)


@pytest.mark.parametrize(
    "tensors",
    [
        {WEIGHT: ("F64", [4, 4])},
        {"embeddings.position_ids": ("I64", [1, 512])},
        {"embeddings.position_ids": ("I32", [2, 512])},
        {"encoder.layer.0.attn.relative_position_index": ("I64", [49, 49])},
        {"encoder.layer.0.attn.relative_position_index": ("I32", [49, 49])},
        {"h.0.attn.bias": ("U8", [1, 1, 64, 64]), "h.0.attn.masked_bias": ("F32", [])},
        {"layers.0.attention.bias": ("BOOL", [1, 1, 64, 64])},
        {"h.0.attn.causal_mask": ("BOOL", [1, 1, 64, 64])},
        {"norm1.num_batches_tracked": ("I64", [])},
        {"model.layers.0.mlp.gate.tid2eid": ("I64", [512, 2])},
        {"rotary_emb.inv_freq": ("F32", [8]), "rope.freqs_cis": ("C64", [8, 8])},
        {"model.vision.layer_scale": ("F32", [16]), "logit_scale": ("F32", [])},
        {"model.layers.0.self_attn.k_scale": ("F32", [])},
    ],
    ids=lambda tensors: next(iter(tensors)),
)
def test_harmless_tensors_are_taken(tensors: Tensors, tmp_path: Path) -> None:
    path = write(tmp_path / "c", PLAIN | tensors, quantization_config=None)
    assert read(path) is None
    assert shapes(path).keys() == (PLAIN | tensors).keys()
