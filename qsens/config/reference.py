"""Every key that a user can set, with default, allowed values and meaning, read off the models."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from qsens.config.models import SweepConfig
from qsens.config.overrides import SHARED


def describe_keys(model: type[BaseModel] = SweepConfig, prefix: str = "") -> list[dict[str, str]]:
    """Return ``{key, default, allowed, meaning}`` of every key below ``model``, in order.

    Args:
        model: The configuration model to walk.
        prefix: Dotted path of ``model``, with its last dot.
    """
    rows: list[dict[str, str]] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if f"{prefix}{name}" == SHARED:
            (annotation, _) = typing.get_args(annotation)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            rows += describe_keys(annotation, f"{prefix}{name}.")
            continue
        default = field.get_default(call_default_factory=True)
        rows.append(
            {
                "key": f"{prefix}{name}",
                "default": "" if field.is_required() else _plain(default),
                "allowed": _allowed(annotation, list(field.metadata)),
                "meaning": meanings(model)[name],
            }
        )
    return rows


@functools.cache
def meanings(model: type[BaseModel]) -> Mapping[str, str]:
    """Return what each field of a model means, in one line: the docstring below it.

    pydantic can take them along as descriptions, but reads the source of every model for it at
    import: 0.3 s of every process, and few ask.
    """
    said: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not issubclass(cls, BaseModel) or cls is BaseModel:
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in itertools.pairwise(definition.body):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    said[name] = " ".join(text.split())
    return said


def _plain(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(_plain(item) for item in value)
    if isinstance(value, BaseModel):
        return str(getattr(value, "name", value))
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _allowed(annotation: Any, metadata: list[Any]) -> str:
    literals = _literals(annotation)
    if literals:
        return ", ".join(dict.fromkeys(literals))
    bounds = []
    for item in metadata:
        for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
            if getattr(item, attribute, None) is not None:
                bounds.append(f"{sign} {getattr(item, attribute)}")
    if bounds:
        return " and ".join(bounds)
    if annotation is bool:
        return "true, false"
    return getattr(annotation, "__name__", str(annotation).replace("typing.", ""))


def _literals(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is typing.Literal:
        return [str(value) for value in typing.get_args(annotation)]
    return [text for argument in typing.get_args(annotation) for text in _literals(argument)]
