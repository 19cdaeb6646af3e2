"""The two template environments: HTML, escaped always; Markdown, escaped always."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qsens.report import format as look
from qsens.report import prose
from qsens.report.charts import column_name

_TEMPLATES = Path(__file__).parent / "templates"
_FILTERS = {
    "about": look.about,
    "bits": look.bits,
    "column_name": column_name,
    "companions": look.companions,
    "correlation": look.correlation,
    "count": look.count,
    "drift_words": prose.drift_words,
    "experts_words": prose.experts_words,
    "idle_words": prose.idle_words,
    "independent_words": prose.independent_words,
    "known": look.known,
    # What `link` returns, or a name of our own: nothing in it needs an escape.
    "link_target": Markup,
    "mebibytes": look.mebibytes,
    "modality_words": prose.modality_words,
    "moment": look.moment,
    "percent": look.percent,
    "places": look.places,
    "ratio": look.ratio,
    "scientific": look.scientific,
    "settled_words": prose.settled_words,
    "statistic_words": prose.statistic_words,
    "shown": look.shown,
    "signed_percent": look.signed_percent,
    "span": look.span,
    "stable_words": prose.stable_words,
    "trusted_ratio": prose.trusted_ratio,
    "units": look.units,
    "unmeasured_words": prose.unmeasured_words,
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
