"""The YAML files of a configuration, read within bounds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from qsens.errors import UserError
from qsens.reading import DEEPEST, read_bytes, shown

# Bytes of a file at most: those that qsens has are below 4 KiB.
_MOST_BYTES = 1 << 16
# Values that it says at most, with what its aliases repeat.
_MOST_VALUES = 10_000
# Interpolations in it at most: each may double what the one before it says.
_MOST_INTERPOLATIONS = 16
_MEND = "Mend the file."


def read_mapping(path: Path) -> dict[str, Any]:
    """Return what a YAML file says, a mapping; nothing where the file is empty.

    Raises:
        UserError: It cannot be read, is no mapping, or says what no key takes: dates, sets, halves
            of surrogate pairs, or far too much.
    """
    data = read_bytes(path, most=_MOST_BYTES, remedy=_MEND)
    try:
        text = data.decode("utf-8-sig")
        if text.count("${") > _MOST_INTERPOLATIONS:
            raise ValueError(f"it has more than {_MOST_INTERPOLATIONS} interpolations")
        _check_brackets(text)
        mapping = yaml.safe_load(text)
        _Count().of(mapping, DEEPEST)
    except RecursionError as error:
        raise _unreadable(path, f"it nests deeper than {DEEPEST} levels") from error
    except (yaml.YAMLError, ValueError) as error:
        raise _unreadable(path, " ".join(str(error).split())) from error
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise UserError("is no mapping", where=shown(path), remedy="Write key: value lines.")
    return mapping


def _check_brackets(text: str) -> None:
    """Refuse brackets within brackets before a parser looks far ahead for each."""
    open_ones = 0
    for bracket in re.findall(r"[][{}]", text):
        open_ones += 1 if bracket in "[{" else -1
        if open_ones > DEEPEST:
            raise ValueError(f"it nests deeper than {DEEPEST} levels")


class _Count:
    """Counts values, those of an alias as often as they are repeated."""

    def __init__(self) -> None:
        self._left = _MOST_VALUES

    def of(self, value: Any, levels: int) -> None:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"it says more than {_MOST_VALUES} values")
        if isinstance(value, dict | list) and levels == 0:
            raise ValueError(f"it nests deeper than {DEEPEST} levels")
        if isinstance(value, dict):
            for key, inner in value.items():
                if not isinstance(key, str | int):
                    raise ValueError(f"the key {shown(key)} is no text")
                self.of(key, levels)
                self.of(inner, levels - 1)
        elif isinstance(value, list):
            for inner in value:
                self.of(inner, levels - 1)
        elif isinstance(value, str):
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise ValueError("it holds half of a surrogate pair")
        elif value is not None and not isinstance(value, bool | int | float):
            kind = type(value).__name__
            raise ValueError(f"{shown(value)} is a {kind}, which no key takes: put it in quotes")


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(f"cannot be read: {reason}", where=shown(path), remedy=_MEND)
