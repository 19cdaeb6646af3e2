from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qsens.numerics.scales import abs_max, e8m0, nvfp4
from tests.numerics import oracle

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dims", [None, (0,), (-1,), (0, 2), (1, 2), ()])
def test_abs_max(dtype, dims):
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    reference = np.abs(x.double().numpy())
    expected = reference.max() if dims is None else reference.max(dims, keepdims=True)
    got = abs_max(x, dims)
    assert got.dtype == dtype
    assert got.shape == np.shape(expected)
    assert (got.double().numpy() == expected).all()


def test_abs_max_is_never_negative_and_keeps_nan_and_infinity():
    x = torch.tensor([[-0.0, -0.0], [1.0, NAN], [-INF, 2.0], [INF, NAN]])
    got = abs_max(x, (-1,))
    assert math.copysign(1, got[0]) == 1
    assert got[2].item() == INF
    assert got.isnan().flatten().tolist() == [False, True, False, True]


@pytest.mark.parametrize("largest", [6.0, 28.0, 448.0, 127.0])
def test_e8m0_is_the_ceiling_of_the_exponent(largest):
    draw = np.random.default_rng(2)
    random = draw.lognormal(0, 20, 3000).astype(np.float32)
    powers = (largest * 2.0 ** np.arange(-100, 100)).astype(np.float32)
    powers = powers[np.isfinite(powers)]
    below, above = (np.nextafter(powers, np.float32(to)) for to in (0, INF))
    if largest == 127:  # the product with the reciprocal hides one unit in the last place
        above = np.nextafter(above, np.float32(INF))
    amax = np.concatenate([random, powers, below, above])
    multiplier, scale = e8m0(torch.from_numpy(amax), largest)
    for top, up, down in zip(amax, multiplier.tolist(), scale.tolist(), strict=True):
        mantissa, exponent = math.frexp(down)
        assert mantissa == 0.5
        assert exponent - 1 == oracle.mx_exponent(float(top), largest)
        assert up * down == 1


def test_e8m0_is_not_the_floor_of_the_microscaling_text():
    _, scale = e8m0(torch.tensor([4.0, 6.0, 6.5, 7.9]), 6.0)
    assert scale.tolist() == [1, 1, 2, 2]  # floor(log2(amax)) - 2 gives 1 throughout


def test_e8m0_flushes_quotients_below_the_smallest_normal():
    edge = 6 * 2.0**-126
    amax = torch.tensor([0.0, 1e-45, 1e-40, edge * 0.999, edge, edge * 1.001])
    multiplier, scale = e8m0(amax, 6.0)
    assert scale.tolist() == [0, 0, 0, 0, 2.0**-126, 2.0**-125]
    assert multiplier.tolist() == [0, 0, 0, 0, 2.0**126, 2.0**125]


def test_e8m0_of_the_largest_float():
    top = torch.tensor([torch.finfo(torch.float32).max])
    assert e8m0(top, 6.0)[1].item() == 2.0**126
    assert e8m0(top, 448.0)[1].item() == 2.0**120


@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_is_not_finite_makes_a_scale_nan(bad):
    assert e8m0(torch.tensor([1.0, bad]), 6.0)[1].isnan().tolist() == [False, True]
    block = torch.tensor([1.0, bad])
    for part in nvfp4(block, torch.tensor(1.0)):
        assert part.isnan().tolist() == [False, True]
    multiplier, scale = nvfp4(torch.tensor([1.0, 0.0]), torch.tensor(bad))
    assert not ((torch.ones(2) * multiplier).isfinite() & scale.isfinite()).any()


def test_nvfp4_by_hand():
    # amax = 2688 makes g = 1: the scale is E4M3's nearest to block_amax / 6.
    block = torch.tensor([6.0, 6 * 17.0, 6 * 19.0, 2688.0, 5000.0, 6 * 2.0**-9, 0.0])
    _, scale = nvfp4(block, torch.tensor(2688.0))
    assert scale.tolist() == [1, 16, 20, 448, 448, 2.0**-9, 1]


def test_nvfp4_small_scales_count_as_one():
    _, scale = nvfp4(torch.tensor([6e-6, 5e-5, 6.1e-5]), torch.tensor(6.1e-5))
    assert scale[0] == 1
    assert scale[1] == 1
    assert scale[2] == pytest.approx(6.1e-5 / 6, rel=1e-6)
    for amax in (0.0, 1e-45, 1e-38):
        multiplier, scale = nvfp4(torch.tensor([0.0, amax]), torch.tensor(amax))
        assert scale.tolist() == [1, 1]
        assert multiplier.tolist() == [1, 1]
