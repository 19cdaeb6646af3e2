"""Whether a checkpoint's head is its embedding, told by its files, without torch.

As transformers loads it: where ``config.json`` ties the two and the files hold both, they are one
weight only if they are equal in the data type that they are loaded in; whichever of them is missing
is the other.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qsens.checkpoint.headers import AGAIN, Tensor
from qsens.checkpoint.structure import Structure, structure_of
from qsens.reading import open_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_KEY = "tie_word_embeddings"
_HEADS = ("lm_head", "output_layer")
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_NUMBERS = 1 << 20


def has_tied_head(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    heads: Sequence[str],
    dtype: str,
    equal: Callable[[Tensor, Tensor], bool],
) -> bool:
    """Return whether the head is loaded as the embedding's weight.

    Args:
        config: The checkpoint's ``config.json``.
        tensors: Its tensors, by name.
        heads: Patterns (fnmatch) of the head's module name.
        dtype: Data type that it is loaded in: ``float32``, ``bfloat16``, ``float16``.
        equal: Says whether two tensors hold the same bytes.
    """
    said = is_said_to_be_tied(config)
    name = _head(tensors, (*heads, *_HEADS))
    if said is False or name is None:
        return said is not False  # what lacks a head without a tie is not loaded
    head = tensors[name]
    alike = [
        tensor for other, tensor in tensors.items() if other != name and tensor.shape == head.shape
    ]
    if not alike:
        return said is True
    return any(
        (tensor.dtype == head.dtype and equal(tensor, head)) or _same(tensor, head, dtype)
        for tensor in alike
    )


def is_said_to_be_tied(config: Mapping[str, Any]) -> bool | None:
    """Return whether ``config.json`` ties the head to the embedding.

    None where it is silent, and of a model type whose default is not known here.
    """
    if _KEY in config:
        return bool(config[_KEY])
    known = structure_of(str(config.get("model_type")))
    if isinstance(known, Structure):
        return known.tied  # whatever its text_config says
    text = config.get("text_config")
    return text.get(_KEY) if isinstance(text, dict) else None


def _head(tensors: Mapping[str, Tensor], patterns: Sequence[str]) -> str | None:
    """Return the name of the head's weight; in files, it may lie deeper than in the model."""
    for pattern in patterns:
        for wanted in (f"{pattern}.weight", f"*.{pattern}.weight"):
            head = next((name for name in tensors if fnmatch.fnmatchcase(name, wanted)), None)
            if head is not None:
                return head
    return None


def _same(one: Tensor, other: Tensor, dtype: str) -> bool:
    """Return whether two tensors of as many numbers hold the same, once they are loaded."""
    import numpy as np  # not by whoever plans with a checkpoint that is known

    if not {one.dtype, other.dtype} <= _FLOATS.keys():
        return False
    pairs = zip(_numbers(one, dtype), _numbers(other, dtype), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def _numbers(tensor: Tensor, dtype: str) -> Iterator[NDArray[np.float32]]:
    """Yield a tensor's numbers, so many at a time, rounded to ``dtype``."""
    import numpy as np

    kind = np.dtype(_FLOATS[tensor.dtype])
    with open_file(tensor.file, remedy=AGAIN) as opened:
        opened.seek(tensor.begin)
        left = (tensor.end - tensor.begin) // kind.itemsize
        while left:
            count = min(left, _NUMBERS)
            read = np.frombuffer(opened.read(count * kind.itemsize), kind)
            if tensor.dtype == "BF16":  # the upper half of a float32
                read = (read.astype(np.uint32) << 16).view(np.float32)
            yield _rounded(read.astype(np.float32), dtype)
            left -= count


def _rounded(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """Return values rounded to ``dtype``, half to even."""
    import numpy as np

    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return rounded.astype(np.uint32).view(np.float32)
    return values
