"""Half the variance of changed logits: their KL divergence to second order. Needs torch."""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

_COLUMNS = 4096  # held by a program at once


def half_variance(change: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return ``1/2 d^T (diag(p) - p p^T) d`` of each row, ``(rows,)``, float64.

    Args:
        change: Changes ``d`` of logits, ``(rows, vocabulary)``, any float dtype.
        p: Probabilities, same shape, float64.
    """
    if triton is not None and change.is_cuda:
        return _launch(change.contiguous(), p.contiguous())
    change = change.double()
    centred = change - (p * change).sum(dim=-1, keepdim=True)
    return (p * centred.square()).sum(dim=-1) / 2


def _launch(change: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    rows, vocabulary = change.shape
    results = torch.empty(rows, dtype=torch.float64, device=change.device)
    block = min(_COLUMNS, triton.next_power_of_2(vocabulary))
    with torch.cuda.device(change.device):
        _kernel[(rows,)](change, p, results, vocabulary, BLOCK=block, num_warps=8)
    return results


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        change, p, results, vocabulary, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        moved = tl.zeros((BLOCK,), dtype=tl.float64)
        for first in range(0, vocabulary, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < vocabulary
            weight = tl.load(p + row * vocabulary + column, mask=inside, other=0.0)
            by = tl.load(change + row * vocabulary + column, mask=inside, other=0.0)
            moved += weight * by.to(tl.float64)
        mean = tl.sum(moved)
        spread = tl.zeros((BLOCK,), dtype=tl.float64)
        for first in range(0, vocabulary, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < vocabulary
            weight = tl.load(p + row * vocabulary + column, mask=inside, other=0.0)
            by = tl.load(change + row * vocabulary + column, mask=inside, other=0.0)
            by = by.to(tl.float64) - mean
            spread += weight * by * by
        tl.store(results + row, tl.sum(spread) / 2)
