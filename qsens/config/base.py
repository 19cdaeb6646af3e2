"""What all models of files share: their base, and how one is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qsens.errors import UserError

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
LONGEST_NAME = 120
Name = Annotated[str, Field(pattern=NAME, max_length=LONGEST_NAME)]


class Frozen(BaseModel):
    """Base of all configuration models: immutable, and no unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


_Model = TypeVar("_Model", bound=Frozen)


def read_json(model: type[_Model], path: Path, *, what: str, name: str, again: str) -> _Model:
    """Read a file that qsens wrote from ``model``.

    Args:
        model: What it is read as.
        path: The file.
        what: What it is, in words.
        name: Remedy where it cannot be read.
        again: Remedy where it is something else.

    Raises:
        UserError: It cannot be read, or is something else; the message names the first key that is
            wrong.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror}", where=str(path), remedy=name
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"is no {what}: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            where=str(path),
            remedy=again,
        ) from error
