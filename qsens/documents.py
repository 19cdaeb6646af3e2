"""The JSON files that qsens writes and reads again: their version, and their checksum.

A document holds under ``checksum`` the SHA-256 over the canonical JSON of all its other keys. Those
of the first version have none: they are read, and nobody can tell whether they are as written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from qsens.checksums import CHECKSUM, is_sealed, sealed
from qsens.errors import Damaged, UserError
from qsens.reading import MOST_BYTES, read_json

# Documents of this version and later ones have a checksum.
SEALED_SINCE = 2

_Model = TypeVar("_Model", bound=BaseModel)


def read_document(
    model: type[_Model],
    path: Path,
    *,
    what: str,
    version: int,
    name: str,
    again: str,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> _Model:
    """Read a file that qsens wrote from ``model``.

    Args:
        model: What it is read as.
        path: The file.
        what: What it is, in words.
        version: The newest version of its schema that this qsens reads.
        name: Remedy where it cannot be read.
        again: Remedy where it is something else, or not what was written.
        prepare: Makes of the data of an older version what ``model`` reads.

    Raises:
        Damaged: It cannot be read, is something else, or does not match its checksum; the message
            names the first key that is wrong.
        TryAgain: It is being written to, or the machine fails.
        UserError: A newer qsens wrote it.
    """
    data = read_json(path, most=MOST_BYTES, remedy=name, broken="cannot be read", error=Damaged)
    if isinstance(data, dict):
        known = data.get("schema_version", 0)
        if type(known) is not int:
            raise Damaged(f"is no {what}: schema_version {known!r}", where=str(path), remedy=again)
        refuse_newer(what, known, version, where=str(path))
        if data.get(CHECKSUM) is not None or known >= SEALED_SINCE:
            _refuse_broken_seal(data, path, again)
        if prepare is not None:
            data = prepare(data)
    try:
        return model.model_validate(data)
    except UserError as error:  # of a document inside it
        raise UserError(error.what, where=str(path), remedy=error.remedy) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "top level"
        raise Damaged(
            f"is no {what}: {key}: {first['msg']}", where=str(path), remedy=again
        ) from error


def peek(path: Path) -> dict[str, Any]:
    """Return what a document says, unchecked; nothing where it cannot be read.

    Raises:
        TryAgain: It is being written to, or the machine fails.
    """
    try:
        data = read_json(path, most=MOST_BYTES, remedy="")
    except UserError:
        return {}
    return data if isinstance(data, dict) else {}


def refuse_newer(what: str, version: int, newest: int, *, where: str = "") -> None:
    """Refuse a document of a version that this qsens does not know.

    Args:
        what: What it is, in words.
        version: Its version.
        newest: The newest one that this qsens reads.
        where: The file.

    Raises:
        UserError: It is newer.
    """
    if version > newest:
        raise UserError(
            f"is a {what} of schema version {version}, and this qsens reads versions up to "
            f"{newest}",
            where=where,
            remedy="Upgrade qsens to the version that wrote it, or a later one.",
        )


def dump_json(value: Any) -> str:
    """Return JSON as qsens writes it: keys in their given order, full precision, no NaN.

    Raises:
        ValueError: There is a NaN or an infinity in it.
        TypeError: There is something in it that JSON has no form for.
    """
    json.dumps(value, allow_nan=False)  # refuses what the faster writer below would let through
    return to_json(value, indent=2).decode() + "\n"


def dump_document(document: BaseModel | dict[str, Any]) -> str:
    """Return a document as its file holds it, with the checksum of its content."""
    data = document.model_dump(mode="json") if isinstance(document, BaseModel) else document
    return dump_json(sealed(data))


def _refuse_broken_seal(data: dict[str, Any], path: Path, again: str) -> None:
    if not is_sealed(data):
        raise Damaged(
            "is damaged: its content does not match its checksum", where=str(path), remedy=again
        )
