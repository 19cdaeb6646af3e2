"""What becomes of recipes where models are served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qsens.cli.base import Json, app, print_json, say_notices, stderr, stdout
from qsens.progress import ProgressLine


@app.command("check-server")
def check_server(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of an OpenAI-compatible API.")],
    recipe: Annotated[
        Path | None,
        typer.Option(help="From `qsens recipe --to json`; without it, nothing is predicted."),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="Captions or conversations; those that the sweep did not use."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="What the server calls the model; its only one.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="The unquantized checkpoint; that of the recipe's sweep.")
    ] = None,
    top_k: Annotated[
        int, typer.Option(min=1, help="Likeliest tokens that the server is asked for.")
    ] = 20,
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:1, cpu.")] = "auto",
    as_json: Json = False,
) -> None:
    """Measure how far a served model is from the unquantized one, beside the prediction.

    The server must give log-probabilities of prompts, as vLLM and SGLang do. OPENAI_API_KEY is sent
    to it.
    """
    from qsens.tools.check_server import check_server as step

    with ProgressLine(stderr, cells=[]) as line:
        checked = step(
            url,
            recipe=recipe,
            samples=samples,
            model=model,
            reference=reference,
            top_k=top_k,
            device=device,
            progress=lambda *steps: line.update("check-server", *steps),
        )
    say_notices(checked["notices"])
    if as_json:
        print_json(checked)
        return
    _print_checked(checked)


def _print_checked(checked: dict[str, Any]) -> None:
    table = Table(
        title=f"{checked['model']} on {checked['api']}: nats a token over {checked['tokens']} "
        f"tokens of {checked['samples']} samples",
        title_justify="left",
    )
    columns = ("KL, at least", "loss increase", "predicted KL", "KL / predicted")
    for column in columns:
        table.add_column(column)
    divergence, predicted = checked["divergence"], checked["predicted"]
    table.add_row(
        _with_error(divergence, checked["divergence_error"]),
        _with_error(checked["loss"], checked["loss_error"]),
        "" if predicted is None else f"{predicted:.5f}",
        f"{divergence / predicted:.2f}" if predicted else "",
    )
    stdout.print(table)
    outside = checked["outside"]
    stdout.print(
        f"the server named its {checked['top_k']} likeliest tokens: the others have "
        f"{100 * outside['reference']:.2f} % of the reference's probability and "
        f"{100 * outside['served']:.2f} % of the server's, and count as one token"
    )


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.5g}" if error is None else f"{value:.5g} +- {error:.1g}"
