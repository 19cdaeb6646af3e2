"""The packed checkpoint of a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qsens.cli.base import Json, app, print_json, stderr, stdout
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
