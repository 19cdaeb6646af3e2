"""Weights in parts: the same bits as at once, whatever shares a scale."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qsens.config import Roots, choices, load_sweep
from qsens.engine import quantizer
from qsens.engine.quantizer import quantize_experts, quantize_weight
from qsens.numerics import fake_quantize, supports

REPO = Path(__file__).resolve().parents[2]
ROOTS = Roots(root=REPO, results=REPO, configs=(REPO / "configs",))
NUMBERS: tuple[Any, ...] = (8, 4, (4, 3))


def shipped() -> dict[str, dict[str, Any]]:
    """Return the weight quantizers of all pairs at all granularities that suit them."""
    names = {what: ",".join(choices(what, ROOTS)) for what in ("quant_pair", "quant_granularity")}
    config = load_sweep(
        "single", [f"{what}={value}" for what, value in names.items()], roots=ROOTS
    ).config
    found = {}
    for pair in config.quant_pair:
        for granularity in config.quant_granularity:
            if pair.refusal(granularity) is None:
                laid = pair.with_granularity(granularity)
                found[f"{pair.name}-{granularity.name}"] = laid.weight_quantizer.cfg()
    return found


def laid_out() -> dict[str, dict[str, Any]]:
    """Return what a file may say beside them: any kept axes, whole axes as blocks, dynamic ones."""
    found: dict[str, dict[str, Any]] = {}
    for bits in NUMBERS:
        for axis in (None, 0, 1, -1, -2, (0, 1), (1,), (0,)):
            for kind in ("static", "dynamic"):
                found[f"{bits} axis {axis} {kind}"] = {"num_bits": bits, "axis": axis, "type": kind}
        for whole in ({-1: None}, {-2: None}, {-1: None, -2: None}):
            for kind in ("static", "dynamic"):
                found[f"{bits} whole {sorted(whole)} {kind}"] = {
                    "num_bits": bits,
                    "block_sizes": whole,
                    "type": kind,
                }
    scales = {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
    found["nvfp4 dynamic"] = {"num_bits": (2, 1), "block_sizes": scales, "type": "dynamic"}
    return found


# Each once: pairs of one weight format differ in their inputs alone.
ALL = {repr(cfg): cfg for cfg in (*shipped().values(), *laid_out().values())}


@pytest.mark.parametrize("shape", [(24, 40), (6, 3, 2, 4, 20), (1, 300), (300, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_of_a_weight_have_the_scales_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    # Rows and columns differ in size, so that a part's scale is not the whole's.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    weight *= torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator).exp2() * 4
    weight *= torch.rand(shape, generator=generator) * 3
    weight = weight.to(dtype)
    assert len(ALL) > 60
    for name, cfg in ALL.items():
        assert supports(cfg), name
        expected = fake_quantize(weight, cfg)
        for chunk in (100, weight.numel() - 1):
            monkeypatch.setattr(quantizer, "WEIGHT_CHUNK", chunk)
            found = quantize_weight(weight, cfg)
            assert found.is_contiguous()
            assert found.dtype == dtype
            assert torch.equal(found, expected), (name, chunk)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_spoils_in_parts_what_it_spoils_in_the_whole(
    monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    weight[3, 5] = value
    monkeypatch.setattr(quantizer, "WEIGHT_CHUNK", 200)
    for name, cfg in ALL.items():
        expected = fake_quantize(weight, cfg)
        assert torch.equal(quantize_weight(weight, cfg).isnan(), expected.isnan()), name
        assert expected.isnan().any()


def test_a_weight_in_another_layout_comes_out_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(40, 48, generator=torch.Generator().manual_seed(2)).T
    monkeypatch.setattr(quantizer, "WEIGHT_CHUNK", 100)
    for name, cfg in ALL.items():
        assert torch.equal(quantize_weight(weight, cfg), fake_quantize(weight, cfg)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["plain", "transposed", "one not finite"])
def test_experts_are_quantized_as_if_each_were_alone(layout: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(5, 24, 40, generator=generator)
    weights *= torch.rand(5, 24, 1, generator=generator).exp2() * 4
    weights *= torch.arange(1, 6)[:, None, None]
    weights = weights.to(dtype)
    if layout == "transposed":
        weights = weights.transpose(1, 2)
    if layout == "one not finite":
        weights[2, 3, 4] = math.inf
    for name, cfg in ALL.items():
        found = quantize_experts(weights, cfg)
        assert found.dtype == dtype
        assert found.is_contiguous()
        for one, alone in zip(found, weights, strict=True):
            assert torch.equal(one.nan_to_num(7.0), quantize_weight(alone, cfg).nan_to_num(7.0)), (
                name
            )
