"""Checksums of what is stored: of JSON by its content, of other files by their bytes."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from qsens.errors import UserError
from qsens.reading import open_file, parse_json, read_bytes

CHECKSUM = "checksum"
# Keys of a safetensors file's metadata: its checksum, and the digest that it is stored under.
DIGEST = "digest"
_METADATA = "__metadata__"
_LENGTH = struct.Struct("<Q")


def digest_of(value: Any) -> str:
    """Return the SHA-256 of ``value`` as canonical JSON, in hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path, *, remedy: str, error: type[UserError] = UserError) -> str:
    """Return the SHA-256 of a file's content, in hex; see :func:`qsens.reading.open_file`."""
    with open_file(path, remedy=remedy, error=error) as opened:
        return digest_opened(opened)


def digest_opened(opened: BinaryIO, part: tuple[int, int] | None = None) -> str:
    """Return the SHA-256 of an opened file's content, in hex.

    Args:
        opened: The file.
        part: Where the bytes that count begin and end; all of them when not given.
    """
    begin, end = part or (0, os.fstat(opened.fileno()).st_size)
    digest = hashlib.sha256()
    opened.seek(begin)
    while block := opened.read(min(1 << 22, end - opened.tell())):
        digest.update(block)
    return digest.hexdigest()


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON data with the checksum of all its other keys, last."""
    others = {key: value for key, value in data.items() if key != CHECKSUM}
    # As it is read again: a number that is a key is text there, which sorts otherwise.
    return {**others, CHECKSUM: digest_of(json.loads(json.dumps(others)))}


def is_sealed(data: Mapping[str, Any]) -> bool:
    """Return whether JSON data, as it was read, holds the checksum of all its other keys."""
    try:
        others = {key: value for key, value in data.items() if key != CHECKSUM}
        return data.get(CHECKSUM) == digest_of(others)
    except UnicodeEncodeError:  # half of a surrogate pair, which no text of ours holds
        return False


def sealed_tensors(data: bytes) -> bytes:
    """Return a safetensors file with the checksum of its tensors and of its other metadata."""
    header, tensors = _split(data)
    header.setdefault(_METADATA, {})[CHECKSUM] = _digest_of_tensors(header, tensors)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH.size)
    return _LENGTH.pack(len(text)) + text + tensors


def check_tensors(path: Path, digest: str) -> str | None:
    """Return what is wrong with a file of tensors that is stored under ``digest``; none if nothing.

    A file older than checksums has neither of both keys, and nothing is known to be wrong with it.
    """
    try:
        header, tensors = _split(read_bytes(path, remedy=""))
    except UserError as error:
        return f"it {error.what}"
    except ValueError as error:
        return str(error)
    known = header.get(_METADATA, {})
    if CHECKSUM not in known and DIGEST not in known:
        return None
    if known.get(CHECKSUM) != _digest_of_tensors(header, tensors):
        return "its content does not match its checksum"
    return None if known.get(DIGEST) == digest else "it is stored under another's digest"


def metadata_of(data: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file.

    Raises:
        ValueError: It is no whole safetensors file.
    """
    metadata: dict[str, str] = _split(data)[0].get(_METADATA, {})
    return metadata


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file and the bytes of its tensors."""
    try:
        (length,) = _LENGTH.unpack_from(data)
        header = parse_json(data[_LENGTH.size : _LENGTH.size + length])
        tensors = data[_LENGTH.size + length :]
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != _METADATA]
        whole = max(ends, default=0) == len(tensors) and _is_text(header.get(_METADATA, {}))
    except (ValueError, struct.error, AttributeError, LookupError, TypeError):
        whole = False
    if not whole:
        raise ValueError("it is no whole safetensors file")
    return header, tensors


def _is_text(metadata: Any) -> bool:
    return isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())


def _digest_of_tensors(header: Mapping[str, Any], tensors: bytes) -> str:
    known = {key: value for key, value in header.get(_METADATA, {}).items() if key != CHECKSUM}
    return digest_of([{**header, _METADATA: known}, hashlib.sha256(tensors).hexdigest()])
