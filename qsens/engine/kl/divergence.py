"""KL divergence between distributions given as logits, row by row. Needs torch.

With ``d = logits_q - logits_p``, and ``c = d - sum(p * d)``,

    ``KL(p || q) = log(sum(p * exp(d))) - sum(p * d) = log(1 + sum(p * (exp(c) - 1 - c)))``

since ``p`` sums to 1 and ``p * c`` to 0. No term of the last sum is negative, so nothing cancels,
and float32 carries a small divergence as well as a large one, where the usual difference of two
log-probabilities would drown it.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

_COLUMNS = 8192  # held by a program at once


def divergences(reference: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """Return ``KL(p || q)`` of each row, in nats.

    Args:
        reference: Logits of ``p``, ``(rows, vocabulary)``.
        changed: Logits of ``q``, ``(forwards * rows, vocabulary)``, same dtype: each copy has the
            rows of ``reference`` in their order.

    Returns:
        ``(forwards, rows)``, float64.
    """
    if triton is not None and changed.is_cuda:
        return _launch(reference, changed)
    before = reference.double()
    p = torch.softmax(before, dim=-1)
    by_copy = []
    for logits in changed.view(-1, *reference.shape):
        perturbation = logits.double() - before
        perturbation -= (p * perturbation).sum(dim=-1, keepdim=True)
        by_copy.append((p * (perturbation.expm1() - perturbation)).sum(dim=-1).log1p())
    return torch.stack(by_copy)


def _launch(reference: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    rows, vocabulary = reference.shape
    results = torch.empty(len(changed), dtype=torch.float32, device=changed.device)
    arguments: tuple[Any, ...] = (reference, changed, results, rows, vocabulary)
    block = min(_COLUMNS, triton.next_power_of_2(vocabulary))
    with torch.cuda.device(changed.device):
        _kernel[(len(changed),)](*arguments, BLOCK=block, num_warps=8)
    return results.view(-1, rows).double()


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        reference, changed, results, rows, vocabulary, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        before = reference + (row % rows) * vocabulary
        after = changed + row * vocabulary
        highest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
        for first in range(0, vocabulary, BLOCK):
            column = first + tl.arange(0, BLOCK)
            old = tl.load(before + column, mask=column < vocabulary, other=float("-inf"))
            highest = tl.maximum(highest, old.to(tl.float32))
        shift = tl.max(highest)
        weight = tl.zeros((BLOCK,), dtype=tl.float32)
        moved = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, vocabulary, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < vocabulary
            old = tl.load(before + column, mask=inside, other=float("-inf")).to(tl.float32)
            new = tl.load(after + column, mask=inside, other=float("-inf")).to(tl.float32)
            p = tl.exp(old - shift)
            weight += p
            moved += tl.where(p > 0, p * (new - old), 0.0)
        total = tl.sum(weight)
        mean = tl.sum(moved) / total
        excess = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, vocabulary, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < vocabulary
            old = tl.load(before + column, mask=inside, other=float("-inf")).to(tl.float32)
            new = tl.load(after + column, mask=inside, other=float("-inf")).to(tl.float32)
            p = tl.exp(old - shift)
            c = tl.where(inside, new - old - mean, 0.0)
            # Near 0 the series of exp(c) - 1 - c, which has no difference in it.
            series = 1 / 5040
            series = 1 / 720 + c * series
            series = 1 / 120 + c * series
            series = 1 / 24 + c * series
            series = 1 / 6 + c * series
            series = 1 / 2 + c * series
            far = tl.exp(old - shift + c) - p * (1 + c)  # p alone may be 0, exp(c) too large
            excess += tl.where(tl.abs(c) < 0.3, p * c * c * series, far)
        x = tl.sum(excess) / total
        # log(1 + x): for a small x float32 would lose it in the sum.
        small = x * (1 - x * (1 / 2 - x * (1 / 3 - x / 4)))
        tl.store(results + row, tl.where(x < 0.03, small, tl.log(1 + x)))
