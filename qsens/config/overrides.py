"""Overrides: ``key=value`` from a command line or a form, each typed by the field that it names.

They are no YAML documents: a value is text, which the field's type reads. ``null`` is none where
the field may be none; lists are separated by commas; a table is ``{key: value, ...}``, one level
deep, where the field is one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from qsens.config.models import SweepConfig
from qsens.errors import UserError

COMMAND_LINE = "the command line"
# Keys that choose a file below configs/, and whether several may be chosen.
CHOICES = {"model": False, "dataset": True, "quant_pair": True, "quant_granularity": True}
# That of them whose keys, below it, are those of every file chosen.
SHARED = "dataset"
# Characters of an override at most: a prompt may be long, and a path has 4,096.
LONGEST = 10_000
_SHOWN = 200
_QUOTES = ("'", '"')


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Return the values of overrides, by dotted key: text, none, lists and tables of text.

    Args:
        overrides: ``key=value`` strings.

    Raises:
        UserError: One is no override, is too long, names no key, or its value is not of the shape
            that the key takes.
    """
    parsed: dict[str, Any] = {}
    for override in overrides:
        if len(override) > LONGEST:
            raise UserError(
                f"{quoted(override)} has {len(override)} characters, and an override at most "
                f"{LONGEST}",
                where=COMMAND_LINE,
                remedy="Write it into a file below configs/.",
            )
        key, separator, text = override.partition("=")
        key = key.strip().lstrip("+")
        if not separator or not re.fullmatch(r"[A-Za-z_][\w.]{,99}", key):
            raise UserError(
                f"{quoted(override)} is no override",
                where=COMMAND_LINE,
                remedy="Write key=value, for example dataset.size=small,medium.",
            )
        where = f"{key} ({COMMAND_LINE})"
        if "${" in text:
            raise UserError(
                f"{quoted(text)} holds an interpolation",
                where=where,
                remedy="${...} works in files below configs/ only; write the value itself.",
            )
        if "\0" in text:
            raise UserError("holds a null character", where=where, remedy="Leave it out.")
        parsed[key] = _read(_annotation(key), text, key)
    return parsed


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Return values by dotted key as a tree."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def quoted(value: Any) -> str:
    """Return a value as messages show it, cut where it is long."""
    text = f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def unknown_key(key: str, allowed: Sequence[str], source: str) -> UserError:
    """Return the error for a key that there is not.

    Args:
        key: The dotted key.
        allowed: The keys that there are in its place.
        source: The file, or the command line, that names it.
    """
    close = difflib.get_close_matches(key.rsplit(".", 1)[-1], allowed, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return UserError(
        "unknown key",
        where=f"{key} ({source})",
        remedy=f"Allowed here: {', '.join(allowed)}.{hint}",
    )


def _annotation(key: str) -> Any:
    """Return the type of the field, or of the table's entries, that a dotted key names."""
    node: Any = SweepConfig
    parts = key.split(".")
    for at, part in enumerate(parts):
        dotted, above = ".".join(parts[: at + 1]), ".".join(parts[:at])
        if _is_section(node):
            if part not in node.model_fields:
                raise unknown_key(dotted, list(node.model_fields), COMMAND_LINE)
            node = node.model_fields[part].annotation
            if dotted == SHARED and at + 1 < len(parts):
                (node, _) = get_args(node)
        elif get_origin(node) is dict:
            node = get_args(node)[1]
        elif above in CHOICES:
            raise UserError(
                f"has no keys of its own: {above} chooses files",
                where=f"{dotted} ({COMMAND_LINE})",
                remedy=f"Write {above}=NAME; what NAME means stands in configs/{above}/NAME.yaml.",
            )
        else:
            raise UserError(
                "is a value, and has no keys of its own",
                where=f"{above} ({COMMAND_LINE})",
                remedy=f"Write {above}=VALUE.",
            )
    return node


def _read(annotation: Any, text: str, key: str) -> Any:
    """Return ``text`` in the shape that a field takes; what it holds is for the field to judge."""
    where = f"{key} ({COMMAND_LINE})"
    if get_origin(annotation) in (Union, UnionType):
        if text.strip() in ("null", "~"):
            return None
        kinds = [entry for entry in get_args(annotation) if entry is not type(None)]
        annotation = kinds[0] if len(kinds) == 1 else str
    if key in CHOICES:
        return _items(text) if CHOICES[key] else text
    if _is_section(annotation):
        raise UserError(
            "is a section, not a value",
            where=where,
            remedy=f"Allowed: {', '.join(f'{key}.{name}' for name in annotation.model_fields)}.",
        )
    if get_origin(annotation) is tuple:
        if _is_section(get_args(annotation)[0]):
            raise UserError(
                "is a list of sections, which only a file can hold",
                where=where,
                remedy="Write it into a file below configs/sweep/.",
            )
        return _items(text)
    if get_origin(annotation) is dict:
        return _table(text, where)
    return text


def _items(text: str) -> list[str]:
    return [part.strip() for part in text.strip("[] ").split(",") if part.strip()]


def _table(text: str, where: str) -> dict[str, str]:
    keys = {}
    for entry in text.strip().removeprefix("{").removesuffix("}").split(","):
        name, colon, value = (part.strip() for part in entry.partition(":"))
        if not colon or not re.fullmatch(r"\w+", name):
            raise UserError(
                f"{quoted(entry.strip())} is no entry of a table",
                where=where,
                remedy="Write {key: value, ...}, or one entry as KEY.ENTRY=VALUE.",
            )
        in_quotes = len(value) > 1 and value[0] == value[-1] and value[0] in _QUOTES
        keys[name] = value[1:-1] if in_quotes else value
    return keys


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
