"""What the sections of results share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of the manifest's sections: immutable; unknown keys are kept, for newer writers.

    What is null, or ``unknown``, is not recorded: results of the older layout lack much.
    """

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())
