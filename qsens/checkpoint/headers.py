"""Headers of safetensors files, read without torch: which tensors there are, and where."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from qsens.errors import UserError
from qsens.reading import MOST_JSON, open_file, parse_json, shown

AGAIN = "Download the checkpoint again, or set model.path to a whole one."
_LENGTH = struct.Struct("<Q")
# Bits of a number, by data type as safetensors names it.
_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(
        ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8
    ),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
# What torch counts with at most.
_MOST = (1 << 63) - 1
# Dimensions of a tensor.
_FEW = 8


@dataclass(frozen=True)
class Tensor:
    """A tensor as its file describes it.

    Attributes:
        file: The file.
        dtype: Data type as safetensors names it: ``BF16``, ``F8_E4M3``, ``I32``.
        shape: Shape.
        begin: Where its bytes begin in the file.
        end: Where they end.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, by name.

    Refused is what the format's own parser refuses: data that is not the tensors one after the
    other, each as long as its data type and shape say.

    Raises:
        UserError: It cannot be read, or is no safetensors file.
        TryAgain: It is being written to.
    """
    with open_file(file, remedy=AGAIN) as opened:
        size = os.fstat(opened.fileno()).st_size
        try:
            if size < _LENGTH.size:
                raise ValueError(f"it has {size} bytes")
            (length,) = _LENGTH.unpack(opened.read(_LENGTH.size))
            start = _LENGTH.size + length
            if start > size:
                raise ValueError("its header is longer than the file")
            if length > MOST_JSON:
                raise ValueError(f"its header has {length} bytes, and at most {MOST_JSON} are read")
            data = opened.read(length)
            if not data.startswith(b"{"):
                raise ValueError("its header is no JSON object")
            header = parse_json(data, strict=True)
            _check_metadata(header.pop("__metadata__", None))
            tensors = {name: _tensor(file, name, entry, start) for name, entry in header.items()}
            _check_places(tensors, start, size)
        except ValueError as error:
            raise UserError(f"is broken: {error}", where=str(file), remedy=AGAIN) from error
    return tensors


def read_integers(tensor: Tensor) -> tuple[int, ...]:
    """Return the numbers of a tensor of a few integers: a shape that a file holds.

    Raises:
        UserError: It cannot be read, or is no such tensor.
    """
    letter = {"I64": "q", "I32": "i"}.get(tensor.dtype)
    if letter is None or len(tensor.shape) != 1 or tensor.shape[0] > _FEW:
        raise UserError(
            f"a shape is held as {tensor.dtype} of {shown(list(tensor.shape))}",
            where=str(tensor.file),
            remedy=AGAIN,
        )
    with open_file(tensor.file, remedy=AGAIN) as opened:
        opened.seek(tensor.begin)
        data = opened.read(tensor.end - tensor.begin)
    return struct.unpack(f"<{tensor.shape[0]}{letter}", data)


def _check_metadata(metadata: Any) -> None:
    words = metadata.values() if isinstance(metadata, dict) else [None]
    if metadata is not None and not all(isinstance(word, str) for word in words):
        raise ValueError("its __metadata__ is no object of text")


def _tensor(file: Path, name: str, entry: Any, start: int) -> Tensor:
    """Return what an entry of a header describes; its data begins at ``start`` of the file."""
    if not isinstance(entry, dict):
        raise ValueError(f"{shown(name)} is described by {shown(entry)}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"the dtype of {shown(name)} is {shown(dtype)}, which nobody knows")
    if not _are_counts(shape):
        raise ValueError(f"the shape of {shown(name)} is {shown(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"the data_offsets of {shown(name)} are {shown(offsets)}")
    begin, end = offsets
    bits = _BITS[dtype]
    for size in shape:
        bits *= size
        if bits > _MOST:
            raise ValueError(f"the shape of {shown(name)} is {shown(shape)}: too many numbers")
    if bits != (end - begin) * 8:
        raise ValueError(
            f"{shown(name)} has {end - begin} bytes, and {dtype} of shape {shown(shape)} has "
            f"{bits} bits"
        )
    return Tensor(file, dtype, tuple(shape), start + begin, start + end)


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= _MOST for value in values
    )


def _check_places(tensors: Mapping[str, Tensor], start: int, size: int) -> None:
    """Refuse tensors that overlap, leave a hole, or do not end where the file does."""
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != at:
            raise ValueError(
                f"{shown(name)} begins at byte {tensor.begin - start} of the data, and what is "
                f"before it ends at {at - start}"
            )
        at = tensor.end
    if at != size:
        raise ValueError(f"it has {size} bytes where its header says {at}")
