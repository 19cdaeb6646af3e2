from __future__ import annotations

import math

import pytest

from qsens.report import format as look
from qsens.schema.summary import Row


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (look.scientific, 0.3424186110496521, "3.424e-01"),
        (look.scientific, 0.0, "0.000e+00"),
        (look.scientific, None, "–"),
        (look.percent, 0.08594, "8.59 %"),
        (look.percent, 0.00001, "<0.01 %"),
        (look.percent, 0.0, "0.00 %"),
        (look.mebibytes, 524288.0, "1.00"),
        (look.mebibytes, 24903680.0, "47.50"),
        (look.bits, 8.0, "8"),
        (look.bits, 4.25, "4.25"),
        (look.bits, 8.74530701482171, "8.745"),
        (look.bits, 10.0, "10"),
        (look.yes_no, True, "yes"),
        (look.yes_no, False, "no"),
        (look.yes_no, None, "–"),
    ],
)
def test_numbers(show: object, value: object, text: str) -> None:
    assert callable(show)
    assert show(value) == text


def test_shown_is_one_printable_line_of_bounded_length() -> None:
    assert look.shown("a\n b\t\u2028c") == "a b c"
    assert look.shown("x\u202ey\x00z") == "x\ufffdy\ufffdz"
    assert look.shown("n" * 10_000) == "n" * 119 + "…"
    assert look.shown("n" * 120) == "n" * 120


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("model.language_model.layers.4", "model.language_model.layers.4"),
        ("a|b", "a\\|b"),
        ("a\\|b", "a\\\\\\|b"),
        ("`rm`", "\\`rm\\`"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("**bold** _it_", "\\*\\*bold\\*\\* \\_it\\_"),
        ("[x](http://y)", "\\[x\\](http\\://y)"),
        ("www.example.org", "www\\.example.org"),
        ("# not a heading", "\\# not a heading"),
        ("- not an item", "\\- not an item"),
        ("1. not an item", "1\\. not an item"),
        ("two\n\nlines", "two lines"),
        ("3.424e-01", "3.424e-01"),
    ],
)
def test_markdown_shows_text_and_nothing_else(text: str, escaped: str) -> None:
    assert look.markdown(text) == escaped


def test_links_stay_relative() -> None:
    assert look.link("../..", "weight-fp8/run", "a.html") == "../../weight-fp8/run/a.html"
    assert look.link(".", "javascript:alert(1)", "a") == "javascript%3Aalert%281%29/a"
    assert look.link(".", "/etc", "a") == "etc/a"
    assert look.link("../..", "//host", "a") == "../../host/a"
    assert look.link(".", '"><script>', "a") == "%22%3E%3Cscript%3E/a"


def test_bars_are_on_a_log_scale() -> None:
    assert look.log_width(1.0, 0.01, 1.0) == "100.0"
    assert look.log_width(0.1, 0.01, 1.0) == "52.0"
    assert look.log_width(0.01, 0.01, 1.0) == "4.0"
    assert look.log_width(1e-30, 1e-30, 1.0) == "4.0"
    assert look.log_width(5.0, 5.0, 5.0) == "100.0"
    assert look.log_width(0.0, 0.01, 1.0) == "0"
    assert look.log_width(None, 0.01, 1.0) == "0"


def test_heat_has_two_steps_a_decade() -> None:
    levels = [look.heat_level(share, 0.5) for share in (0.5, 0.158, 0.05, 0.005, 0.0005, 0.0)]
    assert levels == [6, 5, 4, 2, 0, 0]
    assert look.heat_level(None, 0.5) == 0
    assert look.heat_level(0.0, 0.0) == 0


def test_plain_is_what_json_can_hold() -> None:
    assert look.plain({"a": [math.nan, (1, math.inf)], "b\ud800": "\ud800"}) == {
        "a": [None, [1, None]],
        "b?": "?",
    }


def test_moments_in_utc_are_shown_to_the_minute() -> None:
    assert look.moment("2030-01-02T03:04:05.678+00:00") == "2030-01-02 03:04 UTC"
    assert look.moment("2030-01-02T03:04:05Z") == "2030-01-02 03:04 UTC"
    assert look.moment("2030-01-02T03:04:05+02:00") == "2030-01-02T03:04:05+02:00"


def test_companions_are_named_or_counted() -> None:
    def row(*members: str) -> Row:
        return Row.model_construct(layer="m.q_proj", members=members)

    assert look.companions(row("m.q_proj")) == ""
    assert look.companions(row("m.q_proj", "m.k_proj", "m.v_proj")) == " + k_proj + v_proj"
    assert look.companions(row(*(f"m.{i}" for i in range(9)))) == " + 9 modules"
