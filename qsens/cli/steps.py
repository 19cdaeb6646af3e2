"""The steps of a sweep: plan, calibrate, score, publish, or all of them at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qsens.cli.base import (
    CellId,
    Json,
    PlanFile,
    Words,
    app,
    print_json,
    say_error,
    say_notices,
    split,
    stderr,
    stdout,
)
from qsens.config.reference import describe_keys
from qsens.grid import read_plan
from qsens.progress import ProgressLine


@app.command()
def plan(
    words: Words = None,
    out: Annotated[Path | None, typer.Option(help="Where to write plan.json.")] = None,
    lanes: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="GPUs to share the grid among; dag.lanes."),
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

    preset, overrides = split(words)
    made = plan_sweep(preset, overrides, lanes=lanes, out=out)
    described = describe(made, out.resolve() if out else None)
    say_notices(made.notices)
    if as_json:
        print_json(described)
        return
    table = Table(title=f"plan {made.plan_id}, sweep {made.sweep_id}", title_justify="left")
    for column in ("cell", "coverage", "modality", "lane", "result"):
        table.add_column(column)
    for cell in described["cells"]:
        done = "there" if cell["done"] else "to compute"
        table.add_row(cell["cell"], cell["coverage"], cell["modality"], str(cell["lane"]), done)
    stdout.print(table)
    stdout.print(described["weights"]["placement"])


@app.command()
def sweep(
    words: Words = None,
    multirun: Annotated[bool, typer.Option("-m", "--multirun", help="Means nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Plan, calibrate, score and publish in one process, without Airflow."""
    from qsens.pipeline.plan import plan_sweep
    from qsens.pipeline.sweep import run_sweep

    preset, overrides = split(words)
    made = plan_sweep(preset, overrides)
    say_notices(made.notices)
    with ProgressLine(stderr, cells=[cell.cell for cell in made.cells]) as line:
        published, errors = run_sweep(made, progress=line.update)
    for error in errors:
        say_error(error)
    _print_published(published, as_json)
    if errors:
        sys.exit(errors[0].exit_code)


@app.command()
def calibrate(plan: PlanFile, cell: CellId, as_json: Json = False) -> None:
    """Make sure that a cell's calibration is there."""
    from qsens.pipeline.cell import calibrate as step

    with ProgressLine(stderr, cells=[cell]) as line:
        done = step(read_plan(plan), cell, progress=lambda *steps: line.update(cell, *steps))
    _print_step(done, as_json)


@app.command()
def score(plan: PlanFile, cell: CellId, as_json: Json = False) -> None:
    """Make sure that a cell's result is there; one that is costs no import of torch."""
    from qsens.pipeline.cell import score as step

    with ProgressLine(stderr, cells=[cell]) as line:
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


def _print_step(outcome: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(outcome)
        return
    words = "computed" if outcome["computed"] else outcome["status"]
    stdout.print(f"{outcome['cell']}: {words} in {outcome['seconds']} s")


def _print_published(published: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(published)
        return
    for entry in (*published["missing"], *published["partial"]):
        stdout.print(f"PARTIAL: {entry['cell']}: {entry['reason']}", style="red")
    stdout.print(published["index"])


def _print_keys(as_json: bool) -> None:
    described = describe_keys()
    if as_json:
        print_json(described)
        return
    table = Table(show_lines=False)
    for column in ("key", "default", "allowed", "meaning"):
        table.add_column(column, overflow="fold")
    for row in described:
        table.add_row(row["key"], row["default"], row["allowed"], row["meaning"])
    stdout.print(table)
