"""Text from elsewhere, as a terminal may show it.

Names of modules, files and models may hold anything: what moves a cursor, changes colours, turns
the direction of writing or ends a line would make a message say something else.
"""

from __future__ import annotations

import json

LINES = "\n\t"
"""What text of several lines may keep."""


def visible(text: str, keep: str = "") -> str:
    """Return ``text`` with an escape such as ``\\x1b`` for every character that does not print.

    Args:
        text: The text; lone surrogates are escaped as well, since no terminal takes them.
        keep: Characters that stay as they are, such as `LINES`.
    """
    if text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() or char in keep
        else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def visible_json(text: str) -> str:
    """Return JSON of one line that means the same, with an escape for what does not print."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _json_escape(char) for char in text)


def _json_escape(char: str) -> str:
    escaped = json.dumps(char)[1:-1]
    return escaped if escaped != char else f"\\u{ord(char):04x}"
