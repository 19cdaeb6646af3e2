"""The command line: verbs and printing, no logic.

JSON goes to stdout with ``--json``; progress and messages go to stderr. Exit codes are those of
:mod:`qsens.errors`.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from qsens import __version__
from qsens.cli.base import app, stderr
from qsens.errors import Fault, QsensError

# Each adds its verbs; help lists them in this order.
from qsens.cli import steps  # isort: skip
from qsens.cli import findings, inputs  # isort: skip

__all__ = ["app", "fail", "findings", "inputs", "main", "steps"]


def main() -> None:
    """Run the command line; an error on purpose is one message and its exit code."""
    as_json = "--json" in sys.argv[1:]
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
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
        print(json.dumps(error.as_dict(), ensure_ascii=False))
    if isinstance(error, Fault) and error.__cause__ is not None:
        traceback.print_exception(error.__cause__)
    stderr.print("error: " + str(error), style="red", markup=False)
    sys.exit(error.exit_code)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
