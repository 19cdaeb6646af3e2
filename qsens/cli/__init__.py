"""The command line: verbs and printing, no logic.

JSON goes to stdout with ``--json``; progress and messages go to stderr. Exit codes are those of
:mod:`qsens.errors`.
"""

from __future__ import annotations

import logging
import sys
import traceback
from types import TracebackType
from typing import Annotated, NoReturn

import typer

from qsens import __version__
from qsens.cli.base import app, print_json, say_error
from qsens.errors import Fault, QsensError
from qsens.visible import LINES, visible

# Each adds its verbs; help lists them in this order.
from qsens.cli import steps  # isort: skip
from qsens.cli import findings, serving, inputs  # isort: skip

__all__ = ["app", "fail", "findings", "inputs", "main", "serving", "steps"]


def main() -> None:
    """Run the command line; an error on purpose is one message and its exit code."""
    as_json = "--json" in sys.argv[1:]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Visible("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    logging.captureWarnings(True)
    sys.excepthook = _show_bug
    try:
        app(standalone_mode=True)
    except QsensError as error:
        fail(error, as_json=as_json)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


def fail(error: QsensError, *, as_json: bool) -> NoReturn:
    """Print an error once and leave with its exit code."""
    if as_json:
        print_json(error.as_dict())
    if isinstance(error, Fault) and error.__cause__ is not None:
        _show(error.__cause__)
    say_error(error)
    sys.exit(error.exit_code)


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), LINES)


def _show_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _show(error)


def _show(error: BaseException) -> None:
    sys.stderr.write(visible("".join(traceback.format_exception(error)), LINES))


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
