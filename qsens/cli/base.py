"""What the verbs share: the application, its consoles, and the options that recur."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from qsens.config import choices
from qsens.errors import UserError

app = typer.Typer(
    name="qsens",
    help="Which layers of a model break in low precision, in which format, and how sure that is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)
stdout = Console(highlight=False, soft_wrap=True)

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
        stderr.print(f"note: {notice}", style="yellow", markup=False)


def print_json(value: Any) -> None:
    """Print a value as one line of JSON."""
    print(json.dumps(value, ensure_ascii=False))
