"""What a sweep needs and leaves: checkpoints, captions, old results, the machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qsens.cli.base import (
    Json,
    app,
    print_json,
    say_notices,
    stderr,
    stdout,
)
from qsens.config import DagConfig, Roots
from qsens.progress import ProgressLine


@app.command("demo-model")
def demo_model(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Where; that of model=tiny_qwen3_vl.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of its training.")] = 0,
    as_json: Json = False,
) -> None:
    """Build and train the demo checkpoint, a tiny real Qwen3-VL."""
    from qsens.config import load_sweep
    from qsens.demo.recipe import finished, recipe_digest

    target = (directory or load_sweep("demo").config.model.path).resolve()
    built = finished(target, recipe_digest(seed))
    if built is None:
        from qsens.demo.checkpoint import build

        with ProgressLine(stderr, cells=[]) as line:
            built = build(
                target,
                seed=seed,
                progress=lambda step, steps, loss: line.update("demo-model", "train", step, steps),
            )
    described = {
        "directory": str(built.directory),
        "parameters": built.parameters,
        "held_out_loss_nats_per_token": built.held_out_loss,
        "unigram_entropy_nats_per_token": built.unigram_entropy,
        "drawing_loss_nats_per_token": built.drawing_loss,
        "shuffled_drawing_loss_nats_per_token": built.shuffled_drawing_loss,
        "seconds": round(built.seconds, 1),
    }
    if as_json:
        print_json(described)
        return
    for name, value in described.items():
        stdout.print(f"{name}: {value}")


@app.command("fetch-model")
def fetch_model(
    target: Annotated[
        str, typer.Argument(metavar="MODEL", help="A file below configs/model/, or OWNER/NAME.")
    ],
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Where; the model file's path.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit; the model file's, else main.")
    ] = None,
    allow_unverified: Annotated[
        bool,
        typer.Option("--allow-unverified", help="Take files of which the hub lists no digest."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Get a checkpoint from a model hub: safetensors, configuration, tokenizer, processor.

    HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN are those of huggingface_hub. A download that was
    interrupted goes on where it stopped.
    """
    from qsens.tools.fetch import fetch_model as step

    with ProgressLine(stderr, cells=[]) as line:
        fetched = step(
            target,
            directory,
            revision=revision,
            allow_unverified=allow_unverified,
            progress=lambda name, done, size: line.update("fetch-model", name, done, size),
        )
    if as_json:
        print_json(fetched)
        return
    for name, value in fetched.items():
        stdout.print(f"{name}: {value}")


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Directory of a checkpoint.")],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the checkpoint's own code.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find what a model of an unknown type is made of, by running a shrunk twin of it.

    What is found is kept for plans, which need no torch; the checkpoint's weights are not read.
    """
    from qsens.config import ModelConfig
    from qsens.tools.inspect import inspect as step

    config = ModelConfig(path=model.resolve(), trust_remote_code=trust_remote_code)
    structure, file = step(config, Roots.from_environment().results)
    if as_json:
        print_json({**structure.as_dict(), "file": str(file)})
        return
    for part in ("language", "vision", "head"):
        stdout.print(f"{part}: {', '.join(getattr(structure, part)) or 'none'}")
    stdout.print(f"left alone: {', '.join(structure.traits.left_alone) or 'none'}")
    stdout.print(f"kept in {file}")


@app.command()
def captions(
    annotations: Annotated[
        Path, typer.Argument(metavar="ANNOTATIONS", help="COCO's captions_*.json.")
    ],
    dataset: Annotated[
        str, typer.Option(help="File below configs/dataset/: names and sizes.")
    ] = "coco2017_captions",
    out: Annotated[Path | None, typer.Option(help="Directory; that of the data set.")] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Directory of the images: write image and caption, JSONL."),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(help="Size to write, may be repeated; all when left out."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws other images and captions.")] = 0,
    replace: Annotated[
        bool, typer.Option("--replace", help="Overwrite files with another content.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make calibration samples from COCO's annotations: one caption an image, nested sizes."""
    from qsens.tools.coco import make_captions

    made = make_captions(
        annotations,
        dataset=dataset,
        out=out,
        images=images,
        sizes=size or (),
        seed=seed,
        replace=replace,
    )
    if as_json:
        print_json(made)
        return
    for name, file in made["files"].items():
        stdout.print(f"{name}: {file['samples']} samples, {file['path']}")
    for reason, count in made["left_out"].items():
        stderr.print(f"note: left out: {count} {reason}", style="yellow")


@app.command()
def traces(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Directory of a checkpoint.")],
    prompts: Annotated[
        Path, typer.Argument(metavar="PROMPTS", help="A file of texts or conversations.")
    ],
    out: Annotated[Path, typer.Option(help="Where the conversations go: .jsonl.")],
    server: Annotated[
        str | None, typer.Option(help="Address of a server of OpenAI's API that has the model.")
    ] = None,
    served_name: Annotated[
        str | None, typer.Option(help="What the server calls it; its first model.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Share that is drawn from.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are asked at once.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts to take; all.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:1, cpu.")] = "auto",
    as_json: Json = False,
) -> None:
    """Let the unquantized model answer prompts; its answers are samples for a sweep.

    A run that was interrupted goes on where it ended. OPENAI_API_KEY is sent to a server.
    """
    from qsens.tools.traces import Local, Sampling, Server, write_traces

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    answerer = Server(server, served_name) if server else Local(model.resolve(), dtype, device)
    with ProgressLine(stderr, cells=[]) as line:
        written = write_traces(
            prompts,
            out,
            answerer,
            sampling,
            batch_size=batch_size,
            limit=limit,
            progress=lambda done, total: line.update("traces", "answer", done, total),
        )
    if as_json:
        print_json({**asdict(written), "file": str(written.file)})
        return
    stdout.print(
        f"{written.answers} answers in {written.file}, {written.before} of them from before, "
        f"{written.cut} cut at {max_new_tokens} tokens"
    )


@app.command()
def prune(
    keep_sweeps: Annotated[
        int, typer.Option(help="Sweeps of each model that are kept, the newest.")
    ] = DagConfig().keep_sweeps,
    keep_days: Annotated[
        int, typer.Option(help="Days that everything is kept.")
    ] = DagConfig().keep_days,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be removed; remove nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove old sweeps and what only they refer to."""
    from qsens.tools.prune import prune as step

    results = Roots.from_environment().results
    pruned = step(results, keep_sweeps=keep_sweeps, keep_days=keep_days, dry_run=dry_run)
    say_notices(pruned.notes)
    if as_json:
        print_json({"dry_run": dry_run, **vars(pruned)})
        return
    for name, removed in vars(pruned).items():
        if name != "notes":
            count = removed if isinstance(removed, int) else len(removed)
            stdout.print(f"{name}{' to remove' if dry_run else ' removed'}: {count}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed and free here, and what would fail."""
    from qsens.tools.doctor import examine

    examined = examine()
    if as_json:
        print_json(examined)
        return
    for name, value in examined.items():
        if name != "problems":
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            if isinstance(value, dict):
                text = "; ".join(f"{key}: {item}" for key, item in value.items())
            stdout.print(f"{name}: {text}")
    for problem in examined["problems"]:
        stdout.print(f"problem: {problem}", style="yellow")
