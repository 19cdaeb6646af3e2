"""What a candidate does to a module's rows: ``|dY|`` and ``|G * dY|`` of each. Needs torch.

On a GPU this is where time goes that no matrix product explains, so there one small Triton kernel
reads the three matrices once; it is compiled in under a second, and kept on disk. Everywhere else,
and where Triton is missing, plain torch does the same in four passes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

_COLUMNS = 4096  # held by a program at once: fewer are slower


Segment = tuple[int, int, int]
"""Rows of a product: where they begin there, where their norms go, how many they are."""


def change_norms(
    changed: torch.Tensor,
    outputs: torch.Tensor,
    slopes: torch.Tensor,
    segments: tuple[Segment, ...],
    *,
    errors: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """Write the norms of each row of ``segments``; ``changed`` is used up.

    ``dY`` is rounded to the model's data type, as ModelOpt has it.

    Args:
        changed: Outputs of the quantized module, ``(all rows, channels)``: the first rows of
            ``outputs`` again and again, changed in another way each time.
        outputs: Outputs of the module, ``(rows, channels)``, same dtype.
        slopes: Gradient ``G`` at the outputs, same shape and dtype as ``outputs``.
        segments: What ``changed`` holds. Two that begin at the same row share their rows; others
            do not overlap.
        errors: Receives ``|dY|``, float32.
        scores: Receives ``|G * dY|``, float32, same shape.
    """
    if triton is not None and changed.is_cuda:
        _launch(changed, outputs, slopes, segments, errors, scores)
        return
    done: dict[int, int] = {}
    for start, to, count in sorted(segments, key=lambda segment: -segment[2]):
        into = slice(to, to + count)
        if start in done:  # the same rows, or the first of them
            errors[into] = errors[done[start] : done[start] + count]
            scores[into] = scores[done[start] : done[start] + count]
            continue
        done[start] = to
        rows = changed[start : start + count]
        _norms(rows, outputs[:count], slopes[:count], errors[into], scores[into])


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


def _launch(
    changed: torch.Tensor,
    outputs: torch.Tensor,
    slopes: torch.Tensor,
    segments: tuple[Segment, ...],
    errors: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    rows = max(count for _, _, count in segments)
    table = _table(segments, changed.device)
    arguments: tuple[Any, ...] = (changed, outputs, slopes, table, len(segments), errors, scores)
    strides = (changed.stride(0), outputs.stride(0), slopes.stride(0))
    channels = changed.shape[1]
    block = min(_COLUMNS, triton.next_power_of_2(channels))
    with torch.cuda.device(changed.device):
        _kernel[(rows,)](*arguments, channels, *strides, BLOCK=block, num_warps=4)


@functools.lru_cache(maxsize=1024)
def _table(segments: tuple[Segment, ...], device: torch.device) -> torch.Tensor:
    """Return the segments on a device, where the few of a pass are kept."""
    return torch.tensor(segments, dtype=torch.int64, device=device)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        changed,
        outputs,
        slopes,
        segments,
        count,
        errors,
        scores,
        channels,
        changed_stride,
        outputs_stride,
        slopes_stride,
        BLOCK: tl.constexpr,
    ):
        # All that is made of one row, so that its output and slope are read from memory once.
        row = tl.program_id(0).to(tl.int64)
        old_row = outputs + row * outputs_stride
        slope_row = slopes + row * slopes_stride
        for segment in range(count):
            length = tl.load(segments + 3 * segment + 2)
            if row < length:
                start = tl.load(segments + 3 * segment)
                into = tl.load(segments + 3 * segment + 1) + row
                new_row = changed + (start + row) * changed_stride
                error = tl.zeros((BLOCK,), dtype=tl.float32)
                score = tl.zeros((BLOCK,), dtype=tl.float32)
                for first in range(0, channels, BLOCK):
                    column = first + tl.arange(0, BLOCK)
                    inside = column < channels
                    new = tl.load(new_row + column, mask=inside, other=0.0)
                    old = tl.load(old_row + column, mask=inside, other=0.0)
                    slope = tl.load(slope_row + column, mask=inside, other=0.0)
                    change = (new.to(tl.float32) - old.to(tl.float32)).to(new.dtype)
                    change = change.to(tl.float32)
                    product = change * slope.to(tl.float32)
                    error += change * change
                    score += product * product
                tl.store(errors + into, tl.sqrt(tl.sum(error)))
                tl.store(scores + into, tl.sqrt(tl.sum(score)))
