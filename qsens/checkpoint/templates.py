"""Chat templates of a checkpoint, where its files keep them; read without torch."""

from __future__ import annotations

from pathlib import Path

from qsens.checkpoint.headers import AGAIN
from qsens.errors import UserError
from qsens.reading import has_file, read_json


def read_chat_template(path: Path) -> str | None:
    """Return the chat template that a checkpoint keeps in a JSON file of its own, as processors do.

    Raises:
        UserError: The file is broken.
    """
    return _template_in(path / "chat_template.json")


def check_chat_template(path: Path, reads: str) -> None:
    """Refuse a checkpoint whose files hold no chat template.

    Args:
        path: Directory of the checkpoint.
        reads: What the sweep reads that needs one: ``pictures``, ``conversations``.

    Raises:
        UserError: There is none, or a file that may hold one is broken.
    """
    if not (
        has_file(path / "chat_template.jinja", remedy=AGAIN)
        or read_chat_template(path)
        or _template_in(path / "tokenizer_config.json", may_lack=True)
    ):
        raise UserError(
            f"has no chat template, and the sweep reads {reads}",
            where=f"model.path = {path}",
            remedy="Save its chat_template.jinja beside the weights, or sweep coverage=lm_only "
            "over texts alone.",
        )


def _template_in(file: Path, *, may_lack: bool = False) -> str | None:
    if not has_file(file, remedy=AGAIN):
        return None
    held = read_json(file, remedy=AGAIN)
    template = held.get("chat_template") if isinstance(held, dict) else None
    if not may_lack and not (isinstance(template, str) and template):
        raise UserError("is broken: it has no text 'chat_template'", where=str(file), remedy=AGAIN)
    return template
