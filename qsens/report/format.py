"""How numbers and names look in reports: the filters that all templates share.

Names come from checkpoints and may hold anything. Here they become text: one line, printable,
bounded in length; HTML is escaped by the templates' environment, Markdown by ``markdown``.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Callable, Sized
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from qsens.analysis.ranking import MeanShare
from qsens.lenient import UNKNOWN
from qsens.schema.summary import Row

ABSENT = "–"
NAME_LIMIT = 120
TEXT_LIMIT = 400
HEAT_LEVELS = 7
_DECADES = 8
_COMPANIONS = 3

_MARKDOWN = {
    "\\": "\\\\",
    "|": "\\|",
    "`": "\\`",
    "*": "\\*",
    "[": "\\[",
    "]": "\\]",
    "~": "\\~",
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
}
# At a word's edge an underscore is emphasis; inside a word it is text, and stays searchable.
_EDGE_UNDERSCORE = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_STARTS_BLOCK = re.compile(r"#{1,6}(?=\s|$)|[-+=]+(?=\s|$)|\d{1,9}(?=[.)](\s|$))")
_AUTOLINK = re.compile(r"(?<=[A-Za-z]):(?=//)|(?<=www)\.", re.IGNORECASE)


def scientific(value: float | None) -> str:
    """Return a sensitivity with three decimals, ``3.424e-01``."""
    return ABSENT if value is None else f"{value:.3e}"


def percent(share: float | None) -> str:
    """Return a share, 0 to 1, in per cent with two decimals."""
    if share is None:
        return ABSENT
    return "<0.01 %" if 0 < share < 0.0001 else f"{100 * share:.2f} %"


def mebibytes(words: float | None) -> str:
    """Return a size given in 16-bit words in MiB."""
    return ABSENT if words is None else f"{words * 2 / 2**20:.2f}"


def bits(value: float | None) -> str:
    """Return bits a weight with at most three decimals."""
    return ABSENT if value is None else f"{value:.3f}".rstrip("0").rstrip(".")


def yes_no(value: bool | None) -> str:
    """Return ``yes``, ``no``, or a dash where it is not known."""
    return ABSENT if value is None else "yes" if value else "no"


def units(method: str) -> tuple[str, str]:
    """Return the units of a score, and of a score per token, by the score's method."""
    return {
        "gradient": ("nats²", "nats² a token"),
        "fisher": ("nats", "nats a token"),
        "kl_div": ("nats", "nats a token"),
    }.get(method, ("unit of the method", "unit of the method"))


def known(value: Any, show: Callable[[Any], str] = str) -> str:
    """Return ``value`` as ``show`` shows it, or that it is not recorded."""
    return UNKNOWN if value is None else show(value)


def signed_percent(change: float | None) -> str:
    """Return a relative change in per cent, with its sign."""
    return ABSENT if change is None else f"{100 * change:+.1f} %"


def span(ends: tuple[float, float] | None) -> str:
    """Return an interval of a score."""
    return ABSENT if ends is None else f"{ends[0]:.2e} to {ends[1]:.2e}"


def places(ends: tuple[int, int] | None) -> str:
    """Return an interval of a position."""
    if ends is None:
        return ABSENT
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def correlation(value: float | None) -> str:
    """Return a rank correlation with three decimals; what is not 1 never reads as 1."""
    if value is None:
        return ABSENT
    return ">0.999" if 0.9995 <= value < 1 - 1e-12 else f"{value:.3f}"


def ratio(value: float | None) -> str:
    """Return a ratio with two decimals."""
    return ABSENT if value is None else f"{value:.2f}"


def about(number: int | None) -> str:
    """Return an estimated number to two digits."""
    if number is None:
        return ABSENT
    return f"{int(float(f'{number:.2g}')):,}".replace(",", " ")


def count(things: int | Sized, noun: str, plural: str = "") -> str:
    """Return a number, or how many things there are, with its noun: ``1 cell``, ``2 cells``."""
    number = things if isinstance(things, int) else len(things)
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def moment(created: str) -> str:
    """Return an ISO 8601 time in UTC to the minute; anything else as it is."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):[\d.]+(?:\+00:00|Z)", created)
    return f"{match[1]} {match[2]} UTC" if match else shown(created)


def shown(text: str, limit: int = NAME_LIMIT) -> str:
    """Return ``text`` on one line, printable, cut with an ellipsis at ``limit`` characters."""
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    line = " ".join(cut.split())
    return "".join(char if char.isprintable() else "\ufffd" for char in line)


def markdown(value: Any) -> Markup:
    """Return ``value`` as Markdown that shows its text and nothing else; none shows nothing."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return Markup("")
    text = " ".join(str(value).split())
    escaped = "".join(_MARKDOWN.get(char, char) for char in text)
    escaped = _AUTOLINK.sub(lambda match: f"\\{match.group()}", escaped)
    escaped = _EDGE_UNDERSCORE.sub(r"\\_", escaped)
    start = _STARTS_BLOCK.match(escaped)
    if start is not None:
        # In front of a list number the full stop is escaped: a digit cannot be.
        at = start.end() if escaped[0].isdigit() else 0
        escaped = f"{escaped[:at]}\\{escaped[at:]}"
    return Markup(escaped)


def markdown_link(text: str, target: str) -> Markup:
    """Return a Markdown link; ``target`` is what ``link`` returns."""
    return Markup(f"[{markdown(text)}]({target})")


def link(*parts: str) -> str:
    """Return a relative link, percent-encoded, so that no part can be read as a scheme."""
    return quote(posixpath.normpath("/".join(parts)), safe="/")


def companions(row: Row | MeanShare) -> str:
    """Return the other members of a group, `` + up_proj``, or how many if they are many."""
    others = [name for name in row.members if name != row.layer]
    if len(others) > _COMPANIONS:
        return f" + {count(others, 'module')}"
    return "".join(f" + {shown(name.rpartition('.')[2], 40)}" for name in others)


def width(value: float, full: float) -> str:
    """Return the width of a bar in per cent of ``full``, on a linear scale."""
    return f"{100 * value / full:.1f}" if full > 0 else "0"


def log_width(value: float | None, low: float, high: float) -> str:
    """Return the width of a bar in per cent, on a log scale from ``low`` to ``high``.

    Args:
        value: What the bar shows; nothing and 0 have no bar.
        low: The smallest positive value beside it.
        high: The largest value beside it.
    """
    if value is None or value <= 0 or high <= 0:
        return "0"
    floor = math.log10(max(low, high * 10.0**-_DECADES)) if low > 0 else math.log10(high)
    span = math.log10(high) - floor
    position = (math.log10(value) - floor) / span if span > 0 else 1.0
    return f"{4 + 96 * min(1.0, max(0.0, position)):.1f}"


def heat_level(share: float | None, top: float) -> int:
    """Return the colour step of a share, 0 to 6: two steps a decade below the largest share."""
    if share is None or share <= 0 or top <= 0:
        return 0
    step = HEAT_LEVELS - 1 + 2 * math.log10(share / top)
    return max(0, min(HEAT_LEVELS - 1, round(step)))


def plain(value: Any) -> Any:
    """Return JSON data without what UTF-8 JSON cannot hold: NaN, infinities, lone surrogates."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return value
