"""What a library says against a checkpoint that it reads: for the user to mend. Needs torch.

A configuration, a tokenizer or a processor may be wrong in any way, and libraries raise anything
then. Around such calls alone is everything they raise the checkpoint's fault, or that of what is
installed: nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qsens.errors import QsensError, UserError
from qsens.reading import may_pass

# What is no property of a checkpoint: no memory, a device that fails.
_OTHERS = (QsensError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
_NO_MEMORY = "can't allocate memory"
# Of parsers in Rust: no Exception.
_PANIC = "PanicException"
_SHOWN = 300


@contextmanager
def refusals(what: str, *, where: str, remedy: str) -> Iterator[None]:
    """Turn what a library raises into one message.

    Args:
        what: What cannot be done; its reason follows.
        where: The file or key concerned.
        remedy: What to do about it.

    Raises:
        UserError: The library refuses. What may pass by itself stays what it is.
    """
    try:
        yield
    except BaseException as error:
        if not _is_refusal(error):
            raise
        raise UserError(f"{what}: {_reason(error)}", where=where, remedy=remedy) from error


def _is_refusal(error: BaseException) -> bool:
    if not isinstance(error, Exception):
        return type(error).__name__ == _PANIC
    if isinstance(error, _OTHERS) or (isinstance(error, OSError) and may_pass(error)):
        return False
    return _NO_MEMORY not in str(error)


def _reason(error: BaseException) -> str:
    """Return an error in words, on one line."""
    text = " ".join(str(error).split())[:_SHOWN]
    if not text.isprintable():
        text = repr(text)
    # The words of others are sentences; those of these are a key, or none.
    named = isinstance(error, KeyError | IndexError | AssertionError) or not text
    return f"{type(error).__name__}: {text}".removesuffix(": ") if named else text
