"""How long qsens' fused engine and NVIDIA ModelOpt take for the same scores, side by side.

From the root of the repository:

    python -m benchmarks.fused_vs_modelopt --model CHECKPOINT --json bench.json
    python -m benchmarks.fused_vs_modelopt --shape qwen3-vl-4b --growth --json bench.json

ModelOpt runs one ``mtq.auto_quantize`` for every pair and size, as a user would by hand, each on a
fresh copy of the model; the copy costs no seconds. The fused engine calibrates and scores all
cells in one go. Both run in this process, after a first call of each pair on two samples that is
not counted; ModelOpt's CUDA extensions are built before that.

``--baseline`` says what ModelOpt is fed: ``longest``, eight consecutive captions padded to the
longest of them; ``padded512``, padded to 512 tokens; ``reference``, captions of one length each,
without padding, which is what ``autoquant.engine=modelopt`` runs. Padding enters ModelOpt's
calibrated amax, so only ``reference`` gives scores that must be equal to ours; it also scores
the same batches with the fused engine and reports how far both are apart.

A machine that is held for minutes only can measure in pieces: ``--cells`` picks some, and
``--resume FILE`` adds them to what FILE holds. The fused engine runs again with every piece, for
the piece's cells and for the whole grid, so that both engines always meet on the same machine.

The *floor* is the time of the matrix products that no engine can do without, at the best rate that
this machine reaches in large products of the model's data type.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("TQDM_DISABLE", "1")


from benchmarks import _engines, _machine, _results, _workload
from benchmarks._engines import Baseline, FusedRun
from benchmarks._results import MergeError
from benchmarks._workload import Cell, Workload
from qsens.checkpoint.loading import resolve_device
from qsens.errors import QsensError

GROWTH_SAMPLES = (16, 64, 256, 1024, 4096)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        results = _run(given, parser)
    except (QsensError, MergeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _results.print_tables(results)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fused_vs_modelopt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="directory of a checkpoint")
    what.add_argument("--shape", choices=_workload.SHAPES, help="a model with random weights")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU")
    parser.add_argument("--captions", type=Path, help="samples, one a line")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a nominal batch")
    parser.add_argument("--score-size", type=int, default=128, help="samples scored at most")
    parser.add_argument("--pairs", type=_names, default=list(_workload.PAIRS))
    parser.add_argument("--sizes", type=_names, default=["small", "medium", "large"])
    parser.add_argument("--cells", type=_names, help="pair-size,...: the part to measure now")
    parser.add_argument("--baseline", choices=get_args(Baseline), default="longest")
    parser.add_argument("--fused-only", action="store_true", help="leave ModelOpt out")
    parser.add_argument("--growth", action="store_true", help="by pairs and by samples, fused")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--resume", type=Path, help="add to the numbers of that file")
    return parser


def _run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    device = resolve_device(given.device)
    load = _workload.build(
        model=given.model,
        shape=given.shape,
        device=device,
        dtype=given.dtype or ("float32" if device.type == "cpu" else "bfloat16"),
        captions=given.captions,
        batch_size=given.batch_size,
        score_size=given.score_size,
    )
    unknown = [size for size in given.sizes if size not in load.sizes]
    if unknown:
        parser.error(f"--sizes: no {', '.join(unknown)}; there are {', '.join(load.sizes)}")
    pairs = _workload.pair_configs(given.pairs)
    grid = {cell.name: cell for pair in pairs for cell in [load.cell(pair, s) for s in given.sizes]}
    unknown = [name for name in given.cells or () if name not in grid]
    if unknown:
        parser.error(f"--cells: no {', '.join(unknown)}; there are {', '.join(grid)}")
    chosen = [grid[name] for name in given.cells or grid]

    results = _results.start(load.identity(), list(grid))
    file = given.resume or given.json
    if given.resume:
        results = _results.resume(given.resume, results)
    baseline: Baseline | None = None if given.fused_only else given.baseline
    piece = _begin(load, chosen, baseline)

    def keep() -> dict[str, Any]:
        merged = _results.add(results, piece)
        if file:
            _results.write(file, merged)
        return merged

    fused = _engines.run_fused(load, chosen)
    piece["fused"] = [_describe(load, chosen, fused, piece["matmul_rate"])]
    if len(chosen) < len(grid):
        whole = list(grid.values())
        run = _engines.run_fused(load, whole)
        piece["fused"].append(_describe(load, whole, run, piece["matmul_rate"]))
    merged = keep()
    if baseline:
        same: _engines.Scores = {}
        if baseline == "reference":
            same = _engines.run_fused_on_reference_batches(load, chosen)
        for cell in chosen:
            run_there = _engines.run_modelopt(load, cell, baseline)
            _say(f"ModelOpt {cell.name}: {run_there.measured.total:.1f} s")
            piece["modelopt"][cell.name] = {
                **_measured(run_there.measured),
                "padding_share": run_there.padding_share,
                "agreement": {
                    "own_batches": _engines.agreement(fused.scores[cell.name], run_there.scores)
                }
                | (
                    {"same_batches": _engines.agreement(same[cell.name], run_there.scores)}
                    if same
                    else {}
                ),
            }
            merged = keep()
    if given.growth:
        results["growth"] = _grow(load, pairs, given.sizes[0], piece["matmul_rate"])
        merged = keep()
    return merged


def _begin(load: Workload, cells: Sequence[Cell], baseline: Baseline | None) -> dict[str, Any]:
    """Return a piece without runs, both engines warmed up."""
    warm_up = _engines.warm_up(load, cells, baseline)
    _say("warmed up")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": _machine.describe(load.device),
        "versions": _machine.versions(),
        "matmul_rate": _machine.matmul_rate(load.device, load.dtype),
        "baseline": baseline or "none",
        "warm_up": warm_up,
        "fused": [],
        "modelopt": {},
    }


def _grow(
    load: Workload, first: Sequence[Any], size: str, rate: float
) -> dict[str, list[dict[str, Any]]]:
    """Return how the fused engine's cost grows, with pairs at one size and with samples."""
    others = [pair for pair in _workload.pair_configs([]) if pair not in first]
    pairs = [*first, *others]
    counts = sorted({2**power for power in range(len(pairs).bit_length())} | {7, len(pairs)})
    by_pairs = []
    for count in [count for count in counts if count <= len(pairs)]:
        cells = [load.cell(pair, size) for pair in pairs[:count]]
        _engines.run_fused(load, [load.cell(pair, 2) for pair in pairs[:count]])  # first calls
        run = _engines.run_fused(load, cells)
        by_pairs.append({"pairs": count, **_describe(load, cells, run, rate)})
        _say(f"{count} pairs: {run.measured.total:.1f} s")
    by_samples = []
    for count in GROWTH_SAMPLES:
        samples = load.repeated(count)
        cells = [Cell(pair, str(count), count, min(count, load.score_size)) for pair in first]
        run = _engines.run_fused(load, cells, samples=samples)
        by_samples.append({"samples": count, **_describe(load, cells, run, rate, samples=samples)})
        _say(f"{count} samples: {run.measured.total:.1f} s")
    return {"pairs": by_pairs, "samples": by_samples}


def _describe(
    load: Workload, cells: Sequence[Cell], run: FusedRun, rate: float, samples: Any = None
) -> dict[str, Any]:
    samples = samples or load.samples
    _say(f"fused, {len(cells)} cells: {run.measured.total:.1f} s")
    return {
        "cells": [cell.name for cell in cells],
        "candidates": run.candidates,
        **_measured(run.measured),
        "tokens": {
            "calibrate": samples.tokens(run.calibrated),
            "score": samples.tokens(max(cell.scored for cell in cells)),
        },
        "padding_share": run.padding_share,
        "operations": run.work.total,
        "floor": run.work.total / rate,
    }


def _measured(measured: _machine.Measured) -> dict[str, Any]:
    return {
        "seconds": measured.seconds,
        "cpu_seconds": measured.cpu_seconds,
        "peak": measured.peak,
    }


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
