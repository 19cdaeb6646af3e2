from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from qsens.numerics import floats
from tests.numerics import oracle

GRIDS = {
    "E2M1": (floats.E2M1, oracle.E2M1),
    "E3M2": (floats.E3M2, oracle.E3M2),
    "E4M3": (floats.E4M3, oracle.E4M3),
}


@pytest.fixture(params=GRIDS)
def grid(request):
    return GRIDS[request.param]


def test_code_points():
    # OCP Microscaling 1.0, table 5; OCP 8-bit floating point 1.0, table 1.
    assert oracle.E2M1.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert oracle.E3M2[[0, 1, 3, 4, 31]].tolist() == [0, 2**-4, 0.75 * 2**-2, 2**-2, 28]
    assert oracle.E4M3[[0, 1, 7, 8, 126]].tolist() == [0, 2**-9, 7 * 2**-9, 2**-6, 448]
    assert len(oracle.E4M3) == 127


def test_largest(grid):
    mine, points = grid
    assert mine.largest == points[-1]


@pytest.mark.parametrize(
    ("x", "rounded"),
    [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5, 4), (6, 6)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_e2m1_ties_go_to_even(x, rounded, dtype):
    both = torch.tensor([x, -x], dtype=dtype)
    assert floats.E2M1.round_(both).tolist() == [rounded, -rounded]


def test_every_bfloat16(grid):
    mine, points = grid
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.float().abs() <= mine.largest]
    assert len(x) > 30_000
    expected = oracle.nearest(x.double().numpy(), points)
    assert (mine.round_(x.clone()).double().numpy() == expected).all()


def test_float32_around_every_tie_and_value(grid):
    mine, points = grid
    ties = [(a + b) / 2 for a, b in itertools.pairwise(points)]
    at = np.array([*points, *ties], np.float32)
    around = np.concatenate(
        [at, np.nextafter(at, np.float32(0)), np.nextafter(at, np.float32(9e9))]
    )
    x = np.concatenate([around, -around, np.random.default_rng(1).normal(0, 2, 4000)])
    x = x.astype(np.float32)
    x = x[np.abs(x) <= points[-1]]
    got = mine.round_(torch.from_numpy(x.copy()))
    assert (got.numpy() == oracle.nearest(x, points)).all()


def test_code_points_stay(grid):
    mine, points = grid
    x = torch.tensor([*points, *-points], dtype=torch.float32)
    assert torch.equal(mine.round_(x.clone()), x)


def test_nan_stays(grid):
    mine, _ = grid
    for dtype in (torch.float32, torch.bfloat16):
        assert mine.round_(torch.tensor([float("nan"), 1.0], dtype=dtype)).isnan().tolist() == [
            True,
            False,
        ]


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float32)


@pytest.mark.parametrize(
    ("x", "rounded"),
    [
        (17, 16),  # halfway between 16 and 18
        (19, 20),  # halfway between 18 and 20
        (2.0**-10, 0),  # half the smallest subnormal
        (3 * 2.0**-10, 2.0**-8),
        (448, 448),
        (464, 448),
        (1e30, 448),
        (-500, -448),
    ],
)
def test_e4m3_with_a_scale_of_one(x, rounded):
    assert floats.fake_e4m3(one(x), one(448.0)).item() == rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_e4m3_against_search(dtype):
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(3)).mul(5).to(dtype)
    amax = x.abs().amax(-1, keepdim=True).float()
    amax[:8] *= 0.5  # saturates
    expected = torch.from_numpy(oracle.e4m3(x.float().numpy(), amax.numpy())).to(dtype)
    assert torch.equal(floats.fake_e4m3(x, amax), expected)


def test_e4m3_divides_448_rather_than_multiply_by_the_reciprocal():
    amax = torch.rand(4000, 1, generator=torch.Generator().manual_seed(4)) + 0.5
    divided = 448.0 / amax.double().numpy()
    assert (divided.astype(np.float32) != (amax.reciprocal() * 448).numpy()).sum() > 400
    x = amax * torch.tensor([17, 19, 21, 23]) / 448  # about halfway between two code points
    assert (floats.fake_e4m3(x, amax).numpy() == oracle.e4m3(x.numpy(), amax.numpy())).all()


@pytest.mark.parametrize("tiny", [0.0, 2.0**-24])
def test_e4m3_takes_a_tiny_amax_for_one(tiny):
    x = torch.tensor([[1.0, -0.5, 0.25, 0.0]])
    expected = floats.fake_e4m3(x, torch.tensor([[1.0]]))
    assert torch.equal(floats.fake_e4m3(x, torch.tensor([[tiny]])), expected)
    above = torch.tensor([[np.nextafter(np.float32(2.0**-24), np.float32(1))]])
    assert floats.fake_e4m3(x, above).max() == above
