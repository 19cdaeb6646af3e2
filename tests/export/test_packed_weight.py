"""Packed weights, unpacked again by compressed-tensors: what was fake-quantized, bit for bit."""

from __future__ import annotations

import pytest
import torch

from qsens.config import PairConfig, load_sweep
from qsens.numerics import fake_quantize

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor

from qsens.export.packed_weight import pack, scheme_of

SERVING = {
    f"{pair.name}-{granularity.name}": pair.with_granularity(granularity)
    for pair, granularity in load_sweep("serving").config.formats
}
# What a weight of 192 x 256 takes in each format: names, data types and shapes.
CODES = torch.int32, (192, 256 * 4 // 32)
EIGHT = torch.int32, (192, 256 * 8 // 32)
NIBBLES = torch.uint8, (192, 128)
SHAPE = torch.int64, (2,)
ONE = torch.float32, (1,)
EXPECTED = {
    "wfp8_afp8-ct_token": {
        "weight": (torch.float8_e4m3fn, (192, 256)),
        "weight_scale": (torch.bfloat16, (192, 1)),
    },
    "wfp8_afp8-ct_block128": {
        "weight": (torch.float8_e4m3fn, (192, 256)),
        "weight_scale": (torch.bfloat16, (2, 2)),
    },
    "wfp8_afp8-ct": {
        "weight": (torch.float8_e4m3fn, (192, 256)),
        "weight_scale": ONE,
        "input_scale": ONE,
    },
    "wint8_aint8-ct": {
        "weight": (torch.int8, (192, 256)),
        "weight_scale": (torch.bfloat16, (192, 1)),
        "input_scale": ONE,
    },
    "wmxfp8_amxfp8-ct": {
        "weight": (torch.float8_e4m3fn, (192, 256)),
        "weight_scale": (torch.uint8, (192, 8)),
    },
    "wint8_afp16-ct_group128": {
        "weight_packed": EIGHT,
        "weight_scale": (torch.bfloat16, (192, 2)),
        "weight_shape": SHAPE,
    },
    "wnvfp4_anvfp4-ct": {
        "weight_packed": NIBBLES,
        "weight_scale": (torch.float8_e4m3fn, (192, 16)),
        "weight_global_scale": ONE,
        "input_global_scale": ONE,
    },
    "wfp4_afp16-ct": {"weight_packed": NIBBLES, "weight_scale": (torch.uint8, (192, 8))},
    "wint4_afp16-ct_group128_asym": {
        "weight_packed": CODES,
        "weight_scale": (torch.bfloat16, (192, 2)),
        "weight_zero_point": (torch.int32, (192 * 4 // 32, 2)),
        "weight_shape": SHAPE,
    },
}


def weight(dtype: torch.dtype) -> torch.Tensor:
    made = torch.randn(192, 256, generator=torch.Generator().manual_seed(3)) * 0.02
    made[::5, ::13] *= 30
    return made.to(dtype)


def unpacked(packed: dict[str, torch.Tensor], pair: PairConfig) -> torch.Tensor:
    scheme = scheme_of(pair)
    found = BaseCompressor.get_value_from_registry(scheme.format).decompress(packed, scheme)
    result: torch.Tensor = found["weight"]
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SERVING)
def test_what_is_unpacked_is_what_was_scored(name: str, dtype: torch.dtype) -> None:
    pair, given = SERVING[name], weight(dtype)
    expected = fake_quantize(given, pair.weight_quantizer.cfg())
    found = unpacked(pack(given, pair, inputs=torch.tensor(3.0)), pair)
    # compressed-tensors unpacks FP4 in bfloat16, whatever the model is.
    rounded = dtype if "fp4" not in name else torch.bfloat16
    assert torch.equal(found.to(rounded), expected.to(rounded))


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_stored(name: str) -> None:
    packed = pack(weight(torch.bfloat16), SERVING[name], inputs=torch.tensor(3.0))
    assert {part: (each.dtype, tuple(each.shape)) for part, each in packed.items()} == EXPECTED[
        name
    ]


def test_scales_of_inputs_are_those_of_their_amax() -> None:
    amax, given = torch.tensor(3.5), weight(torch.bfloat16)
    found = {
        name: pack(given, SERVING[name], inputs=amax)
        for name in ("wfp8_afp8-ct", "wint8_aint8-ct", "wnvfp4_anvfp4-ct")
    }
    assert float(found["wfp8_afp8-ct"]["input_scale"]) == 3.5 / 448
    assert float(found["wint8_aint8-ct"]["input_scale"]) == pytest.approx(3.5 / 127, rel=1e-7)
    over = float(found["wnvfp4_anvfp4-ct"]["input_global_scale"])
    assert over == pytest.approx(448 * 6 / 3.5, rel=1e-6)


def test_fused_weights_share_a_scale() -> None:
    given, amax = weight(torch.bfloat16), torch.tensor(7.0)
    for name, part, value in (
        ("wfp8_afp8-ct", "weight_scale", 7 / 448),
        ("wnvfp4_afp16-ct", "weight_global_scale", 448 * 6 / 7),
    ):
        pair = SERVING[name]
        packed = pack(given, pair, amax=amax, inputs=torch.tensor(1.0))
        assert float(packed[part]) == pytest.approx(value, rel=1e-7)
        expected = fake_quantize(given, pair.weight_quantizer.cfg(), amax)
        assert torch.equal(unpacked(packed, pair).bfloat16(), expected)
