"""A checkpoint's tokenizer as its files tell of it, read without torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from qsens.checkpoint.headers import AGAIN
from qsens.errors import UserError
from qsens.reading import has_file, read_bytes, read_json, shown

_WHOLE = "tokenizer.json"
# Files that transformers reads beside it, each a JSON object.
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
# Bytes of a vocabulary at most: the largest that are known have 40 million.
_MOST_BYTES = 1 << 27


def check_tokenizer(path: Path) -> None:
    """Refuse a tokenizer that nobody could load.

    Args:
        path: Directory of the checkpoint.

    Raises:
        UserError: One of its files is broken.
    """
    for name in _BESIDE:
        file = path / name
        if has_file(file, remedy=AGAIN) and not isinstance(read_json(file, remedy=AGAIN), dict):
            raise UserError("is no JSON object", where=shown(file), remedy=AGAIN)
    if has_file(path / _WHOLE, remedy=AGAIN):
        _parse(path / _WHOLE)


def _parse(file: Path) -> None:
    """Refuse what the library that loads it refuses; unknown where that is not installed."""
    data = read_bytes(file, most=_MOST_BYTES, remedy=AGAIN)
    if importlib.util.find_spec("tokenizers") is None:
        return
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(data.decode("utf-8"))
    except BaseException as error:
        # What panics in Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = shown(" ".join(str(error).split()))
        raise UserError(f"is no tokenizer: {reason}", where=shown(file), remedy=AGAIN) from error
