from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from qsens.numerics.integers import Integer, fake_integer
from tests.numerics import oracle


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


@pytest.mark.parametrize(
    ("bits", "narrow", "lowest", "largest"),
    [(8, False, -128, 127), (8, True, -127, 127), (4, False, -8, 7), (4, True, -7, 7)],
)
def test_range(bits, narrow, lowest, largest):
    element = Integer(bits, narrow)
    assert (element.lowest, element.largest) == (lowest, largest)
    wide = row(-1e30, -1e3, 1e3, 1e30)
    got = fake_integer(wide, row(largest), element).tolist()
    assert got == [[lowest, lowest, largest, largest]]


def test_ties_go_to_even():
    x = row(0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 6.5, 7.5)
    assert fake_integer(x, row(7), Integer(4)).tolist() == [[0, 2, 2, 4, 0, -2, -2, 6, 7]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_against_fractions(bits):
    largest = 2 ** (bits - 1) - 1
    step = Fraction(1, 32)  # a power of two: no operation rounds but the one to integers
    numerators = np.random.default_rng(bits).integers(-60 * largest, 60 * largest, 500)
    values = [Fraction(int(n), 64 * 32) for n in numerators]
    expected = [float(min(max(round(v / step), -largest - 1), largest) * step) for v in values]
    got = fake_integer(row(*map(float, values)), row(float(largest * step)), Integer(bits))
    assert got[0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "narrow"), [(8, False), (8, True), (4, False)])
def test_against_numpy(dtype, bits, narrow):
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(bits)).to(dtype)
    amax = x.abs().amax(-1, keepdim=True).float()
    amax[:8] *= 0.5
    expected = oracle.integers(x.float().numpy(), amax.numpy(), bits, narrow=narrow)
    got = fake_integer(x, amax, Integer(bits, narrow))
    assert got.dtype == dtype
    assert torch.equal(got, torch.from_numpy(expected).to(dtype))


def test_half_a_step_is_the_largest_error_within_amax():
    x = torch.randn(1, 5000, generator=torch.Generator().manual_seed(9))
    amax = x.abs().amax().reshape(1, 1)
    got = fake_integer(x, amax, Integer(8))
    assert (got - x).abs().max() <= amax.double() / 127 / 2 * (1 + 1e-6)


def test_amax_below_half_precision_gives_zeros():
    eps = np.float32(2.0**-24)
    below = float(np.nextafter(eps, np.float32(0)))
    for amax, zeros in ((0.0, True), (below, True), (float(eps), False)):
        got = fake_integer(row(1.0, -1.0, amax), row(amax), Integer(8))
        assert (got == 0).all() == zeros
