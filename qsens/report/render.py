"""The two template environments: HTML, escaped always; Markdown, escaped always."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qsens.report import format as look

_TEMPLATES = Path(__file__).parent / "templates"
_FILTERS = {
    "bits": look.bits,
    "companions": look.companions,
    "count": look.count,
    "mebibytes": look.mebibytes,
    "moment": look.moment,
    "percent": look.percent,
    "scientific": look.scientific,
    "shown": look.shown,
    "yes_no": look.yes_no,
}


def _environment(**options: Any) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    environment.filters.update(_FILTERS)
    environment.globals.update(
        absent=look.ABSENT,
        heat_level=look.heat_level,
        heat_levels=look.HEAT_LEVELS,
        link=look.link,
        log_width=look.log_width,
        markdown_link=look.markdown_link,
        text_limit=look.TEXT_LIMIT,
        width=look.width,
    )
    return environment


_HTML = _environment(autoescape=True, finalize=lambda value: "" if value is None else value)
# Jinja knows no escaping for Markdown: every expression passes through `finalize` instead.
_MARKDOWN = _environment(autoescape=False, finalize=look.markdown)


def render_html(template: str, **context: Any) -> str:
    """Return the HTML page of ``template``; all text in ``context`` is escaped."""
    return _HTML.get_template(template).render(**context)


def render_markdown(template: str, **context: Any) -> str:
    """Return the Markdown page of ``template``; all text in ``context`` is escaped."""
    return _MARKDOWN.get_template(template).render(**context)
