"""What a candidate does to a module's rows. Needs torch.

Of each row ``|dY|``, and ``|G * dY|`` or the inner products ``<G, dY>`` with several gradients.

On a GPU this is where time goes that no matrix product explains, so there one small Triton kernel
reads the three matrices once; it is compiled in under a second, and kept on disk. Everywhere else,
and where Triton is missing, plain torch does the same in four passes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

# Held by a program at once: columns with one gradient, fewer with the most gradients.
_COLUMNS, _COLUMNS_OF_DRAWS, _DRAWS = 4096, 2048, 8


RowSpan = tuple[int, int, int]
"""Rows of a product: where they begin there, where their norms go, how many they are."""


def score_norms(
    changed: torch.Tensor,
    outputs: torch.Tensor,
    grad_output: torch.Tensor,
    spans: tuple[RowSpan, ...],
    *,
    errors: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """Write the norms of each row of ``spans``; ``changed`` is used up.

    ``dY`` is rounded to the model's data type, as ModelOpt has it.

    Args:
        changed: Outputs of the quantized module, ``(all rows, channels)``: the first rows of
            ``outputs`` again and again, changed in another way each time.
        outputs: Outputs of the module, ``(rows, channels)``, same dtype.
        grad_output: Gradient ``G`` at the outputs, same shape and dtype as ``outputs``.
        spans: What ``changed`` holds. Two that begin at the same row share their rows; others
            do not overlap.
        errors: Receives ``|dY|``, float32.
        scores: Receives ``|G * dY|``, float32, same shape.
    """
    if triton is not None and changed.is_cuda:
        _launch(changed, outputs, grad_output[None], spans, errors, scores[None], norms=True)
        return
    for rows, into in _distinct(spans, errors, scores):
        count = rows.stop - rows.start
        parts = (changed[rows], outputs[:count], grad_output[:count])
        _norms(*parts, errors[into], scores[into])


def score_products(
    changed: torch.Tensor,
    outputs: torch.Tensor,
    grad_output: torch.Tensor,
    spans: tuple[RowSpan, ...],
    *,
    errors: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """Write ``|dY|`` and the inner products with every gradient; ``changed`` is used up.

    The arguments are those of :func:`score_norms`, but for

    Args:
        grad_output: Gradients at the outputs, ``(draws, rows, channels)``.
        scores: Receives ``<G, dY>``, float32, ``(draws, total)``.
    """
    if triton is not None and changed.is_cuda:
        _launch(changed, outputs, grad_output, spans, errors, scores, norms=False)
        return
    for rows, into in _distinct(spans, errors, scores):
        count = rows.stop - rows.start
        change = changed[rows].sub_(outputs[:count])
        torch.linalg.vector_norm(change, dim=-1, dtype=torch.float32, out=errors[into])
        change = change.float()
        for draw, grad in zip(scores, grad_output, strict=True):
            draw[into] = torch.linalg.vecdot(change, grad[:count].float())


def _distinct(
    spans: tuple[RowSpan, ...], errors: torch.Tensor, scores: torch.Tensor
) -> Iterator[tuple[slice, slice]]:
    """Yield which rows to work on, and where their numbers go; copy those of the same rows."""
    done: dict[int, int] = {}
    for start, to, count in sorted(spans, key=lambda span: -span[2]):
        into = slice(to, to + count)
        if start in done:  # the same rows, or the first of them
            before = slice(done[start], done[start] + count)
            errors[into] = errors[before]
            scores[..., into] = scores[..., before]
            continue
        done[start] = to
        yield slice(start, start + count), into


def _norms(
    changed: torch.Tensor,
    outputs: torch.Tensor,
    grad_output: torch.Tensor,
    errors: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    change = changed.sub_(outputs)
    torch.linalg.vector_norm(change, dim=-1, dtype=torch.float32, out=errors)
    # bfloat16 keeps float32's range, and its rounding has no bias that a sum of many squares
    # would show; float16 would lose small products.
    if change.dtype == torch.float16:
        change = change.float()
    torch.linalg.vector_norm(change.mul_(grad_output), dim=-1, dtype=torch.float32, out=scores)


def _launch(
    changed: torch.Tensor,
    outputs: torch.Tensor,
    grad_output: torch.Tensor,
    spans: tuple[RowSpan, ...],
    errors: torch.Tensor,
    scores: torch.Tensor,
    *,
    norms: bool,
) -> None:
    """Run the kernel; gradients and scores have the draws in front, also where there is one."""
    channels, draws = changed.shape[1], len(grad_output)
    together = min(_DRAWS, triton.next_power_of_2(draws))
    columns = _COLUMNS if together == 1 else _COLUMNS_OF_DRAWS
    with torch.cuda.device(changed.device):
        _kernel[max(count for _, _, count in spans), triton.cdiv(draws, together)](
            changed,
            outputs,
            grad_output,
            _table(spans, changed.device),
            len(spans),
            errors,
            scores,
            channels,
            draws,
            changed.stride(0),
            outputs.stride(0),
            *grad_output.stride()[:2],
            scores.stride(0),
            NORMS=norms,
            DRAWS=together,
            BLOCK=min(columns, triton.next_power_of_2(channels)),
            num_warps=4,
        )


@functools.lru_cache(maxsize=1024)
def _table(spans: tuple[RowSpan, ...], device: torch.device) -> torch.Tensor:
    """Return the spans on a device, where the few of a pass are kept."""
    return torch.tensor(spans, dtype=torch.int64, device=device)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        changed,
        outputs,
        grad_output,
        spans,
        count,
        errors,
        scores,
        channels,
        draws,
        changed_stride,
        outputs_stride,
        draw_stride,
        grad_stride,
        scores_stride,
        NORMS: tl.constexpr,
        DRAWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        # All that is made of one row, so that its output and gradients are read from memory once.
        row = tl.program_id(0).to(tl.int64)
        draw = tl.program_id(1).to(tl.int64) * DRAWS + tl.arange(0, DRAWS)
        drawn = draw < draws
        old_row = outputs + row * outputs_stride
        grad_rows = grad_output + draw[:, None] * draw_stride + row * grad_stride
        for span in range(count):
            length = tl.load(spans + 3 * span + 2)
            if row < length:
                start = tl.load(spans + 3 * span)
                into = tl.load(spans + 3 * span + 1) + row
                new_row = changed + (start + row) * changed_stride
                error = tl.zeros((BLOCK,), dtype=tl.float32)
                score = tl.zeros((DRAWS, BLOCK), dtype=tl.float32)
                for first in range(0, channels, BLOCK):
                    column = first + tl.arange(0, BLOCK)
                    inside = column < channels
                    new = tl.load(new_row + column, mask=inside, other=0.0)
                    old = tl.load(old_row + column, mask=inside, other=0.0)
                    wanted = drawn[:, None] & inside[None, :]
                    grads = tl.load(grad_rows + column[None, :], mask=wanted, other=0.0)
                    change = (new.to(tl.float32) - old.to(tl.float32)).to(new.dtype)
                    change = change.to(tl.float32)
                    products = change[None, :] * grads.to(tl.float32)
                    error += change * change
                    score += products * products if NORMS else products
                if tl.program_id(1) == 0:
                    tl.store(errors + into, tl.sqrt(tl.sum(error)))
                total = tl.sqrt(tl.sum(score, axis=1)) if NORMS else tl.sum(score, axis=1)
                tl.store(scores + draw * scores_stride + into, total, mask=drawn)
