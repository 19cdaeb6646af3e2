"""Products and whole models in float32, with weights as they are stored. Needs torch.

Rounding activations to bfloat16 moves a model's distributions by more than a gentle format of one
group does: 2e-5 to 1e-3 nats a token. Whatever is measured against such a change is measured here,
where only accumulation rounds.

A GPU multiplies float32 fifteen times slower than bfloat16. But weights stored in bfloat16 are
exact there, and a float32 number is the sum of three bfloat16 ones (24 bits of significand in three
times 8), so three products that are accumulated and given out in float32 do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from qsens.checkpoint.experts import is_experts
from qsens.errors import UserError

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

_NARROW = (torch.bfloat16, torch.float16)
_BLOCK = 4096
# What takes tensors of one data type only; what else mixes them gives float32 by itself.
_STRICT = frozenset(
    {
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.group_norm,
        F.layer_norm,
        F.rms_norm,
        torch.bmm,
        torch.matmul,
        torch.mm,
        torch.Tensor.__matmul__,
        torch.Tensor.bmm,
        torch.Tensor.matmul,
        torch.Tensor.mm,
    }
)


def is_narrow(dtype: torch.dtype) -> bool:
    """Return whether a data type rounds more than float32 does: bfloat16, float16."""
    return dtype in _NARROW


@contextmanager
def exact_products() -> Iterator[None]:
    """Make every linear product give float32 while the context lasts.

    On a GPU, of a float32 input that meets a weight in bfloat16 the first 16 bits of its
    significand are taken: 2^-17 of it are nothing beside what a format of 8 bits changes.
    """
    with _without_tf32(), _Products(parts=2):
        yield


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Make a model compute in float32 while the context lasts, its weights as they are stored.

    Matrices stay in their own data type. Everything else that a model holds (norms, convolutions,
    routers) is held in float32 meanwhile, so that code that casts to the type of a weight keeps
    float32. A model in float32 stays as it is.

    Raises:
        UserError: On a run: the model itself rounds what a linear module reads.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_tf32())
        if any(is_narrow(parameter.dtype) for parameter in model.parameters()):
            stack.enter_context(_widened(model))
            stack.enter_context(_WholeModel(type(model).__name__))
        yield


class _Products(TorchFunctionMode):
    """Replaces linear products by those in float32.

    Args:
        parts: Tensors in bfloat16 that an input in float32 is taken as on a GPU.
    """

    def __init__(self, parts: int) -> None:
        super().__init__()
        self._count = parts
        # What was made of the last operands: q, k and v read one input, a head has many rows.
        self._split: tuple[torch.Tensor, int, Sequence[torch.Tensor]] | None = None
        self._wide: tuple[torch.Tensor, int, torch.Tensor] | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear:
            return self.linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def linear(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return ``x W^T + b``, ``(..., out)``, float32; the arguments are torch's own."""
        parts = self._parts(input, weight)
        if parts:
            output = _accumulated(parts, weight).view(*input.shape[:-1], -1)
        else:
            output = F.linear(input.float(), self._widened(weight))
        return output if bias is None else output.add_(bias)

    def _parts(self, x: torch.Tensor, weight: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return what adds up to an input in the type of a weight, ``(rows, in)``; or nothing.

        Float32 is no sum of a few float16 numbers: their range is too small.
        """
        if not (x.is_cuda and is_narrow(weight.dtype)):
            return ()
        if x.dtype == weight.dtype:
            return (x.flatten(0, -2),)
        if (x.dtype, weight.dtype) != (torch.float32, torch.bfloat16):
            return ()
        if self._split is None or self._split[0] is not x or self._split[1] != x._version:
            self._split = x, x._version, split(x.flatten(0, -2), self._count)
        return self._split[2]

    def _widened(self, weight: torch.Tensor) -> torch.Tensor:
        if weight.dtype == torch.float32:
            return weight
        kept = self._wide
        if kept is None or kept[0] is not weight or kept[1] != weight._version:
            self._wide = None  # freed before another takes its place
            self._wide = kept = weight, weight._version, weight.float()
        return kept[2]


class _WholeModel(_Products):
    """The same for a model, whose embeddings are widened too, and which must round nothing.

    Args:
        name: The model's class, for the message.
    """

    def __init__(self, name: str) -> None:
        super().__init__(parts=3)
        self._name = name

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:
            return func(*args, **kwargs).float()
        if func in _STRICT:
            args = tuple(_wide(value) for value in args)
            kwargs = {key: _wide(value) for key, value in kwargs.items()}
        return super().__torch_function__(func, types, args, kwargs)

    def linear(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return ``x W^T + b`` of an input that nothing has rounded."""
        if is_narrow(input.dtype):
            raise UserError(
                f"its code rounds activations to {str(input.dtype).removeprefix('torch.')}, so its "
                "KL divergence cannot be measured without rounding",
                where=self._name,
                remedy="Set model.dtype=float32.",
            )
        return super().linear(input, weight, bias)


def split(x: torch.Tensor, count: int = 3) -> Sequence[torch.Tensor]:
    """Return bfloat16 tensors of the shape of ``x`` whose sum it is, the largest first.

    Three are exact, but for what lies below 2^-126; two lose 2^-17 of a number.

    Args:
        x: Any shape, float32.
        count: How many tensors.
    """
    parts = torch.empty(count, *x.shape, dtype=torch.bfloat16, device=x.device)
    if triton is not None and x.is_cuda:
        with torch.cuda.device(x.device):
            grid = (triton.cdiv(x.numel(), _BLOCK),)
            _split_kernel[grid](x.contiguous(), parts, x.numel(), PARTS=count, BLOCK=_BLOCK)
        return parts.unbind()
    rest = x
    for part in parts:
        part.copy_(rest)
        rest = rest - part.float()
    return parts.unbind()


def _accumulated(parts: Sequence[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``(rows, in)`` parts times a weight ``(out, in)``, the smallest first."""
    *others, last = parts
    across = weight.t()
    total = torch.mm(last, across, out_dtype=torch.float32)
    for part in reversed(others):
        total = torch.addmm(total, part, across, out_dtype=torch.float32)
    return total


@contextmanager
def _widened(model: nn.Module) -> Iterator[None]:
    """Hold all but the matrices of a model in float32 while the context lasts."""
    kept: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    try:
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding) or is_experts(module):
                continue
            owned: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for held in owned:
                for name, tensor in held.items():
                    if tensor is not None and is_narrow(tensor.dtype):
                        kept.append((held, name, tensor))
                        wide = tensor.detach().float()
                        is_parameter = isinstance(tensor, nn.Parameter)
                        held[name] = nn.Parameter(wide, False) if is_parameter else wide
        yield
    finally:
        for held, name, tensor in kept:
            held[name] = tensor


@contextmanager
def _without_tf32() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def _wide(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and is_narrow(value.dtype):
        return value.float()
    return value


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _split_kernel(  # type: ignore[no-untyped-def]
        x, parts, count, PARTS: tl.constexpr, BLOCK: tl.constexpr
    ):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        rest = tl.load(x + at, mask=inside, other=0.0)
        for part in range(PARTS):
            term = rest.to(tl.bfloat16)
            tl.store(parts + part * count + at, term, mask=inside)
            rest -= term.to(tl.float32)
