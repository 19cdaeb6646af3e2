"""What a candidate does to a module's rows: ``|dY|`` and ``|G * dY|`` of each. Needs torch.

On a GPU this is where time goes that no matrix product explains, so there one small Triton kernel
reads the three matrices once; it is compiled in under a second, and kept on disk. Everywhere else,
and where Triton is missing, plain torch does the same in four passes.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

_BLOCK = 1024


def change_norms(
    changed: torch.Tensor,
    outputs: torch.Tensor,
    slopes: torch.Tensor,
    source: torch.Tensor | None,
    *,
    errors: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """Write each row's norms; ``changed`` is used up.

    ``dY`` is rounded to the model's data type, as ModelOpt has it.

    Args:
        changed: Outputs of the quantized module, ``(rows, channels)``.
        outputs: Outputs of the module, same dtype.
        slopes: Gradient ``G`` at the outputs, same shape and dtype as ``outputs``.
        source: The row of ``outputs`` that each row of ``changed`` belongs to: ascending runs from
            0, int32, ``(rows,)``. Without, row for row.
        errors: Receives ``|dY|``, ``(rows,)``, float32.
        scores: Receives ``|G * dY|``, ``(rows,)``, float32.
    """
    if triton is not None and changed.is_cuda:
        _launch(changed, outputs, slopes, source, errors, scores)
        return
    for run in _runs(source, len(changed)):
        length = run.stop - run.start
        _norms(changed[run], outputs[:length], slopes[:length], errors[run], scores[run])


def _norms(
    changed: torch.Tensor,
    outputs: torch.Tensor,
    slopes: torch.Tensor,
    errors: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    change = changed.sub_(outputs)
    torch.linalg.vector_norm(change, dim=-1, dtype=torch.float32, out=errors)
    # bfloat16 keeps float32's range, and its rounding has no bias that a sum of many squares
    # would show; float16 would lose small products.
    if change.dtype == torch.float16:
        change = change.float()
    torch.linalg.vector_norm(change.mul_(slopes), dim=-1, dtype=torch.float32, out=scores)


def _runs(source: torch.Tensor | None, rows: int) -> list[slice]:
    if source is None:
        return [slice(0, rows)]
    starts = [*(source == 0).nonzero()[:, 0].tolist(), rows]
    return [slice(start, stop) for start, stop in itertools.pairwise(starts)]


def _launch(
    changed: torch.Tensor,
    outputs: torch.Tensor,
    slopes: torch.Tensor,
    source: torch.Tensor | None,
    errors: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    rows, channels = changed.shape
    arguments: tuple[Any, ...] = (changed, outputs, slopes, source, errors, scores, channels)
    strides = (changed.stride(0), outputs.stride(0), slopes.stride(0))
    with torch.cuda.device(changed.device):
        _kernel[(rows,)](*arguments, *strides, BLOCK=_BLOCK, num_warps=4)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        changed,
        outputs,
        slopes,
        source,
        errors,
        scores,
        channels,
        changed_stride,
        outputs_stride,
        slopes_stride,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        origin = row
        if source is not None:
            origin = tl.load(source + row).to(tl.int64)
        error = tl.zeros((BLOCK,), dtype=tl.float32)
        score = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, channels, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < channels
            new = tl.load(changed + row * changed_stride + column, mask=inside, other=0.0)
            old = tl.load(outputs + origin * outputs_stride + column, mask=inside, other=0.0)
            slope = tl.load(slopes + origin * slopes_stride + column, mask=inside, other=0.0)
            change = (new.to(tl.float32) - old.to(tl.float32)).to(new.dtype).to(tl.float32)
            product = change * slope.to(tl.float32)
            error += change * change
            score += product * product
        tl.store(errors + row, tl.sqrt(tl.sum(error)))
        tl.store(scores + row, tl.sqrt(tl.sum(score)))
