"""The same arithmetic as the plain torch of this package, in one pass over memory, on a GPU.

A format in plain torch is a dozen kernels and as many temporaries; these two Triton kernels read a
tensor once or twice and write it once. They are compiled in a second at first use and kept on disk
by Triton. Where Triton is missing, or a format is not one of theirs, plain torch does it; both give
the same bits, which ``tests/numerics/test_kernels.py`` holds on a machine with a GPU.

Every operation is written so that contraction to fused multiply-adds changes nothing: what is
added is a product that is exact, or a clamp stands between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsens.numerics.floats import E2M1, E4M3, ZERO_AMAX, Float
from qsens.numerics.formats import Format, Sharing
from qsens.numerics.integers import Integer

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Values that a program holds at once.
_COLUMNS = 4096
_TILE = 4096


def covers(x: Tensor, fmt: Format, amax: Tensor | None) -> bool:
    """Say whether the kernels quantize ``x``; if not, plain torch must.

    They take contiguous tensors on a GPU: one scale for all, one a row (all dimensions but the
    first, or the last alone), or blocks that divide the last dimension.
    """
    if fmt.by_compressed_tensors:
        return False
    if triton is None or not x.is_cuda or not x.is_contiguous() or x.dtype not in _DTYPES:
        return False
    if fmt.sharing is Sharing.DIMS:
        return _rows(x, fmt) is not None
    size = _block(fmt)
    divides = x.shape[-1] % size == 0 and size & (size - 1) == 0 and size <= _TILE
    return divides and (fmt.sharing is not Sharing.BLOCKS or amax is None)


def quantize_each(x: Tensor, fmt: Format) -> Tensor:
    """Fake-quantize stacked tensors in NVFP4, each as if it were alone; see `covers`.

    Args:
        x: ``(n, ...)``; float32, bfloat16 or float16, contiguous, on a GPU.
        fmt: NVFP4.
    """
    result = torch.empty_like(x)
    tops = torch.linalg.vector_norm(x.flatten(1), ord=torch.inf, dim=1, dtype=torch.float32)
    _by_blocks(x, result, fmt, tops)
    return result


def quantize(x: Tensor, fmt: Format, amax: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Fake-quantize a tensor that `covers` takes.

    Args:
        x: float32, bfloat16 or float16, contiguous, on a GPU.
        fmt: The format.
        amax: Calibrated amax, as for `qsens.numerics.fake_quantize`; measured when None.
        out: Receives the result, contiguous; a new tensor does when None.
    """
    result = torch.empty_like(x) if out is None else out
    if fmt.sharing is Sharing.DIMS:
        _by_rows(x, result, fmt, amax)
    else:
        top: Tensor | None = None
        if fmt.sharing is Sharing.NVFP4:
            top = _top(x if amax is None else amax.to(x.device, torch.float32))[None]
        _by_blocks(x, result, fmt, top)
    return result


def _rows(x: Tensor, fmt: Format) -> tuple[int, int] | None:
    """Return rows and columns such that a row shares a scale, or None; ``(1, n)`` for one scale."""
    shared = fmt.shared_dims(x.ndim)
    if len(shared) == x.ndim:
        return 1, x.numel()
    if shared == (x.ndim - 1,):
        return x.numel() // x.shape[-1], x.shape[-1]
    if shared == tuple(range(1, x.ndim)):
        return x.shape[0], x.numel() // x.shape[0]
    return None


def _block(fmt: Format) -> int:
    return 16 if fmt.sharing is Sharing.NVFP4 else fmt.size


def _top(x: Tensor) -> Tensor:
    """Return the maximum of a tensor, float32, on its device; NaN where a value is not finite."""
    largest: Tensor = torch.linalg.vector_norm(x, ord=torch.inf, dtype=torch.float32)
    return largest


def _by_rows(x: Tensor, result: Tensor, fmt: Format, amax: Tensor | None) -> None:
    as_rows = _rows(x, fmt)
    assert as_rows is not None
    rows, columns = as_rows
    one_scale = rows == 1
    mends = amax is not None
    if one_scale:
        amax = _top(x) if amax is None else amax
        columns = x.shape[-1]
        rows = x.numel() // columns
    scales = None if amax is None else amax.to(x.device, torch.float32).reshape(-1)
    element = fmt.element
    integer = isinstance(element, Integer)
    with torch.cuda.device(x.device):
        _rows_kernel[(rows,)](
            x,
            result,
            scales,
            columns,
            0 if scales is None or len(scales) == 1 else 1,
            float(element.largest),
            float(element.lowest) if isinstance(element, Integer) else -E4M3.largest,
            INTEGER=integer,
            MENDS=mends,
            ZERO=ZERO_AMAX,
            BLOCK=min(_COLUMNS, triton.next_power_of_2(columns)),
            num_warps=4,
        )


def _by_blocks(x: Tensor, result: Tensor, fmt: Format, tops: Tensor | None) -> None:
    """Quantize blocks; of NVFP4, as many parts of equal size as there are ``tops``."""
    size = _block(fmt)
    blocks = x.numel() // size
    held = max(1, _TILE // size)
    element = fmt.element
    floats = isinstance(element, Float)
    with torch.cuda.device(x.device):
        _blocks_kernel[(triton.cdiv(blocks, held),)](
            x,
            result,
            tops,
            blocks,
            blocks // (1 if tops is None else len(tops)),
            float(element.largest),
            1.0 / element.largest,
            float(element.lowest) if isinstance(element, Integer) else -float(element.largest),
            # What rounds a float32 to the grid's step at the value's own exponent.
            1.5 * 2.0 ** (23 - element.mantissa) if isinstance(element, Float) else 0.0,
            2.0**element.min_exponent if isinstance(element, Float) else 0.0,
            1.0 / (E2M1.largest * E4M3.largest),
            INTEGER=not floats,
            SHARING={Sharing.BLOCKS: 0, Sharing.MX: 1, Sharing.NVFP4: 2}[fmt.sharing],
            ZERO=ZERO_AMAX,
            SIZE=size,
            HELD=held,
            num_warps=4,
        )


if triton is not None:

    @triton.jit
    def _divide(left, right):  # type: ignore[no-untyped-def]
        return tl.math.div_rn(left, right)

    @triton.jit
    def _bound(value, lowest, largest):  # type: ignore[no-untyped-def]
        """Clamp; NaN stays NaN."""
        value = tl.where(value > largest, largest, value)
        return tl.where(value < lowest, lowest, value)

    @triton.jit
    def _to_grid(value, lift, least):  # type: ignore[no-untyped-def]
        """Round to a small float's grid; see `Float.round_`."""
        power = (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = tl.where(power < least, least, power)
        raised = power * lift
        return (value + raised) - raised

    @triton.jit
    def _to_integer(value, lowest, largest):  # type: ignore[no-untyped-def]
        """Round to the nearest integer, ties to even; within 2^22 after the clamp."""
        return (_bound(value, lowest, largest) + 12582912.0) - 12582912.0

    @triton.jit  # type: ignore[untyped-decorator]
    def _rows_kernel(  # type: ignore[no-untyped-def]
        x,
        result,
        scales,
        columns,
        stride,
        largest,
        lowest,
        INTEGER: tl.constexpr,
        MENDS: tl.constexpr,
        ZERO: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        start = row * columns
        if scales is None:
            most = tl.zeros((BLOCK,), dtype=tl.float32)
            broken = tl.zeros((BLOCK,), dtype=tl.float32)
            for first in range(0, columns, BLOCK):
                column = first + tl.arange(0, BLOCK)
                value = tl.load(x + start + column, mask=column < columns, other=0.0)
                value = value.to(tl.float32)
                most = tl.maximum(most, tl.abs(value))
                broken += value - value  # NaN where a value is not finite, else 0
            amax = tl.max(most) + tl.sum(broken)
        else:
            amax = tl.load(scales + row * stride)
        if INTEGER:
            zero = amax < ZERO
            scale = _divide(largest, amax)
            scale = tl.where(zero, 0.0, scale)
            back = tl.where(zero, 1.0, scale)
        else:
            amax = tl.where(amax <= ZERO, 1.0, amax)
            scale = _divide(largest, amax)
            back = _divide(1.0, scale)
        for first in range(0, columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < columns
            given = tl.load(x + start + column, mask=inside, other=0.0)
            value = given.to(tl.float32)
            if INTEGER:
                rounded = _to_integer(value * scale, lowest, largest)
                made = _divide(rounded, back)
            else:
                rounded = _to_grid(_bound(value * scale, lowest, largest), 1572864.0, 0.015625)
                made = rounded * back
            if MENDS:
                made += value - value
            tl.store(result + start + column, made.to(given.dtype), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def _blocks_kernel(  # type: ignore[no-untyped-def]
        x,
        result,
        tops,
        blocks,
        of_part,
        largest,
        per_largest,
        lowest,
        lift,
        least,
        per_top,
        INTEGER: tl.constexpr,
        SHARING: tl.constexpr,
        ZERO: tl.constexpr,
        SIZE: tl.constexpr,
        HELD: tl.constexpr,
    ):
        block = tl.program_id(0).to(tl.int64) * HELD + tl.arange(0, HELD)
        at = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        inside = (block < blocks)[:, None] & (tl.arange(0, SIZE) >= 0)[None, :]
        given = tl.load(x + at, mask=inside, other=0.0)
        value = given.to(tl.float32)
        amax = tl.max(tl.abs(value), axis=1) + tl.sum(value - value, axis=1)
        if SHARING == 0:
            if INTEGER:
                zero = amax < ZERO
                scale = tl.where(zero, 0.0, _divide(largest, amax))
                back = tl.where(zero, 1.0, scale)
                made = _divide(_to_integer(value * scale[:, None], lowest, largest), back[:, None])
            else:
                amax = tl.where(amax <= ZERO, 1.0, amax)
                scale = _divide(largest, amax)
                scaled = _bound(value * scale[:, None], lowest, largest)
                made = _to_grid(scaled, 1572864.0, 0.015625) * _divide(1.0, scale)[:, None]
        elif SHARING == 1:
            quotient = amax * per_largest
            quotient = tl.where(quotient < 1.1754943508222875e-38, 0.0, quotient)
            exponent = (quotient.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
            multiplier = tl.where(exponent == 0, 0, (254 - exponent) << 23)
            multiplier = multiplier.to(tl.float32, bitcast=True)
            scale = (exponent << 23).to(tl.float32, bitcast=True) + (amax - amax)
            scaled = value * multiplier[:, None]
            if INTEGER:
                rounded = _to_integer(scaled, lowest, largest)
            else:
                rounded = _to_grid(scaled, lift, least)
            made = rounded * scale[:, None]
        else:
            unit = tl.load(tops + block // of_part, mask=block < blocks, other=1.0) * per_top
            unit = tl.where(unit <= 0, 1e-12, unit)
            per_unit = _divide(1.0, 6.0 * unit)
            per_unit = tl.where(per_unit > 3.4028234663852886e38, 3.4028234663852886e38, per_unit)
            code = _bound(amax * per_unit, -448.0, 448.0)
            scale = _to_grid(code, 1572864.0, 0.015625) * unit
            scale = tl.where(scale < 1e-5, 1.0, scale) + (amax - amax)
            multiplier = _divide(1.0, scale)
            scaled = _bound(value * multiplier[:, None], -6.0, 6.0)
            made = _to_grid(scaled, lift, least) * scale[:, None]
        tl.store(result + at, made.to(given.dtype), mask=inside)
