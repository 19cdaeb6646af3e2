"""Equality with ModelOpt's quantizers where they have a CPU path: integers, E4M3, calibration."""

from __future__ import annotations

import pytest
import torch

from qsens.numerics import compute_amax, fake_quantize
from tests.numerics import oracle

pytest.importorskip("modelopt")

CASES = {
    "int8_tensor": {"num_bits": 8, "axis": None},
    "int8_channel": {"num_bits": 8, "axis": 0},
    "int8_narrow": {"num_bits": 8, "axis": 0, "narrow_range": True},
    "int8_group64": {"num_bits": 8, "block_sizes": {-1: 64, "type": "static"}},
    "int4_group128": {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}},
    "int4_rest_of_row": {"num_bits": 4, "block_sizes": {-1: None}},
    "int4_token": {"num_bits": 4, "type": "dynamic", "block_sizes": {-1: None}},
    "int8_token": {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}},
    "fp8_tensor": {"num_bits": (4, 3), "axis": None},
    "fp8_channel": {"num_bits": (4, 3), "axis": 0},
    "fp8_group64": {"num_bits": (4, 3), "block_sizes": {-1: 64, "type": "static"}},
    "fp8_token": {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantizer(cfg):
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    return TensorQuantizer(QuantizerAttributeConfig(**cfg))


def calibrate(q, x):
    q.disable_quant()
    q.enable_calib()
    q(x)
    q.load_calib_amax()
    q.disable_calib()
    q.enable_quant()


def tensor(dtype, *shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(11))
    x.reshape(-1, shape[-1])[0] = 0
    x.reshape(-1, shape[-1])[1] *= 1e-9
    x.reshape(-1, shape[-1])[2, 3] = 500
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(12, 256), (12, 80), (2, 6, 64)])
@pytest.mark.parametrize("name", CASES)
def test_quantizers(name, shape, dtype):
    x, cfg = tensor(dtype, *shape), CASES[name]
    q = quantizer(cfg)
    amax = None
    if cfg.get("type") == "dynamic":
        assert compute_amax(x, cfg) is None
    else:
        calibrate(q, x)
        amax = compute_amax(x, cfg)
        assert torch.equal(amax, q.amax)
        assert amax.dtype == q.amax.dtype
    got, expected = fake_quantize(x, cfg, amax), q(x)
    if isinstance(cfg["num_bits"], int):
        assert torch.equal(got, expected)
        return
    # On a CPU ModelOpt's scale is 1 / amax * 448: where a value lies at a tie, the neighbour.
    wide, theirs = got.double(), expected.double()
    step = torch.maximum(wide.abs(), theirs.abs()) / 8 * (1 + 2**-6)
    assert ((wide - theirs).abs() <= step).all()
    unlike = (wide - theirs).abs() > theirs.abs() * torch.finfo(dtype).eps * 2
    assert unlike.float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_is_theirs_where_both_scales_are_the_same_number(dtype):
    x = tensor(dtype, 512, 32)
    amax = x.abs().amax(-1, keepdim=True).float()
    same = (448 * amax.reciprocal() == torch.full_like(amax, 448) / amax).flatten()
    assert same.sum() > 256
    q = quantizer(CASES["fp8_channel"])
    q.amax = amax[same]
    got = fake_quantize(x[same], CASES["fp8_channel"], amax[same])
    assert torch.equal(got, q(x[same]))


def test_an_input_clipped_by_calibration():
    x = tensor(torch.float32, 12, 256)
    q = quantizer(CASES["int8_channel"])
    calibrate(q, x)
    q.amax = q.amax * 0.25
    got = fake_quantize(x, CASES["int8_channel"], q.amax)
    assert torch.equal(got, q(x))
    assert (got / q.amax)[3:].min() == pytest.approx(-128 / 127)
    assert (got == torch.from_numpy(oracle.integers(x.numpy(), q.amax.numpy(), 8))).all()
