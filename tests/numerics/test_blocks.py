from __future__ import annotations

import pytest
import torch

from qsens.numerics.blocks import fake_mx, fake_nvfp4, from_blocks, to_blocks
from qsens.numerics.floats import E2M1, E3M2, E4M3
from qsens.numerics.integers import Integer
from tests.numerics import oracle

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ELEMENTS = {
    "mxfp4": (E2M1, oracle.E2M1),
    "mxfp6": (E3M2, oracle.E3M2),
    "mxfp8": (E4M3, oracle.E4M3),
    "mxint8": (Integer(8), torch.arange(128).double().numpy()),
}


def hostile(dtype: torch.dtype, columns: int = 96) -> torch.Tensor:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(12, columns, generator=draw)
    x[0] = 0
    x[1, :32] = 0
    x[2, 5] = 3e4
    x[3] *= 1e-5
    x[4] *= 1e3
    x[5] = torch.randint(-24, 25, (columns,), generator=draw) * 0.25
    x[6] = 6.0
    x[7] = -448.0
    x[8] = torch.exp2(torch.randint(-10, 10, (columns,), generator=draw).float())
    x[9] = torch.finfo(dtype).smallest_normal / 2
    return x.to(dtype)


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64])
def test_blocks_and_back(columns):
    x = torch.randn(2, 3, columns)
    blocks = to_blocks(x, 32)
    assert blocks.shape == (6 * -(-columns // 32), 32)
    assert torch.equal(from_blocks(blocks, x.shape), x)
    missing = -columns % 32
    if missing:
        assert (blocks.reshape(6, -1)[:, columns:] == 0).all()
        assert from_blocks(blocks, x.shape).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [96, 80, 7])
@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_against_search(name, columns, dtype):
    element, points = ELEMENTS[name]
    x = hostile(dtype, columns)
    if dtype != torch.float16:
        x[9] = 0  # flushed: see the next test
    expected = torch.from_numpy(oracle.mx(x.double().numpy(), points)).to(dtype)
    assert torch.equal(fake_mx(x, element, 32), expected)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_flushes_blocks_of_subnormals(name, dtype):
    element, points = ELEMENTS[name]
    x = torch.full((1, 32), 2.0**-127, dtype=dtype)
    assert (fake_mx(x, element, 32) == 0).all()
    x[0, 0] = points[-1] * 2.0**-126  # the smallest maximum whose block is not flushed
    assert fake_mx(x, element, 32)[0, 0] == x[0, 0]


def test_mxfp4_by_hand():
    x = torch.zeros(1, 64)
    x[0, :5] = torch.tensor([6.0, 5.0, 2.5, -0.3, 0.25])  # scale 1
    x[0, 32:36] = torch.tensor([6.1, 5.0, 1.0, -0.5])  # scale 2
    got = fake_mx(x, E2M1, 32)[0]
    assert got[:5].tolist() == [6, 4, 2, -0.5, 0]
    assert got[32:36].tolist() == [6, 4, 1, 0]  # 2.5, 0.5 and 0.25 halves up are ties


def test_an_outlier_drowns_its_block_only():
    x = torch.ones(1, 64)
    x[0, 3] = 1e4
    got = fake_mx(x, E2M1, 32)[0]
    assert got[3] == 8192  # 4 * 2^11: 1e4 / 2048 is below 5
    assert got[:32].count_nonzero() == 1
    assert (got[32:] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [96, 80, 7])
def test_nvfp4_against_search(columns, dtype):
    x = hostile(dtype, columns)
    for amax in (x.abs().max().float(), torch.tensor(10.0)):
        expected = torch.from_numpy(oracle.nvfp4(x.float().numpy(), amax.item())).to(dtype)
        assert torch.equal(fake_nvfp4(x, amax), expected)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_makes_its_block_nan(dtype, bad):
    x = hostile(dtype)
    clean = {name: fake_mx(x, element, 32) for name, (element, _) in ELEMENTS.items()}
    clean_nvfp4 = fake_nvfp4(x, torch.tensor(10.0))
    x[3, 40] = bad
    for name, (element, _) in ELEMENTS.items():
        got = fake_mx(x, element, 32)
        assert got[3, 32:64].isnan().all()
        got[3, 32:64] = clean[name][3, 32:64]
        assert torch.equal(got, clean[name])
    got = fake_nvfp4(x, torch.tensor(10.0))
    assert got[3, 32:48].isnan().all()
    got[3, 32:48] = clean_nvfp4[3, 32:48]
    assert torch.equal(got, clean_nvfp4)
