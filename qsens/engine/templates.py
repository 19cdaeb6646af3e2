"""Chat templates of a checkpoint, where its files keep them; read without torch."""

from __future__ import annotations

import json
from pathlib import Path

from qsens.engine.headers import AGAIN
from qsens.errors import UserError


def read_chat_template(path: Path) -> str | None:
    """Return the chat template that a checkpoint keeps in a JSON file of its own, as processors do.

    Raises:
        UserError: The file is broken.
    """
    return _template_in(path / "chat_template.json")


def check_chat_template(path: Path) -> None:
    """Refuse a checkpoint whose files hold no chat template.

    Raises:
        UserError: There is none, or a file that may hold one is broken.
    """
    if not (
        (path / "chat_template.jinja").is_file()
        or read_chat_template(path)
        or _template_in(path / "tokenizer_config.json", may_lack=True)
    ):
        raise UserError(
            "has no chat template, and the sweep reads pictures",
            where=f"model.path = {path}",
            remedy="Save its chat_template.jinja beside the weights, or use coverage=lm_only with "
            "dataset.modality=text.",
        )


def _template_in(file: Path, *, may_lack: bool = False) -> str | None:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"is broken: {error}", where=str(file), remedy=AGAIN) from error
    template = held.get("chat_template") if isinstance(held, dict) else None
    if not template and not may_lack:
        raise UserError("is broken: it has no text 'chat_template'", where=str(file), remedy=AGAIN)
    return template
