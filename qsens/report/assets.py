"""The scripts of the pages: written once beside them, or embedded in a single file."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from qsens.report import format as look
from qsens.writing import write_text

ASSETS = "assets"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data: 'self'; script-src "
# In a page opened from a disk, not every browser takes 'self' for the files beside it.
_BESIDE = "'self' file:"


@dataclass(frozen=True)
class Scripts:
    """How a page gets its scripts.

    Attributes:
        policy: The page's Content-Security-Policy.
        report: Link to our own script; empty where the scripts are embedded.
        plotly: Link to plotly, which our script loads when a chart comes into view.
        embedded: The scripts themselves, in order; empty where they are linked.
    """

    policy: str
    report: str = ""
    plotly: str = ""
    embedded: tuple[Markup, ...] = ()


def linked(page_directory: Path, assets: Path) -> Scripts:
    """Write the scripts into ``assets`` where they are not there yet, and link to them.

    Their names hold a version: a page of an older version keeps the scripts it was made for.

    Args:
        page_directory: Directory of the page.
        assets: Directory of the scripts.
    """
    return Scripts(
        policy=_POLICY + _BESIDE,
        report=_link(page_directory, assets, *_report()),
        plotly=_link(page_directory, assets, *_plotly()),
    )


def embedded() -> Scripts:
    """Return the scripts for a page that is one file; the policy names them by their hashes."""
    texts = [text.replace("</script", "<\\/script") for _, text in (_plotly(), _report())]
    hashes = [
        base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode() for text in texts
    ]
    return Scripts(
        policy=_POLICY + " ".join(f"'sha256-{value}'" for value in hashes),
        embedded=tuple(Markup(text) for text in texts),
    )


def page_data(value: Any) -> Markup:
    """Return ``value`` as JSON that can stand inside a ``script`` element, floats to 6 digits."""
    text = json.dumps(
        _short(look.plain(value)), ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _link(page_directory: Path, assets: Path, name: str, text: str) -> str:
    path = assets / name
    if not path.is_file() or path.stat().st_size != len(text.encode("utf-8")):
        write_text(path, text)
    return look.link(Path(os.path.relpath(path, page_directory)).as_posix())


@cache
def _report() -> tuple[str, str]:
    text = (files("qsens.report") / "templates" / "report.js").read_text(encoding="utf-8")
    return f"report-{hashlib.sha256(text.encode()).hexdigest()[:8]}.js", text


@cache
def _plotly() -> tuple[str, str]:
    text = (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    # A browser hashes an embedded script after it has made its line ends LF.
    return f"plotly-{version('plotly')}.min.js", text.replace("\r\n", "\n")


def _short(value: Any) -> Any:
    """Return JSON data with floats to 6 digits, as much as a chart or a table shows."""
    if isinstance(value, float):
        short = float(f"{value:.6g}")
        return int(short) if short.is_integer() and abs(short) < 1e6 else short
    if isinstance(value, dict):
        return {str(key): _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    return value
