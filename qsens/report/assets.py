"""The scripts of the pages: written once beside them, embedded in a single file, or served.

A server takes none from where pages lie: whoever may write there would run what they like as the
reader. It gives the scripts of this package, and a policy that names them by their content.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from qsens.report import format as look
from qsens.writing import write_text

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data: 'self'; script-src "
# In a page opened from a disk, not every browser takes 'self' for the files beside it.
_BESIDE = "'self' file:"
_NOTE = (
    b'<main>\n<section class="banner">Made by another version of qsens: charts are not drawn here, '
    b"and tables do not sort. Make the reports again (mode=report_only), or open the page from the "
    b"disk.</section>"
)
# As `_element` writes it, in this version and in others.
_LINK = re.compile(
    rb'<script src="[^"<>]*?(report-[0-9a-f]{8}\.js)" data-plotly="[^"<>]*" defer></script>'
)


@dataclass(frozen=True)
class Script:
    """A script of this package.

    Attributes:
        name: Name of its file beside the pages; it holds a version.
        text: The script.
    """

    name: str
    text: str

    @cached_property
    def data(self) -> bytes:
        """The script as it is written and served."""
        return self.text.encode("utf-8")

    @cached_property
    def digest(self) -> bytes:
        """The SHA-256 of its content."""
        return hashlib.sha256(self.data).digest()

    @property
    def served_name(self) -> str:
        """Name that a server gives it."""
        return f"{self.digest.hex()}.js"

    @property
    def integrity(self) -> str:
        """Its digest as pages and policies name it."""
        return f"sha256-{base64.b64encode(self.digest).decode()}"


@dataclass(frozen=True)
class Scripts:
    """How a page gets its scripts.

    Attributes:
        policy: The page's Content-Security-Policy; empty where a header says it.
        link: The element that loads our own script; none where the scripts are embedded.
        embedded: The scripts themselves, in order; empty where they are linked.
    """

    policy: str = ""
    link: Markup | None = None
    embedded: tuple[Markup, ...] = ()


def linked(page_directory: Path, assets: Path) -> Scripts:
    """Write the scripts into ``assets`` where they are not there yet, and link to them.

    Their names hold a version: a page of an older version keeps the scripts it was made for.

    Args:
        page_directory: Directory of the page.
        assets: Directory of the scripts.
    """
    report, plotly = (_write(page_directory, assets, script) for script in (_report(), _plotly()))
    return Scripts(policy=_POLICY + _BESIDE, link=_element(report, plotly))


def embedded() -> Scripts:
    """Return the scripts for a page that is one file; the policy names them by their hashes."""
    return Scripts(
        policy=_POLICY + script_sources(),
        embedded=tuple(Markup(script.text) for script in (_plotly(), _report())),
    )


def served(page: bytes, directory: str) -> bytes:
    """Return a page as a server gives it: its link leads to the scripts of this package.

    A page of another version gets none, since its data may be laid out in another way, and says so.

    Args:
        page: The page, as it lies on a disk.
        directory: Address of the directory that the server gives :func:`served_scripts` in.
    """
    match = _LINK.search(page)
    if match is None:
        return page
    report, plotly = _report(), _plotly()
    before, after = page[: match.start()], page[match.end() :]
    if match[1].decode() != report.name:
        return before + after.replace(b"<main>", _NOTE, 1)
    element = _element(
        f"{directory}/{report.served_name}",
        f"{directory}/{plotly.served_name}",
        # Not on a disk: a browser refuses to check a file.
        Markup(' integrity="{}" data-plotly-integrity="{}"').format(
            report.integrity, plotly.integrity
        ),
    )
    return before + element.encode() + after


@cache
def served_scripts() -> dict[str, bytes]:
    """Return the scripts that a server gives, by their names there."""
    return {script.served_name: script.data for script in (_report(), _plotly())}


@cache
def script_sources() -> str:
    """Return the sources of ``script-src`` that allow the scripts of this package alone.

    Their hashes: these hold for a script in the page and, where its element states the same hash,
    for one that is loaded, whatever the address that readers know the server by.
    """
    return " ".join(f"'{script.integrity}'" for script in (_plotly(), _report()))


def page_data(value: Any) -> Markup:
    """Return ``value`` as JSON that can stand inside a ``script`` element, floats to 6 digits."""
    text = json.dumps(
        _short(look.plain(value)), ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _element(report: str, plotly: str, more: str = "") -> Markup:
    """Return the element that loads our script, which loads plotly when a chart is looked at."""
    text = '<script src="{}" data-plotly="{}"{} defer></script>'
    return Markup(text).format(report, plotly, more)


def _write(page_directory: Path, assets: Path, script: Script) -> str:
    """Write a script where it is not there yet; return the link of a page to it."""
    path = assets / script.name
    if not path.is_file() or path.stat().st_size != len(script.data):
        write_text(path, script.text)
    return look.link(Path(os.path.relpath(path, page_directory)).as_posix())


@cache
def _report() -> Script:
    text = _embeddable(files("qsens.report") / "templates" / "report.js")
    return Script(f"report-{hashlib.sha256(text.encode()).hexdigest()[:8]}.js", text)


@cache
def _plotly() -> Script:
    text = _embeddable(files("plotly") / "package_data" / "plotly.min.js")
    return Script(f"plotly-{version('plotly')}.min.js", text)


def _embeddable(source: Traversable) -> str:
    """Return a script that has the same content, and so the same hash, within a page."""
    # A browser hashes an embedded script after it has made its line ends LF.
    text = source.read_text(encoding="utf-8").replace("\r\n", "\n")
    return text.replace("</script", "<\\/script")


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
