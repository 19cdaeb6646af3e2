"""The JSON that a benchmark writes, how pieces of it add up, and how it is printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCHEMA = 1
_GIB = 1 << 30

Results = dict[str, Any]


class MergeError(Exception):
    """Pieces that cannot be put side by side."""


def start(workload: dict[str, Any], grid: Sequence[str]) -> Results:
    """Return results without any piece.

    Args:
        workload: What pieces must share.
        grid: Every cell that a complete benchmark has.
    """
    return {"schema": SCHEMA, "workload": workload, "grid": list(grid), "pieces": []}


def resume(file: Path, fresh: Results) -> Results:
    """Return the results of ``file``, to which pieces can be added; ``fresh`` if there is none.

    Raises:
        MergeError: The file is of another workload or grid.
    """
    if not file.is_file():
        return fresh
    kept: Results = json.loads(file.read_text(encoding="utf-8"))
    for key in ("schema", "workload", "grid"):
        if kept.get(key) != fresh[key]:
            raise MergeError(
                f"{file} has another {key}: {kept.get(key)}, not {fresh[key]}; choose another file"
            )
    return kept


def add(results: Results, piece: dict[str, Any]) -> Results:
    """Return results with one more piece.

    A cell that it measures again is taken out of earlier pieces with the same baseline, and an
    earlier piece that is left without cells goes as a whole.
    """
    pieces = []
    for earlier in results["pieces"]:
        if earlier["baseline"] == piece["baseline"]:
            left = {
                cell: run
                for cell, run in earlier["modelopt"].items()
                if cell not in piece["modelopt"]
            }
            if not left and (earlier["modelopt"] or not piece["modelopt"]):
                continue
            earlier = {**earlier, "modelopt": left}
        pieces.append(earlier)
    return {**results, "pieces": [*pieces, piece]}


def write(file: Path, results: Results) -> None:
    """Write results with their summary."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**results, "summary": summarize(results)}, indent=1)
    file.write_text(text + "\n", encoding="utf-8")


def summarize(results: Results) -> dict[str, Any]:
    """Return, by baseline: seconds of both engines over the cells that both have run.

    ``fused`` adds up the runs that stand beside each piece's cells, on the same machine minutes
    apart. ``fused_grid`` is one pass over the whole grid, the mean of those that were run; it is
    set against ModelOpt where every cell of the grid has been measured.
    """
    summary = {}
    for baseline in dict.fromkeys(piece["baseline"] for piece in results["pieces"]):
        pieces = [
            piece
            for piece in results["pieces"]
            if piece["baseline"] == baseline and piece["modelopt"]
        ]
        runs = {cell: run for piece in pieces for cell, run in piece["modelopt"].items()}
        grids = [
            run
            for piece in results["pieces"]
            for run in piece["fused"]
            if set(run["cells"]) == set(results["grid"])
        ]
        entry: dict[str, Any] = {
            "cells": len(runs),
            "of": len(results["grid"]),
            "modelopt": sum(total(run) for run in runs.values()),
            "fused": sum(total(piece["fused"][0]) for piece in pieces),
            "fused_grid": _mean([total(run) for run in grids]),
            "floor": _mean([run["floor"] for run in grids]),
            "pairs": _by_pair(runs),
        }
        entry["ratio"] = _over(entry["modelopt"], entry["fused"])
        complete = set(runs) == set(results["grid"])
        entry["ratio_grid"] = _over(entry["modelopt"], entry["fused_grid"]) if complete else None
        summary[baseline] = entry
    return summary


def total(run: dict[str, Any]) -> float:
    """Return the seconds of a run, all phases."""
    return float(sum(run["seconds"].values()))


def tables(results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return what to print: title, header and rows of each table."""
    made = []
    for baseline, entry in summarize(results).items():
        runs = {
            cell: run
            for piece in results["pieces"]
            if piece["baseline"] == baseline
            for cell, run in piece["modelopt"].items()
        }
        rows = [
            [
                cell,
                *_seconds(run),
                _gib(run["peak"]),
                *_apart(run["agreement"]["own_batches"]),
                *_apart(run["agreement"].get("same_batches")),
            ]
            for cell, run in runs.items()
        ]
        made.append((f"ModelOpt, batches: {baseline}", _CELL_HEADER, rows))
        rows = [
            [
                str(entry["cells"]),
                _number(entry["modelopt"]),
                _number(entry["fused"]),
                _times(entry["ratio"]),
                _number(entry["fused_grid"]),
                _times(entry["ratio_grid"]),
            ]
        ]
        made.append((f"Both engines, batches: {baseline}", _RATIO_HEADER, rows))
        rows = [
            [pair, _share(numbers["max"]), _share(numbers["same_max"]), _rho(numbers["spearman"])]
            for pair, numbers in entry["pairs"].items()
        ]
        made.append((f"Scores by pair, batches: {baseline}", _PAIR_HEADER, rows))
    rows = [
        [_cells(run["cells"], results["grid"]), *_fused(run)]
        for piece in results["pieces"]
        for run in piece["fused"]
    ]
    made.append(("Fused, all cells of a row in one go", _FUSED_HEADER, rows))
    for title, key in (("pairs", "pairs"), ("samples", "samples")):
        growth = results.get("growth", {}).get(key)
        if growth:
            rows = [[str(run[key]), *_fused(run)] for run in growth]
            made.append((f"How the cost grows with {title}", [title, *_FUSED_HEADER[1:]], rows))
    return made


_CELL_HEADER = ["cell", "calibrate s", "score s", "total s", "CPU s", "peak GiB", "median diff"]
_CELL_HEADER += ["max diff", "median, same batches", "max, same batches"]
_RATIO_HEADER = ["cells", "ModelOpt s", "fused s", "ratio", "fused s, whole grid", "ratio to it"]
_PAIR_HEADER = ["pair", "largest diff", "largest diff, same batches", "Spearman rho"]
_FUSED_HEADER = ["cells", "candidates", "calibrate s", "score s", "total s", "CPU s", "peak GiB"]
_FUSED_HEADER += ["tokens", "floor s", "over floor"]


def print_tables(results: Results) -> None:
    """Print every table, by rich where it is installed."""
    piece = results["pieces"][-1]
    workload = results["workload"]
    print(f"{workload['model']}, {workload['dtype']}, {piece['date']}")
    print(
        ", ".join(f"{key} {value}" for key, value in (piece["machine"] | piece["versions"]).items())
    )
    print(
        f"{workload['samples']} samples, {workload['tokens']} tokens; "
        f"matrix products at {piece['matmul_rate'] / 1e12:.3g} TFLOP/s"
    )
    print("first calls, not counted: " + _plain_seconds(piece["warm_up"]))
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for title, header, rows in tables(results):
            print(f"\n{title}")
            widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
            for row in [header, *rows]:
                print("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)))
        return
    console = Console(width=160)
    for title, header, rows in tables(results):
        table = Table(*header, title=title, title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        console.print(table)


def _by_pair(runs: dict[str, Any]) -> dict[str, Any]:
    by_pair: dict[str, dict[str, Any]] = {}
    for cell, run in runs.items():
        numbers = by_pair.setdefault(
            cell.rsplit("-", 1)[0], {"max": None, "same_max": None, "spearman": None}
        )
        own, same = run["agreement"]["own_batches"], run["agreement"].get("same_batches") or {}
        numbers["max"] = _worst(max, numbers["max"], own["max"])
        numbers["same_max"] = _worst(max, numbers["same_max"], same.get("max"))
        numbers["spearman"] = _worst(min, numbers["spearman"], own["spearman"])
    return by_pair


def _worst(which: Any, *values: float | None) -> float | None:
    worst: float | None = which((value for value in values if value is not None), default=None)
    return worst


def _seconds(run: dict[str, Any]) -> list[str]:
    seconds = run["seconds"]
    values = (seconds["calibrate"], seconds["score"], total(run), run["cpu_seconds"])
    return [_number(value) for value in values]


def _fused(run: dict[str, Any]) -> list[str]:
    floor = run["floor"]
    tokens = f"{run['tokens']['calibrate']} + {run['tokens']['score']}"
    return [
        str(run["candidates"]),
        *_seconds(run),
        _gib(run["peak"]),
        tokens,
        _number(floor),
        _times(_over(total(run), floor)),
    ]


def _apart(agreement: dict[str, Any] | None) -> list[str]:
    if agreement is None:
        return ["", ""]
    return [_share(agreement["median"]), _share(agreement["max"])]


def _cells(cells: Sequence[str], grid: Sequence[str]) -> str:
    if set(cells) == set(grid):
        return f"whole grid ({len(cells)})"
    return cells[0] if len(cells) == 1 else f"{cells[0]} and {len(cells) - 1} more"


def _plain_seconds(seconds: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.1f} s" for key, value in seconds.items())


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _over(value: float | None, by: float | None) -> float | None:
    return value / by if value and by else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}x"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _rho(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _gib(value: float) -> str:
    return f"{value / _GIB:.2f}"
