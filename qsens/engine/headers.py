"""Headers of safetensors files, read without torch: which tensors there are, and where."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsens.errors import UserError

AGAIN = "Download the checkpoint again, or set model.path to a whole one."


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


def read_header(file: Path) -> dict[str, Any]:
    """Return a safetensors header: name to ``dtype``, ``shape``, ``data_offsets``.

    Raises:
        UserError: The file is no safetensors file, or shorter than its header says.
    """
    return _read(file)[0]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, by name.

    Raises:
        UserError: The file is no safetensors file, or shorter than its header says.
    """
    header, start = _read(file)
    try:
        return {
            name: Tensor(
                file,
                str(entry["dtype"]),
                tuple(entry["shape"]),
                start + entry["data_offsets"][0],
                start + entry["data_offsets"][1],
            )
            for name, entry in header.items()
        }
    except (LookupError, TypeError) as error:
        raise _broken(file, error) from error


def _read(file: Path) -> tuple[dict[str, Any], int]:
    """Return the header, and where the data begins."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it has {size} bytes where its header says {8 + length + end}")
    except (
        struct.error,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise _broken(file, error) from error
    assert isinstance(header, dict)
    return header, 8 + length


def _broken(file: Path, error: Exception) -> UserError:
    return UserError(f"is broken: {error}", where=str(file), remedy=AGAIN)
