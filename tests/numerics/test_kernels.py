"""The kernels for a GPU give the bits that plain torch gives on a CPU."""

from __future__ import annotations

import pytest
import torch

from qsens.numerics import compute_amax, fake_quantize, fake_quantize_each, kernels
from qsens.numerics.formats import format_of
from tests.numerics.test_golden import DTYPES, OURS, differing, formats, read, without_ours
from tests.numerics.test_quantize import ALL

pytestmark = pytest.mark.skipif(
    kernels.triton is None or not torch.cuda.is_available(), reason="needs a GPU and Triton"
)


@without_ours
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", formats())
def test_hostile_tensors(name, dtype):
    cfg, (golden, _) = formats()[name], read(OURS)
    for tensor in ("plain", "extreme", "odd", "batch", "conv", "broken"):
        x = golden.get(f"{dtype}/{tensor}")
        if x is not None:
            there = fake_quantize(x.cuda(), cfg).cpu()
            assert differing(there, fake_quantize(x, cfg)) == 0, tensor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(5, 4096), (3, 160), (2, 3, 2560)])
def test_shapes(name, dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    cfg = ALL[name]
    assert differing(fake_quantize(x.cuda(), cfg).cpu(), fake_quantize(x, cfg)) == 0
    amax = compute_amax(x, cfg)
    if amax is not None:
        there = fake_quantize(x.cuda(), cfg, 0.4 * amax.cuda()).cpu()
        assert differing(there, fake_quantize(x, cfg, 0.4 * amax)) == 0


@pytest.mark.parametrize("name", ALL)
def test_they_are_what_runs(name):
    x = torch.ones(4, 128, device="cuda")
    assert kernels.covers(x, format_of(ALL[name]), None)
    assert not kernels.covers(x.t(), format_of(ALL[name]), None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_stacked_tensors_are_each_alone(name, dtype):
    x = torch.randn(5, 24, 320, generator=torch.Generator().manual_seed(1))
    x = (x * torch.arange(1, 6)[:, None, None]).to(getattr(torch, dtype))
    x[3, 7, 9] = torch.inf
    there = fake_quantize_each(x.cuda(), ALL[name]).cpu()
    for one, alone in zip(there, x, strict=True):
        assert differing(one, fake_quantize(alone, ALL[name])) == 0
