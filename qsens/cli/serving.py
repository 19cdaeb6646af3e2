"""What becomes of recipes where models are served."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qsens.cli.base import Json, app, print_json, say_notices, stderr, stdout
from qsens.errors import AnswerIsNo
from qsens.progress import ProgressLine

_GIB = 1 << 30


@app.command()
def export(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="From `qsens recipe SWEEP --to json --out`.")
    ],
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where the checkpoint goes; not there yet.")
    ],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Load it, and compare it with the fake-quantized model."),
    ] = False,
    captions: Annotated[
        Path | None, typer.Option(help="With --verify: samples; unused ones when left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a recipe's checkpoint, packed as vLLM and SGLang load it (compressed-tensors).

    Whole or not there; a run that was ended goes on where it was. With --verify, exit code 3 says
    that it is not what was measured; a checkpoint that is there already is verified alone.
    """
    from qsens.pipeline.export import RECIPE, export_checkpoint

    if verify and (directory / RECIPE).is_file():
        _verify(directory, captions, as_json=as_json)
        return
    with ProgressLine(stderr, cells=[directory.name]) as line:
        written = export_checkpoint(
            recipe, directory, progress=lambda *steps: line.update(directory.name, *steps)
        )
    if as_json:
        if not verify:
            print_json(written)
    else:
        _print_written(written)
    if verify:
        _verify(directory, captions, as_json=as_json, written=written)


def _print_written(written: dict[str, Any]) -> None:
    before, after = written["source_bytes"], written["weight_bytes"]
    stdout.print(
        f"{written['modules']} modules packed: {after / _GIB:.3f} GiB of {before / _GIB:.3f}, "
        f"{written['bits']:.4f} bits a weight"
    )
    stdout.print(written["path"])


def _verify(
    directory: Path,
    captions: Path | None,
    *,
    as_json: bool,
    written: dict[str, Any] | None = None,
) -> None:
    from qsens.pipeline.verify_export import verify_export

    found = verify_export(directory, captions=captions)
    if as_json:
        print_json({**(written or {}), "verified": found})
    else:
        stdout.print(
            f"on {found['samples']} samples not used: KL {found['packed']:.5g} nats a token as "
            f"packed, {found['faked']:.5g} fake-quantized; logits differ by at most "
            f"{found['difference']:.2g} of {found['largest']:.3g}"
        )
        stdout.print("verified" if found["agrees"] else "NOT what was measured")
    if not found["agrees"]:
        sys.exit(AnswerIsNo.exit_code)


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
