"""The command line: verbs and printing, no logic.

JSON goes to stdout with ``--json``; progress and messages go to stderr. Exit codes are those of
:mod:`qsens.errors`.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qsens import __version__
from qsens.config import DagConfig, Roots, choices
from qsens.config.models import Coverage
from qsens.config.reference import describe_keys
from qsens.errors import AnswerIsNo, QsensError, UserError
from qsens.grid import read_plan
from qsens.progress import ProgressLine

if TYPE_CHECKING:
    from qsens.report.compare import Comparison

app = typer.Typer(
    name="qsens",
    help="Which layers of a model break in low precision, in which format, and how sure that is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_stderr = Console(stderr=True, highlight=False, soft_wrap=True)
_stdout = Console(highlight=False, soft_wrap=True)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
PlanFile = Annotated[Path, typer.Option("--plan", help="plan.json, from `qsens plan --out`.")]
CellId = Annotated[str, typer.Option("--cell", help="Id of one cell, such as wfp8_afp8-small.")]
RecipeTarget = Literal["modelopt", "llm-compressor", "json"]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PRESET] [KEY=VALUE]...",
        help="A preset below configs/sweep/ (single when left out), then overrides.",
        show_default=False,
    ),
]


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
    _stderr.print("error: " + str(error), style="red", markup=False)
    sys.exit(error.exit_code)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def plan(
    words: Words = None,
    out: Annotated[Path | None, typer.Option(help="Where to write plan.json.")] = None,
    lanes: Annotated[
        int | None, typer.Option(min=1, max=64, help="GPUs to share the grid among; dag.lanes.")
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List every key and leave.")] = False,
    as_json: Json = False,
) -> None:
    """Validate a sweep and print its grid. Spends no GPU time and imports no torch.

    Presets: see configs/sweep/. Overrides are dotted keys, lists by comma:
    quant_pair=wfp8_afp8,wint8_afp16 dataset.size=small,medium model.path=CHECKPOINT
    """
    if keys:
        _print_keys(as_json)
        return
    from qsens.pipeline.plan import describe, plan_sweep

    preset, overrides = _split(words)
    made = plan_sweep(preset, overrides, lanes=lanes, out=out)
    described = describe(made, out.resolve() if out else None)
    _say_notices(made.notices)
    if as_json:
        _print_json(described)
        return
    table = Table(title=f"plan {made.plan_id}, sweep {made.sweep_id}", title_justify="left")
    for column in ("cell", "coverage", "modality", "lane", "result"):
        table.add_column(column)
    for cell in described["cells"]:
        done = "there" if cell["done"] else "to compute"
        table.add_row(cell["cell"], cell["coverage"], cell["modality"], str(cell["lane"]), done)
    _stdout.print(table)


@app.command()
def sweep(
    words: Words = None,
    multirun: Annotated[bool, typer.Option("-m", "--multirun", help="Means nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Plan, calibrate, score and publish in one process, without Airflow."""
    from qsens.pipeline.plan import plan_sweep
    from qsens.pipeline.sweep import run_sweep

    preset, overrides = _split(words)
    made = plan_sweep(preset, overrides)
    _say_notices(made.notices)
    with ProgressLine(_stderr, cells=[cell.cell for cell in made.cells]) as line:
        published, errors = run_sweep(made, progress=line.update)
    for error in errors:
        _stderr.print("error: " + str(error), style="red", markup=False)
    _print_published(published, as_json)
    if errors:
        sys.exit(errors[0].exit_code)


@app.command()
def calibrate(plan: PlanFile, cell: CellId, as_json: Json = False) -> None:
    """Make sure that a cell's calibration is there."""
    from qsens.pipeline.cell import calibrate as step

    with ProgressLine(_stderr, cells=[cell]) as line:
        done = step(read_plan(plan), cell, progress=lambda *steps: line.update(cell, *steps))
    _print_step(done, as_json)


@app.command()
def score(plan: PlanFile, cell: CellId, as_json: Json = False) -> None:
    """Make sure that a cell's result is there; one that is costs no import of torch."""
    from qsens.pipeline.cell import score as step

    with ProgressLine(_stderr, cells=[cell]) as line:
        done = step(read_plan(plan), cell, progress=lambda *steps: line.update(cell, *steps))
    _print_step(done, as_json)


@app.command()
def publish(
    plan: PlanFile,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Say so: publishing never computes anyway.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Copy the results of a plan into the layout and write reports. Never computes."""
    from qsens.pipeline.publish import publish as step

    _print_published(step(read_plan(plan)), as_json)


@app.command()
def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Holds one manifest, or a summary.json.")
    ],
    single_file: Annotated[
        bool, typer.Option("--single-file", help="Put the scripts into the page: 5 MB more.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the reports of a cell's or a sweep's directory, of ours or of the older layout."""
    from qsens.pipeline.publish import report as step

    written = step(directory, single_file=single_file)
    if as_json:
        _print_json(written)
        return
    for path in written["reports"]:
        _stdout.print(path, markup=False)


@app.command()
def compare(
    one: Annotated[
        str, typer.Argument(metavar="A", help="A directory, a sweep's id, or SWEEP/CELL.")
    ],
    other: Annotated[str, typer.Argument(metavar="B", help="The same.")],
    html: Annotated[Path | None, typer.Option(help="Where to write it as a page.")] = None,
    single_file: Annotated[
        bool, typer.Option("--single-file", help="Put the scripts into the page: 5 MB more.")
    ] = False,
    count: Annotated[int, typer.Option(min=1, help="Groups to print.")] = 20,
    as_json: Json = False,
) -> None:
    """Lay two sweeps, or two cells, side by side: what went in, and which groups changed."""
    from qsens.config import Roots
    from qsens.pipeline.compare import compare as step
    from qsens.report.compare import write_comparison

    found = step(one, other, Roots.from_environment())
    if html is not None:
        write_comparison(found, html, single_file=single_file)
    if as_json:
        _print_json(found.model_dump())
        return
    _print_comparison(found, count)
    if html is not None:
        _stdout.print(str(html), markup=False)


@app.command()
def verify(
    plan: PlanFile,
    cell: CellId,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative difference; by data type.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a cell by both engines on the same batches; exit code 3 if they disagree."""
    from qsens.pipeline.verify import verify as step

    with ProgressLine(_stderr, cells=[cell]) as line:
        result = step(
            read_plan(plan),
            cell,
            tolerance=tolerance,
            progress=lambda *steps: line.update(cell, *steps),
        )
    if as_json:
        _print_json(result)
    else:
        _print_verified(result)
    if not result["agrees"]:
        sys.exit(AnswerIsNo.exit_code)


@app.command()
def recipe(
    sweep: Annotated[
        str, typer.Argument(metavar="SWEEP", help="A sweep's directory, summary.json, or id.")
    ],
    bits: Annotated[float, typer.Option(min=0, max=16, help="Bits a weight, at most.")],
    to: Annotated[RecipeTarget, typer.Option("--to", help="Who takes the recipe.")],
    size: Annotated[
        Literal["small", "medium", "large"] | None,
        typer.Option(help="Size of the scores; the largest there is when left out."),
    ] = None,
    coverage: Annotated[
        Coverage | None,
        typer.Option(help="Coverage of the scores; the widest there is when left out."),
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(metavar="PAIR,...", help="Pairs to choose from; all when left out."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Groups or modules that stay at 16 bits; repeatable."),
    ] = None,
    tied_head: Annotated[
        bool, typer.Option("--tied-head", help="Let a head tied to the embedding be quantized.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Where to write it; stdout if left out.")] = None,
    as_json: Json = False,
) -> None:
    """Choose a format for every group at a target of bits; exit code 3 if out of reach."""
    from qsens.pipeline.recipe import write_recipe

    found = write_recipe(
        sweep,
        bits=bits,
        target=to,
        size=size,
        coverage=coverage,
        pairs=pairs.split(",") if pairs else (),
        keep=keep or (),
        tied_head=tied_head,
        out=out,
    )
    if as_json:
        _print_json(found)
        return
    _say_notices(found["notices"])
    for entry in found["left_out"]:
        _stderr.print(
            f"left out: {entry['format']}: {entry['reason']}", style="yellow", markup=False
        )
    if out is None:
        sys.stdout.write(found["recipe"])
        return
    _print_recipe(found)


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

        with ProgressLine(_stderr, cells=[]) as line:
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
        "seconds": round(built.seconds, 1),
    }
    if as_json:
        _print_json(described)
        return
    for name, value in described.items():
        _stdout.print(f"{name}: {value}", markup=False)


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
    as_json: Json = False,
) -> None:
    """Get a checkpoint from a model hub: safetensors, configuration, tokenizer, processor.

    HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN are those of huggingface_hub. A download that was
    interrupted goes on where it stopped.
    """
    from qsens.pipeline.fetch import fetch_model as step

    fetched = step(target, directory, revision=revision)
    if as_json:
        _print_json(fetched)
        return
    for name, value in fetched.items():
        _stdout.print(f"{name}: {value}", markup=False)


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
        Path | None, typer.Option(help="Directory of the images: write image and caption, JSONL.")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="Size to write, may be repeated; all when left out.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws other images and captions.")] = 0,
    replace: Annotated[
        bool, typer.Option("--replace", help="Overwrite files with another content.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make calibration samples from COCO's annotations: one caption an image, nested sizes."""
    from qsens.pipeline.coco import make_captions

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
        _print_json(made)
        return
    for name, file in made["files"].items():
        _stdout.print(f"{name}: {file['samples']} samples, {file['path']}", markup=False)
    for reason, count in made["left_out"].items():
        _stderr.print(f"note: left out: {count} {reason}", style="yellow", markup=False)


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
    from qsens.pipeline.prune import prune as step

    results = Roots.from_environment().results
    pruned = step(results, keep_sweeps=keep_sweeps, keep_days=keep_days, dry_run=dry_run)
    _say_notices(pruned.notes)
    if as_json:
        _print_json({"dry_run": dry_run, **vars(pruned)})
        return
    for name, removed in vars(pruned).items():
        if name != "notes":
            count = removed if isinstance(removed, int) else len(removed)
            _stdout.print(f"{name}{' to remove' if dry_run else ' removed'}: {count}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed and free here, and what would fail."""
    from qsens.pipeline.doctor import examine

    found = examine()
    if as_json:
        _print_json(found)
        return
    for name, value in found.items():
        if name != "problems":
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            if isinstance(value, dict):
                text = "; ".join(f"{key}: {item}" for key, item in value.items())
            _stdout.print(f"{name}: {text}", markup=False)
    for problem in found["problems"]:
        _stdout.print(f"problem: {problem}", style="yellow", markup=False)


def _split(words: list[str] | None) -> tuple[str, list[str]]:
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


def _say_notices(notices: list[str]) -> None:
    for notice in notices:
        _stderr.print(f"note: {notice}", style="yellow", markup=False)


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _print_step(outcome: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(outcome)
        return
    words = "computed" if outcome["computed"] else outcome["status"]
    _stdout.print(f"{outcome['cell']}: {words} in {outcome['seconds']} s", markup=False)


def _print_published(published: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(published)
        return
    for entry in published["missing"]:
        _stdout.print(f"PARTIAL: {entry['cell']}: {entry['reason']}", style="red", markup=False)
    _stdout.print(published["index"], markup=False)


def _print_recipe(found: dict[str, Any]) -> None:
    table = Table(
        title=f"{found['bits']:.4f} bits a weight, predicted damage {found['damage']:.4g} "
        f"{found['damage_unit']}",
        title_justify="left",
    )
    for column in ("format", "groups", "weights"):
        table.add_column(column)
    for row in found["formats"]:
        table.add_row(row["format"] or "16 bits", str(row["groups"]), str(row["weights"]))
    _stdout.print(table)
    _stdout.print(found["path"], markup=False)


def _print_verified(result: dict[str, Any]) -> None:
    verdict = "agree" if result["agrees"] else "DISAGREE"
    rho = "" if result["spearman"] is None else f", Spearman's rho {result['spearman']:.6f}"
    _stdout.print(
        f"{result['cell']}: the engines {verdict}: largest relative difference "
        f"{result['largest']:.2e} (allowed {result['tolerance']:.0e}), "
        f"median {result['median']:.2e}{rho}",
        markup=False,
    )
    table = Table(title="groups that differ most", title_justify="left")
    for column in ("group", "fused", "modelopt", "relative difference"):
        table.add_column(column)
    for name, ours, theirs, difference in result["worst"]:
        table.add_row(name, f"{ours:.6e}", f"{theirs:.6e}", f"{difference:.2e}")
    _stdout.print(table)
    for name in result["only_in_one"]:
        _stdout.print(f"only one engine scored {name}", markup=False)


def _print_comparison(found: Comparison, count: int) -> None:
    for entry in found.differences:
        _stdout.print(f"{entry.cause}: {entry.what}: {entry.before} -> {entry.after}", markup=False)
    table = Table(title=f"{found.before} against {found.after}", title_justify="left")
    for column in ("cell", "samples", "total A", "total B", "Spearman", "moved"):
        table.add_column(column)
    for cell in found.cells:
        rho = "-" if cell.spearman is None else f"{cell.spearman:.3f}"
        unknown = cell.samples == "noise unknown"
        totals = (f"{cell.total_before:.3e}", f"{cell.total_after:.3e}")
        table.add_row(cell.name, cell.samples, *totals, rho, "-" if unknown else str(cell.moved))
    _stdout.print(table)
    table = Table(title="groups that changed most", title_justify="left")
    for column in ("cell", "group", "A", "B", "change", "verdict"):
        table.add_column(column, overflow="fold")
    changed = [(cell, group) for cell in found.cells for group in cell.groups]
    changed.sort(key=lambda pair: (not pair[1].moved, -abs(pair[1].relative or 0.0)))
    for cell, group in changed[:count]:
        scores = ("-" if value is None else f"{value:.3e}" for value in (group.before, group.after))
        change = "-" if group.relative is None else f"{100 * group.relative:+.1f} %"
        table.add_row(escape(cell.name), escape(group.layer), *scores, change, group.status)
    _stdout.print(table)


def _print_keys(as_json: bool) -> None:
    described = describe_keys()
    if as_json:
        _print_json(described)
        return
    table = Table(show_lines=False)
    for column in ("key", "default", "allowed", "meaning"):
        table.add_column(column, overflow="fold")
    for row in described:
        table.add_row(row["key"], row["default"], row["allowed"], row["meaning"])
    _stdout.print(table, markup=False)
