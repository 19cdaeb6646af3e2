"""What results say: reports, comparisons, checks of the scores, recipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from qsens.cli.base import (
    CellId,
    Json,
    PlanFile,
    app,
    print_json,
    say_notices,
    stderr,
    stdout,
)
from qsens.config import Roots
from qsens.config.models import Coverage
from qsens.config.runtime import Gpu
from qsens.errors import AnswerIsNo
from qsens.grid import read_plan
from qsens.progress import ProgressLine
from qsens.visible import LINES, visible

if TYPE_CHECKING:
    from qsens.report.compare import Comparison

RecipeTarget = Literal["modelopt", "llm-compressor", "json"]


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
    say_notices(written["notices"])
    if as_json:
        print_json(written)
        return
    for path in written["reports"]:
        stdout.print(path)


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
    from qsens.pipeline.compare import compare as step
    from qsens.report.compare import write_comparison

    comparison = step(one, other, Roots.from_environment())
    if html is not None:
        write_comparison(comparison, html, single_file=single_file)
    if as_json:
        print_json(comparison.model_dump())
        return
    _print_comparison(comparison, count)
    if html is not None:
        stdout.print(str(html))


@app.command()
def verify(
    plan: PlanFile,
    cell: CellId,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative difference; by data type.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a cell by both engines on the same batches; exit code 3 if they disagree.

    Both score by method gradient, whatever the plan's method: it is the one that ModelOpt defines.
    """
    from qsens.pipeline.verify import verify as step

    read = read_plan(plan)
    with ProgressLine(stderr, cells=[cell]) as line:
        result = step(
            read,
            cell,
            tolerance=tolerance,
            progress=lambda *steps: line.update(cell, *steps),
        )
    if as_json:
        print_json(result)
    else:
        _print_verified(result, read.config.autoquant.method)
    if not result["agrees"]:
        sys.exit(AnswerIsNo.exit_code)


@app.command()
def audit(
    plan: PlanFile,
    pairs: Annotated[
        list[str] | None, typer.Option("--pair", help="A pair to audit; all when left out.")
    ] = None,
    groups: Annotated[int, typer.Option(min=1, help="Groups of each pair.")] = 12,
    full: Annotated[bool, typer.Option("--full", help="Measure all groups.")] = False,
    as_json: Json = False,
) -> None:
    """Check the scores of a plan against the true KL divergence of some groups.

    Exit code 3 if a pair's scores are not to be trusted. Publish again to see it in reports.
    """
    from qsens.pipeline.audit import audit as step

    read = read_plan(plan)
    with ProgressLine(stderr, cells=["audit"]) as line:
        audited = step(
            read,
            pairs=pairs or (),
            groups=groups,
            full=full,
            progress=lambda *steps: line.update("audit", *steps),
        )
    if as_json:
        print_json(audited)
    else:
        _print_audits(audited)
    if any(entry["judgement"]["verdict"] == "do not trust" for entry in audited["audits"]):
        sys.exit(AnswerIsNo.exit_code)


@app.command()
def recipe(
    sweep: Annotated[
        str, typer.Argument(metavar="SWEEP", help="A sweep's directory, summary.json, or id.")
    ],
    to: Annotated[RecipeTarget, typer.Option("--to", help="Who takes the recipe.")],
    bits: Annotated[float | None, typer.Option(help="Bits a weight, at most.")] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Predicted KL, nats a token, at most: the fewest bits within it."),
    ] = None,
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
        bool,
        typer.Option("--tied-head", help="Let a head tied to the embedding be quantized."),
    ] = False,
    mix: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=SHARE,...",
            help="Shares of the sweep's data sets, by tokens; those scored when left out.",
        ),
    ] = None,
    worst_case: Annotated[
        bool,
        typer.Option("--worst-case", help="Let no data set lose much more than it has to."),
    ] = False,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="RUNTIME", help="What serves it, of a version: vllm, sglang, ..."
        ),
    ] = None,
    gpu: Annotated[
        Gpu | None, typer.Option(help="With --for: the GPU generation; any when left out.")
    ] = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(min=1, help="With --for: GPUs that every layer is cut over; 1 if left out."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write it; stdout if left out.")] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Measure it against single pairs and ModelOpt's choice."),
    ] = False,
    captions: Annotated[
        Path | None, typer.Option(help="With --check: captions; unused ones when left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose a format for every group, by --bits or --max-kl; exit code 3 if out of reach.

    With --check, exit code 3 also says that a single pair or ModelOpt's choice does better.
    """
    from qsens.pipeline.recipe import write_recipe

    written = write_recipe(
        sweep,
        bits=bits,
        max_kl=max_kl,
        target=to,
        size=size,
        coverage=coverage,
        pairs=pairs.split(",") if pairs else (),
        keep=keep or (),
        tied_head=tied_head,
        mix=mix,
        worst_case=worst_case,
        out=out,
        check=check,
        captions=captions,
        runtime=runtime,
        gpu=gpu,
        tensor_parallel=tensor_parallel,
    )
    _say_recipe(written, as_json=as_json)
    if check and written["check"]["better"]:
        sys.exit(AnswerIsNo.exit_code)


def _say_recipe(written: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(written)
        return
    from qsens.schema.recipe import LeftOut

    say_notices(written["notices"])
    for entry in written["left_out"]:
        stderr.print(f"left out: {LeftOut(**entry).words}", style="yellow")
    if "check" in written:
        _print_check(written["check"])
    if written["path"] is None:
        recipe = written["recipe"]
        sys.stdout.write(visible(recipe, LINES) if sys.stdout.isatty() else recipe)
        return
    _print_recipe(written)


def _print_check(checked: dict[str, Any]) -> None:
    table = Table(
        title=f"nats a token on {checked['captions']} captions not used; KL also on the "
        f"{checked['scored']} that were scored",
        title_justify="left",
    )
    columns = ("formats", "bits", "loss increase", "KL", "KL, scored", "predicted", "scored / it")
    for column in columns:
        table.add_column(column)
    for entry in checked["measured"]:
        known = entry["predicted"]
        ratio = f"{entry['scored'] / known:.2f}" if known else ""
        table.add_row(
            entry["name"],
            f"{entry['bits']:.4f}",
            f"{entry['loss']:+.5f}",
            f"{entry['divergence']:.5f}",
            f"{entry['scored']:.5f}",
            "" if known is None else f"{known:.5f}",
            ratio,
        )
    stderr.print(table)
    floor = checked["floor"]
    if floor is not None:
        stderr.print(
            f"rounding activations costs the unquantized model {floor:.1e} nats a token by itself; "
            f"the recipe {checked['measured'][0]['divergence'] / floor:.1f} times that",
        )
    for name in checked["better"]:
        stderr.print(f"better than the recipe: {name}", style="yellow")


def _print_audits(audited: dict[str, Any]) -> None:
    table = Table(title="scores against the true KL divergence", title_justify="left")
    for column in ("cell", "groups", "rho", "estimate / truth", "verdict", "why"):
        table.add_column(column, overflow="fold")
    for entry in audited["audits"]:
        judged = entry["judgement"]
        rho, ratio = (
            "" if judged[name] is None else f"{judged[name]:.3f}" for name in ("rho", "ratio")
        )
        table.add_row(
            entry["cell"],
            str(len(entry["points"])),
            rho,
            "" if judged["verdict"] == "do not trust" else ratio,
            judged["verdict"],
            judged["reason"],
        )
    stdout.print(table)
    floors = [entry["floor"] for entry in audited["audits"] if entry["floor"] is not None]
    if floors:
        stdout.print(
            f"true KL divergence is measured in float32; rounding activations alone costs a whole "
            f"model {max(floors):.1e} nats a token, in any format",
        )
    for entry in audited["missing"]:
        stdout.print(f"not audited: {entry['cell']}: {entry['reason']}")


def _print_recipe(written: dict[str, Any]) -> None:
    from qsens.recipes.formats.evidence import domain_words, predicted
    from qsens.schema.recipe import DomainPrediction

    table = Table(
        title=f"{written['bits']:.4f} bits a weight. "
        + predicted(written["damage"], written["damage_unit"]),
        title_justify="left",
    )
    for column in ("format", "groups", "weights", "scores"):
        table.add_column(column)
    for row in written["formats"]:
        correction = written["prices"].get(row["format"])
        ratio = correction["ratio"] if correction else None
        over = f" / {ratio:.3f}" if ratio is not None else ""
        table.add_row(
            row["format"] or "16 bits",
            str(row["groups"]),
            str(row["weights"]),
            f"{correction['source']}{over}" if correction else "",
        )
    stdout.print(table)
    for entry in written["domains"]:
        stdout.print(domain_words(DomainPrediction.model_validate(entry), written["damage_unit"]))
    stdout.print(written["path"])


def _print_verified(result: dict[str, Any], method: str) -> None:
    if method != result["method"]:
        stdout.print(
            f"both scored by {result['method']}, not by the plan's {method}: it is the score that "
            "ModelOpt defines",
        )
    verdict = "agree" if result["agrees"] else "DISAGREE"
    rho = "" if result["spearman"] is None else f", Spearman's rho {result['spearman']:.6f}"
    stdout.print(
        f"{result['cell']}: the engines {verdict}: largest relative difference "
        f"{result['largest']:.2e} (allowed {result['tolerance']:.0e}), "
        f"median {result['median']:.2e}{rho}",
    )
    table = Table(title="groups that differ most", title_justify="left")
    for column in ("group", "fused", "modelopt", "relative difference"):
        table.add_column(column)
    for name, ours, theirs, difference in result["worst"]:
        table.add_row(name, f"{ours:.6e}", f"{theirs:.6e}", f"{difference:.2e}")
    stdout.print(table)
    for name in result["only_in_one"]:
        stdout.print(f"only one engine scored {name}")


def _print_comparison(comparison: Comparison, count: int) -> None:
    for entry in comparison.differences:
        stdout.print(f"{entry.cause}: {entry.what}: {entry.before} -> {entry.after}")
    table = Table(title=f"{comparison.before} against {comparison.after}", title_justify="left")
    for column in ("cell", "samples", "total A", "total B", "Spearman", "moved"):
        table.add_column(column)
    for cell in comparison.cells:
        rho = "-" if cell.spearman is None else f"{cell.spearman:.3f}"
        unknown = cell.samples == "noise unknown"
        totals = (f"{cell.total_before:.3e}", f"{cell.total_after:.3e}")
        table.add_row(cell.name, cell.samples, *totals, rho, "-" if unknown else str(cell.moved))
    stdout.print(table)
    table = Table(title="groups that changed most", title_justify="left")
    for column in ("cell", "group", "A", "B", "change", "verdict"):
        table.add_column(column, overflow="fold")
    changed = [(cell, group) for cell in comparison.cells for group in cell.groups]
    changed.sort(key=lambda pair: (not pair[1].moved, -abs(pair[1].relative or 0.0)))
    for cell, group in changed[:count]:
        scores = ("-" if value is None else f"{value:.3e}" for value in (group.before, group.after))
        change = "-" if group.relative is None else f"{100 * group.relative:+.1f} %"
        table.add_row(cell.name, group.layer, *scores, change, group.status)
    stdout.print(table)
