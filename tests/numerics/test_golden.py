"""Equality with what ModelOpt's own kernels gave on a GPU; see ``make_golden.py``."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from qsens.numerics import compute_amax, fake_quantize, supports

HERE = Path(__file__).resolve().parent
OURS = HERE / "golden.safetensors"
SHARED = HERE.parents[2] / "shared" / "golden" / "modelopt_h100.safetensors"
DTYPES = ("float32", "bfloat16", "float16")

without_ours = pytest.mark.skipif(not OURS.exists(), reason=f"{OURS.name} is not there")
without_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED.name} is not there")


@cache
def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def formats() -> dict[str, dict[str, Any]]:
    return json.loads(read(OURS)[1]["about"])["formats"] if OURS.exists() else {}


def differing(got: torch.Tensor, golden: torch.Tensor) -> int:
    """Count unlike values; zeros of either sign are alike."""
    assert (got.shape, got.dtype) == (golden.shape, golden.dtype)
    return int(((got != golden) & ~(got.isnan() & golden.isnan())).sum())


@without_ours
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", formats())
def test_ours(name, dtype):
    golden, _ = read(OURS)
    cfg = formats()[name]
    assert supports(cfg)
    seen = 0
    for tensor in ("plain", "extreme", "odd", "batch", "conv"):
        expected = golden.get(f"{dtype}/{tensor}/{name}")
        if expected is not None:
            got = fake_quantize(golden[f"{dtype}/{tensor}"], cfg)
            assert differing(got, expected) == 0, tensor
            seen += 1
    assert seen >= 4


@without_ours
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", formats())
def test_ours_under_a_calibrated_amax(name, dtype):
    golden, _ = read(OURS)
    x = golden[f"{dtype}/plain"]
    amax = golden.get(f"{dtype}/plain/{name}/amax")
    measured = compute_amax(x, formats()[name])
    if amax is None:
        assert measured is None
        return
    assert torch.equal(measured * 0.5, amax)
    got = fake_quantize(x, formats()[name], amax)
    assert differing(got, golden[f"{dtype}/plain/{name}/clipped"]) == 0


@without_ours
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", formats())
def test_ours_where_some_values_are_not_finite(name, dtype):
    """Nothing becomes finite here; what stays finite is as in ModelOpt."""
    golden, _ = read(OURS)
    expected = golden.get(f"{dtype}/broken/{name}")
    if expected is None:
        return
    x = golden[f"{dtype}/broken"]
    finite = torch.where(x.isfinite(), x, golden[f"{dtype}/plain"][[8, 15, 18, 22]])
    got = fake_quantize(x, formats()[name], compute_amax(finite, formats()[name]))
    assert not got[~x.isfinite()].isfinite().any()
    kept = got.isfinite()
    assert kept.sum() >= x.numel() - 4 * 32
    assert differing(got[kept], expected[kept]) == 0


def _mx(bits: Any) -> dict[str, Any]:
    return {"num_bits": bits, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}


def _nvfp4(size: int) -> dict[str, Any]:
    blocks = {-1: size, "type": "dynamic", "scale_bits": (4, 3)}
    return {"num_bits": (2, 1), "block_sizes": blocks}


def _token(bits: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "dynamic", "block_sizes": {-1: None}}


def _int4(size: int) -> dict[str, Any]:
    return {"num_bits": 4, "block_sizes": {-1: size, "type": "static"}}


def _axis(bits: Any, axis: int | None) -> dict[str, Any]:
    return {"num_bits": bits, "axis": axis}


E4M3 = (4, 3)
#: The configs of weight and input by the names in the shared file.
SHARED_FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "fp8_tensor": (_axis(E4M3, None), _axis(E4M3, None)),
    "fp8_channel": (_axis(E4M3, 0), None),
    "fp8_token": (_axis(E4M3, 0), _token(E4M3)),
    "int8": (_axis(8, 0), _axis(8, None)),
    "int8_tensor": (_axis(8, None), None),
    "int8_token": (_axis(8, 0), _token(8)),
    "int4_tensor": (_axis(4, 0), _axis(4, None)),
    "int4_token": (_axis(4, 0), _token(4)),
    "int4_block64": (_int4(64), None),
    "int4_block128": (_int4(128), None),
    "mxfp4": (_mx((2, 1)), _mx((2, 1))),
    "mxfp6": (_mx((3, 2)), _mx((3, 2))),
    "mxfp8": (_mx(E4M3), _mx(E4M3)),
    "mxint8": (_mx(8), _mx(8)),
    "nvfp4": (_nvfp4(16), _nvfp4(16)),
    "nvfp4_block32": (_nvfp4(32), None),
}


@without_shared
@pytest.mark.parametrize("dtype", [*DTYPES, "odd"])
@pytest.mark.parametrize("name", SHARED_FORMATS)
def test_shared(name, dtype):
    golden, _ = read(SHARED)
    weight, activation = SHARED_FORMATS[name]
    got = fake_quantize(golden[f"{dtype}/weight"], weight)
    assert differing(got, golden[f"{dtype}/{name}/weight"]) == 0
    if activation and dtype != "odd":
        got = fake_quantize(golden[f"{dtype}/input"], activation)
        assert differing(got, golden[f"{dtype}/{name}/input"]) == 0


@without_shared
def test_shared_is_covered():
    golden, _ = read(SHARED)
    assert {key.split("/")[1] for key in golden if key.count("/") == 2} == set(SHARED_FORMATS)
