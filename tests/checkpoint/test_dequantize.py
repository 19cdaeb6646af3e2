"""Checkpoints that are quantized already: their scores are those of their dequantized twins.

The twins' weights are worked out here, number by number or by another library's formula.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file

from qsens.checkpoint import quantized
from qsens.checkpoint.dequantize import lazy_tensors
from qsens.checkpoint.files import find_weights
from qsens.checkpoint.loading import load_model
from qsens.checkpoint.quantized import read_quantization
from qsens.checkpoint.twin import default_settings
from qsens.config import ModelConfig
from qsens.errors import UserError
from tests.checkpoint.hostile import Found, plan_of, scores, sweep, write_captions
from tests.checkpoint.tiny_families import CAPTIONS, WORDS, configuration, save

WEIGHTS = "model.safetensors"
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
Tensors = dict[str, torch.Tensor]
Codes = tuple[Tensors, torch.Tensor]


def nibble(code: int) -> float:
    return -E2M1[code - 8] if code > 7 else E2M1[code]


def fp8_blocks(name: str, weight: torch.Tensor) -> Codes:
    """Blocks of 24 x 20, which divide no weight of the tiny model."""
    rows, columns = weight.shape
    scale = torch.rand(-(-rows // 24), -(-columns // 20)) * 0.01 + 0.001
    spread = torch.tensor(
        [[float(scale[i // 24, j // 20]) for j in range(columns)] for i in range(rows)]
    )
    codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}, codes.float() * spread


def fp8_tensor(name: str, weight: torch.Tensor) -> Codes:
    """ModelOpt's and Mistral's: one number; that of the inputs does not matter."""
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    module = name.removesuffix(".weight")
    beside = {f"{name}_scale": scale, f"{module}.input_scale": torch.tensor(0.1)}
    return {name: codes, **beside}, codes.float() * scale


def fp8_channels(name: str, weight: torch.Tensor) -> Codes:
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale": scale}, codes.float() * scale


def nvfp4(name: str, weight: torch.Tensor) -> Codes:
    rows, columns = weight.shape
    codes = torch.randint(0, 16, (rows, columns))
    scale = (torch.rand(rows, columns // 16) * 3 + 0.5).to(torch.float8_e4m3fn)
    whole = torch.tensor(2.0**-8)
    twin = torch.tensor(
        [
            [
                nibble(int(codes[i, j])) * float(scale[i, j // 16]) * float(whole)
                for j in range(columns)
            ]
            for i in range(rows)
        ]
    )
    packed = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    return {name: packed, f"{name}_scale": scale, f"{name}_scale_2": whole}, twin


def packed_int4(name: str, weight: torch.Tensor) -> Codes:
    """compressed-tensors packs; codes times scales are worked out here."""
    module = name.removesuffix(".weight")
    scale = (weight.unflatten(1, (-1, 16)).abs().amax(2) / 7).to(torch.float32)
    spread = scale.repeat_interleave(16, 1)
    codes = (weight / spread).round().clamp(-8, 7)
    scheme = QuantizationScheme.model_validate(INT4["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    state = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    return {f"{module}.{part}": value for part, value in state.items()}, codes * spread


def int8_channels(name: str, weight: torch.Tensor) -> Codes:
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return {name: codes, f"{name}_scale": scale}, codes.float() * scale


INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 16,
            },
        }
    },
}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["re:.*proj"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        }
    },
}
KINDS: dict[str, tuple[Callable[[str, torch.Tensor], Codes], dict[str, Any], str]] = {
    "fp8-blocks": (
        fp8_blocks,
        {"quant_method": "fp8", "weight_block_size": [24, 20], "activation_scheme": "dynamic"},
        "FP8 in blocks of 24x20",
    ),
    "fp8-tensor": (fp8_tensor, {"quant_method": "modelopt"}, "FP8 with a scale a tensor"),
    "fp8-channels": (fp8_channels, {"quant_method": "fbgemm_fp8"}, "FP8 with a scale a channel"),
    "nvfp4": (nvfp4, {"quant_method": "modelopt"}, "NVFP4"),
    "packed-int4": (packed_int4, INT4, "compressed-tensors, pack-quantized"),
    "int8-channels": (int8_channels, INT8, "compressed-tensors, int-quantized"),
}


def both(checkpoint: Path, twin: Path, quantize: Any, settings: dict[str, Any]) -> int:
    """Quantize every projection of a checkpoint, and write the twin; return how many those are."""
    held = load_file(checkpoint / WEIGHTS)
    torch.manual_seed(3)
    codes, plain = {}, {}
    for name, weight in held.items():
        codes[name] = plain[name] = weight
        if weight.ndim == 2 and "_proj" in name:
            del codes[name]
            parts, plain[name] = quantize(name, weight)
            codes |= parts
    save_file(codes, checkpoint / WEIGHTS, metadata={"format": "pt"})
    save_file(plain, twin / WEIGHTS, metadata={"format": "pt"})
    write_settings(checkpoint, settings)
    return sum(weight.ndim == 2 and "_proj" in name for name, weight in held.items())


def write_settings(checkpoint: Path, settings: dict[str, Any]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def swept(checkpoint: Path, root: Path, *overrides: str) -> Found:
    lines = write_captions(root / "lines", small=CAPTIONS)
    return sweep(
        checkpoint,
        root / f"results-{checkpoint.name}",
        lines,
        "dataset.files.small=captions_small.txt",
        "model.dtype=float32",
        *overrides,
    )


def check(checkpoint: Path, twin: Path, root: Path, said: str) -> None:
    """Each group's score, sample by sample, is the twin's; and what was done is said."""
    found, expected = swept(checkpoint, root), swept(twin, root)
    assert scores(found.only()) == scores(expected.only())
    assert len(scores(found.only())) > 4
    (own,), (others,) = found.states.values(), expected.states.values()
    assert own.keys() == others.keys()
    assert all(torch.equal(own[name], others[name]) for name in own)
    notices = found.only().notices
    assert [notice for notice in notices if "quantized already" in notice] == [said]
    assert not any("are not used" in notice for notice in notices)
    directory = Path(found.published["cells"][0]["manifest"]).parent
    for suffix in ("md", "html"):
        assert said in (directory / f"per-layer-sensitivity.{suffix}").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", ["Llama", "Qwen3-MoE", "Qwen3-VL"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_dequantized_twin(kind: str, family: str, tmp_path: Path) -> None:
    quantize, settings, said = KINDS[kind]
    checkpoint, twin = (
        save(configuration(family, tied=False), tmp_path / name) for name in ("codes", "twin")
    )
    count = both(checkpoint, twin, quantize, settings)
    notice = (
        f"the checkpoint is quantized already, {count} weights of it ({said}): they are "
        "dequantized to float32, and scores say what quantizing them once more would do"
    )
    check(checkpoint, twin, tmp_path, notice)


def test_mxfp4_experts_are_those_of_the_dequantized_twin(tmp_path: Path) -> None:
    """GPT-OSS's own layout: blocks of 32 along the inputs, and the weight lies transposed."""
    settings = default_settings("gpt_oss")
    settings.hidden_size, settings.intermediate_size, settings.vocab_size = 64, 32, len(WORDS)
    checkpoint, twin = (save(settings, tmp_path / name) for name in ("codes", "twin"))
    held = load_file(checkpoint / WEIGHTS)
    torch.manual_seed(3)
    codes, plain, count = {}, {}, 0
    for name, weight in held.items():
        codes[name] = plain[name] = weight
        if weight.ndim < 3:
            continue
        count += 1
        experts, inputs, outputs = weight.shape
        fours = torch.randint(0, 16, (experts, outputs, inputs))
        exponents = torch.randint(119, 124, (experts, outputs, inputs // 32))
        values = torch.tensor([nibble(code) for code in fours.flatten().tolist()])
        scale = 2.0 ** (exponents.repeat_interleave(32, 2) - 127)
        plain[name] = (values.reshape(fours.shape) * scale).mT.contiguous()
        packed = (fours[..., 0::2] + 16 * fours[..., 1::2]).to(torch.uint8)
        codes |= {
            f"{name}_blocks": packed.unflatten(2, (-1, 16)),
            f"{name}_scales": exponents.to(torch.uint8),
        }
        del codes[name]
    save_file(codes, checkpoint / WEIGHTS, metadata={"format": "pt"})
    save_file(plain, twin / WEIGHTS, metadata={"format": "pt"})
    write_settings(checkpoint, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    check(
        checkpoint,
        twin,
        tmp_path,
        f"the checkpoint is quantized already, {count} weights of it (MXFP4): they are dequantized "
        "to float32, and scores say what quantizing them once more would do",
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once_to_what_the_model_file_says(dtype: str, tmp_path: Path) -> None:
    checkpoint, twin = (
        save(configuration("Llama", tied=True), tmp_path / name) for name in ("codes", "twin")
    )
    both(checkpoint, twin, *KINDS["fp8-blocks"][:2])
    model = load_model(ModelConfig(path=checkpoint, dtype=dtype), torch.device("cpu"))
    held = load_file(twin / WEIGHTS)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, held[name].to(getattr(torch, dtype))), name


@pytest.mark.parametrize(
    ("scale", "spread"),
    [
        (torch.tensor([[[[0.5]], [[0.25]]]]).reshape(1, 1, 2, 1), [[0.5, 0.25]]),
        (torch.tensor([[126, 125]], dtype=torch.uint8).view(torch.float8_e8m0fnu), [[0.5, 0.25]]),
        (torch.tensor([[126, 125]], dtype=torch.uint8), [[0.5, 0.25]]),
        (torch.tensor([0.5, 0.25]), [[0.5], [0.25]]),
        (torch.tensor([[0.5]]), [[0.5]]),
    ],
    ids=["modelopt-blocks", "e8m0", "bytes", "one a row", "one"],
)
def test_scales_of_other_shapes_and_types(
    scale: torch.Tensor, spread: list[list[float]], tmp_path: Path
) -> None:
    codes = torch.randn(2, 4).to(torch.float8_e4m3fn)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({name: codes, f"{name}_scale": scale}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text("{}")
    write_settings(tmp_path, {"quant_method": "modelopt"})
    tensors = find_weights(tmp_path).tensors
    quantization = read_quantization(tmp_path, tensors)
    assert quantization is not None
    (found,) = lazy_tensors(tensors, quantization, torch.float32).values()
    columns = torch.tensor(spread).repeat_interleave(4 // len(spread[0]), 1)
    assert torch.equal(found[...], codes.float() * columns)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save(configuration("Llama", tied=True), tmp_path / "codes")
    twin = save(configuration("Llama", tied=True), tmp_path / "twin")
    both(checkpoint, twin, *KINDS["packed-int4"][:2])
    monkeypatch.setattr(quantized, "_is_missing", lambda package: package == "compressed_tensors")
    with pytest.raises(UserError, match="compressed-tensors is not installed") as caught:
        plan_of(checkpoint, tmp_path / "results")
    assert 'pip install "qsens[compressed-tensors]"' in caught.value.remedy
