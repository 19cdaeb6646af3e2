"""Norms and inner products of changed rows, on a CPU and on a GPU, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qsens.engine.gradient import error_norms

_NEEDS_GPU = pytest.mark.skipif(
    error_norms.triton is None or not torch.cuda.is_available(), reason="needs a GPU and Triton"
)
# Two segments share the rows from 5 on; the last has none of theirs.
SEGMENTS = ((0, 3, 5), (5, 8, 4), (5, 14, 2), (9, 0, 3))
TOTAL = 17


def work(channels: int, draws: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(channels)
    shapes = ((12, channels), (5, channels), (draws, 5, channels))
    changed, outputs, grad_output = (torch.randn(shape, generator=generator) for shape in shapes)
    return changed, outputs, grad_output


def differences(changed: torch.Tensor, outputs: torch.Tensor) -> dict[int, Any]:
    """Return ``dY`` of each row, by where its numbers go."""
    return {
        to + row: (changed[start + row] - outputs[row]).numpy().astype(np.float64)
        for start, to, count in SEGMENTS
        for row in range(count)
    }


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=_NEEDS_GPU)])
@pytest.mark.parametrize("channels", [7, 5000])
@pytest.mark.parametrize("draws", [0, 3])
def test_every_row(device: str, channels: int, draws: int) -> None:
    changed, outputs, grad_output = work(channels, max(1, draws))
    expected = differences(changed, outputs)
    rows = {to + row: row for _, to, count in SEGMENTS for row in range(count)}
    errors = torch.full((TOTAL,), -1.0, device=device)
    scores = torch.full((draws, TOTAL) if draws else (TOTAL,), -1.0, device=device)
    given = (changed.to(device), outputs.to(device))
    if draws:
        error_norms.score_products(
            *given, grad_output.to(device), SEGMENTS, errors=errors, scores=scores
        )
    else:
        error_norms.score_norms(
            *given, grad_output[0].to(device), SEGMENTS, errors=errors, scores=scores
        )
    for at in range(TOTAL):
        if at not in expected:
            assert errors[at] == -1
            assert (scores[..., at] == -1).all()
            continue
        dy, gradients = expected[at], grad_output[:, rows[at]].numpy().astype(np.float64)
        assert float(errors[at]) == pytest.approx(np.linalg.norm(dy), rel=1e-5)
        if draws:
            assert scores[:, at].tolist() == pytest.approx((gradients @ dy).tolist(), rel=1e-3)
        else:
            assert float(scores[at]) == pytest.approx(np.linalg.norm(gradients[0] * dy), rel=1e-5)
