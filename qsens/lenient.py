"""Read what can be read of foreign data; what is missing, or is something else, is unknown."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

UNKNOWN = "unknown"
# What stands for a value that is not known; the first that a field takes.
_UNKNOWNS: tuple[Any, ...] = (None, UNKNOWN, [], {})


def read_leniently(model: type[BaseModel], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of ``model`` as ``data`` has them; a key that it lacks has its default.

    A key without a default is none, ``unknown``, or empty, whichever its type allows. Sections are
    read key by key; keys that the model does not know are left out.

    Args:
        model: What it is read as.
        data: The data, from anybody.

    Returns:
        What ``model`` can be made of, but for keys that nothing can stand for.
    """
    kept = {}
    for name, field in model.model_fields.items():
        if name in data:
            ok, value = _read(field.annotation, data[name])
            if ok:
                kept[name] = value
                continue
        if field.is_required():
            for unknown in _UNKNOWNS:
                ok, value = _read(field.annotation, unknown)
                if ok:
                    kept[name] = value
                    break
    return kept


def _read(annotation: Any, value: Any) -> tuple[bool, Any]:
    """Return whether ``value`` can be read, and as what."""
    try:
        return True, _adapter(annotation).validate_python(value)
    except ValidationError:
        pass
    if not isinstance(value, Mapping):
        return False, None
    if get_origin(annotation) is dict:
        read = {key: _read(get_args(annotation)[1], item) for key, item in value.items()}
        known = {key: item for key, (ok, item) in read.items() if ok and _read(str, key)[0]}
        return True, known
    optional = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    for section in (annotation, *optional):
        if isinstance(section, type) and issubclass(section, BaseModel):
            try:
                return True, section.model_validate(read_leniently(section, value))
            except ValidationError:
                break
    return False, None


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)
