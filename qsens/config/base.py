"""What all models of files share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
LONGEST_NAME = 120
Name = Annotated[str, Field(pattern=NAME, max_length=LONGEST_NAME)]


class Frozen(BaseModel):
    """Base of all configuration models: immutable, and no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
