"""What the verbs share: the application, its consoles, and the options that recur."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from qsens.config import choices
from qsens.errors import QsensError, UserError
from qsens.visible import visible, visible_json

app = typer.Typer(
    name="qsens",
    help="Which layers of a model break in low precision, in which format, and how sure that is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class Terminal(Console):
    """A console that shows text as it is: neither as markup, nor as what controls a terminal."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def render_str(self, text: str, **kwargs: Any) -> Text:
        """Return the one line that is printed for ``text``, in messages and tables alike."""
        return super().render_str(visible(text), **kwargs)


stderr = Terminal(stderr=True)
stdout = Terminal()

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
PlanFile = Annotated[Path, typer.Option("--plan", help="plan.json, from `qsens plan --out`.")]
CellId = Annotated[str, typer.Option("--cell", help="Id of one cell, such as wfp8_afp8-small.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PRESET] [KEY=VALUE]...",
        help="A preset below configs/sweep/ (single when left out), then overrides.",
        show_default=False,
    ),
]


def split(words: list[str] | None) -> tuple[str, list[str]]:
    """Split a preset from the overrides that follow it."""
    rest = list(words or [])
    preset = rest.pop(0) if rest and "=" not in rest[0] else "single"
    stray = [word for word in rest if "=" not in word]
    if stray:
        raise UserError(
            f"'{stray[0]}' is neither the preset nor KEY=VALUE",
            where="the command line",
            remedy=f"Presets: {', '.join(choices('sweep'))}. Overrides: dataset.size=small.",
        )
    return preset, rest


def say_notices(notices: list[str]) -> None:
    """Print the notices of a plan."""
    for notice in notices:
        stderr.print(f"note: {notice}", style="yellow")


def say_error(error: QsensError) -> None:
    """Print the lines of an error."""
    for line in f"error: {error}".splitlines():
        stderr.print(line, style="red")


def print_json(value: Any) -> None:
    """Print a value as one line of JSON."""
    print(visible_json(json.dumps(value, ensure_ascii=False)))
