"""Formats of compressed-tensors: its own scales and codes, those of two versions of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qsens.numerics import compute_amax, fake_quantize, supports
from qsens.numerics.compressed_tensors import Scales, codes, grouped, scales_of, ungrouped
from qsens.numerics.formats import format_of
from tests.numerics.compressed_cases import WEIGHTS, by_theirs, tensor

OLDER = Path(__file__).parent / "compressed_tensors_0_17.safetensors"


def cfg_of(name):
    return {**WEIGHTS[name][0], "reference": "compressed-tensors"}


def shaped(values, fmt, x):
    return ungrouped(values, fmt, x.shape)


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_installed_version_gives_the_same_scales_and_codes(name):
    pytest.importorskip("compressed_tensors")
    x, cfg = tensor(name), cfg_of(name)
    fmt, theirs = format_of(cfg), by_theirs(tensor(name), WEIGHTS[name][1])
    ours = scales_of(x, fmt)
    assert torch.equal(ours.scale.flatten(), theirs["scale"].flatten())
    if "over" in theirs:
        assert torch.equal(ours.over.reshape(1), theirs["over"])
    if not fmt.symmetric:
        assert torch.equal(ours.zero_point.flatten(), theirs["zero_point"].flatten())
        assert ours.zero_point.unique().numel() > 3
    assert torch.equal(shaped(codes(x, fmt, ours), fmt, x), theirs["codes"])


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_faked_is_what_the_codes_stand_for(name):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    x, args = tensor(name), WEIGHTS[name][1]
    theirs = by_theirs(tensor(name), args)
    expected = dequantize(
        theirs["codes"],
        theirs["scale"],
        None if args.get("symmetric", True) else theirs["zero_point"],
        QuantizationArgs(dynamic=False, **{"symmetric": True, **args}),
        global_scale=theirs.get("over"),
    )
    assert torch.equal(fake_quantize(x, cfg_of(name)), expected)


def test_the_version_that_a_server_reads_with_gives_the_same_codes():
    held = load_file(OLDER)
    names = {key.rpartition(".")[0] for key in held}
    assert len(names) >= len(WEIGHTS) - 1
    for name in names:
        x, fmt = tensor(name), format_of(cfg_of(name))
        scale = held[f"{name}.scale"].reshape(-1, 1)
        zero, over = held.get(f"{name}.zero_point"), held.get(f"{name}.over")
        given = Scales(
            scale,
            None if zero is None else zero.float().reshape(-1, 1),
            None if over is None else over.reshape(()),
        )
        assert torch.equal(shaped(codes(x, fmt, given), fmt, x), held[f"{name}.codes"].float()), (
            name
        )


def test_integers_land_on_half_of_their_range():
    weight = torch.tensor([[-7.5, 3.75, 1.95, 0.0]])
    made = fake_quantize(weight, {"num_bits": 4, "axis": 0, "reference": "compressed-tensors"})
    # Steps of 7.5 / 7.5: -7.5 rounds to -8, the even one.
    assert torch.equal(made, torch.tensor([[-8.0, 4.0, 2.0, 0.0]]))


def test_scales_of_weights_are_stored_in_the_weights_data_type():
    weight = tensor("int4 group32").bfloat16()
    fmt = format_of(cfg_of("int4 group32"))
    scale = scales_of(weight, fmt).scale
    assert torch.equal(scale, scale.bfloat16().float())
    parts = weight.float().reshape(-1, 32).abs().amax(-1, keepdim=True) / 7.5
    nonzero = parts > 0
    assert torch.equal(scale[nonzero], parts[nonzero].bfloat16().float())
    # One scale for all is float32.
    whole = scales_of(weight, format_of(cfg_of("fp8 tensor"))).scale
    assert torch.equal(whole, (weight.float().abs().max() / 448).reshape(1, 1))


def test_a_token_and_a_block_of_it_have_their_own_scales():
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0))
    x[0, 1] *= 100
    token = {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}
    blocks = {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: 128}}
    by_token = fake_quantize(x, {**token, "reference": "compressed-tensors"})
    step = x.abs().amax(-1, keepdim=True) / 127.5
    assert torch.equal(by_token, (x / step).clamp(-128, 127).round() * step)
    by_block = fake_quantize(x, {**blocks, "reference": "compressed-tensors"})
    parts = x.reshape(2, 5, 2, 128)
    step = parts.abs().amax(-1, keepdim=True) / 448
    expected = (parts / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step
    assert torch.equal(by_block, expected.reshape(x.shape))


def test_a_calibrated_scale_saturates_and_keeps_what_is_not_finite():
    x = torch.tensor([1.0, 3.0, -9.0, float("inf"), float("nan")])
    cfg = {"num_bits": 8, "axis": None, "reference": "compressed-tensors"}
    made = fake_quantize(x, cfg, torch.tensor(2.0))
    step = torch.tensor(2.0) / 127.5
    assert torch.equal(made[:3], torch.tensor([64.0, 127.0, -128.0]) * step)
    assert made[3:].isnan().all()


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_shares_a_scale_with_no_number_is_none(name):
    x = tensor(name)
    x[8, 8] = float("nan")
    made = fake_quantize(x, cfg_of(name))
    fmt = format_of(cfg_of(name))
    shares = grouped(x, fmt).isnan().any(-1, keepdim=True)
    if fmt.has_one_scale(2):
        shares = torch.ones_like(shares)
    lost = shaped(shares.expand(-1, grouped(x, fmt).shape[-1]), fmt, x)
    assert torch.equal(made.isnan(), lost)


@pytest.mark.parametrize("shape", [(130, 200), (128, 128), (1, 5), (257, 129)], ids=str)
def test_blocks_of_a_matrix_that_do_not_divide_are_smaller(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    fmt = format_of(cfg_of("fp8 blocks"))
    assert torch.equal(shaped(grouped(x, fmt), fmt, x), x)
    made = fake_quantize(x, cfg_of("fp8 blocks"))
    for top in range(0, shape[0], 128):
        for left in range(0, shape[1], 128):
            tile = x[top : top + 128, left : left + 128]
            step = tile.abs().max() / 448
            expected = (tile / step).to(torch.float8_e4m3fn).float() * step
            assert torch.equal(made[top : top + 128, left : left + 128], expected)


@pytest.mark.parametrize(
    "cfg",
    [
        {"num_bits": (2, 1), "axis": 0},
        {"num_bits": (3, 2), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
        {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (8, 0)}},
        {"num_bits": 8, "axis": 1},
        {"num_bits": (4, 3), "axis": 0, "symmetric": False},
        {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}, "symmetric": False},
        {"num_bits": 8, "block_sizes": {-2: 16}},
    ],
)
def test_what_it_does_not_define_is_refused(cfg):
    assert not supports({**cfg, "reference": "compressed-tensors"})


def test_zero_points_are_not_modelopts():
    assert not supports({"num_bits": 4, "axis": 0, "symmetric": False})


def test_only_one_scale_for_all_is_calibrated():
    x = torch.tensor([[1.0, -3.0], [2.0, 0.5]])
    assert compute_amax(x, cfg_of("fp8 tensor")) == 3.0
    assert compute_amax(x, cfg_of("nvfp4")) == 3.0
    assert compute_amax(x, cfg_of("int8 channel")) is None
