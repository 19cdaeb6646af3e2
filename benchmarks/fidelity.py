"""How well scores stand for the true KL divergence of each group, and what they cost.

From the root of the repository:

    python -m benchmarks.fidelity --model CHECKPOINT --json fidelity.json --plot fidelity.svg

The truth is method ``kl_div``: every group of every pair quantized alone, KL divergence over all
real tokens. It is measured once and kept in the JSON file; a later call with the same model,
captions and pairs reads it from there. Against it stand

- ``gradient``: ModelOpt's formula, without padding, as ``autoquant.method=gradient`` has it;
- ``fisher`` at 1 to 16 draws, as ``autoquant.method=fisher`` has it, the median of several seeds;
- ``ModelOpt``: ``mtq.auto_quantize`` as its examples run it, on captions padded on the left.

*rho* is Spearman's rank correlation over the groups, *ratio* the estimate over the truth (a proxy
has none), *covered* the share of groups whose truth lies in the estimate's 90 % interval.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from benchmarks import _engines, _machine, _plot, _workload
from benchmarks._workload import Cell, Workload
from qsens.engine import fisher, fused
from qsens.engine.budget import plan_budget
from qsens.engine.calibrate import Maxima, calibrate
from qsens.engine.candidates import Candidates, distinct
from qsens.engine.checkpoint import resolve_device
from qsens.engine.divergence import diverge
from qsens.engine.groups import Group, find_groups
from qsens.engine.scores import PassScores
from qsens.errors import QsensError

PAIRS = (
    "wfp4_afp8",
    "wfp4_afp16",
    "wfp8_afp8",
    "wfp8_afp16",
    "wint8_afp16",
    "wint8_afp8",
    "wint8_aint8",
)
DRAWS = (1, 2, 4, 8, 16)
_REPEATS = 3
_Z90 = 1.6449  # of a normal distribution: 5 % lie above


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="directory of a checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--captions", type=Path, help="samples, one a line")
    parser.add_argument("--count", type=int, default=16, help="samples to use")
    parser.add_argument("--pairs", type=lambda text: text.split(","), default=list(PAIRS))
    parser.add_argument("--draws", type=_numbers, default=list(DRAWS))
    parser.add_argument("--seeds", type=int, default=5, help="seeds of fisher")
    parser.add_argument("--no-modelopt", action="store_true", help="leave ModelOpt out")
    parser.add_argument("--json", type=Path, help="write the numbers there, and read the truth")
    parser.add_argument("--plot", type=Path, help="write estimates against the truth there, as SVG")
    given = parser.parse_args(arguments)
    try:
        results = _run(given)
    except QsensError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _print(results)
    if given.plot:
        given.plot.write_text(_drawn(results), encoding="utf-8")
    return 0


def _run(given: argparse.Namespace) -> dict[str, Any]:
    load = _workload.build(
        model=given.model,
        shape=None,
        device=resolve_device(given.device),
        dtype=given.dtype,
        captions=given.captions,
        batch_size=8,
        score_size=given.count,
    )
    count = min(given.count, len(load.samples))
    cells = [Cell(pair, str(count), count, count) for pair in _workload.pair_configs(given.pairs)]
    candidates = distinct([_engines.request(cell) for cell in cells])
    groups = [group for group in find_groups(load.model, load.disabled) if group.covered]
    snapshots = candidates.snapshots()
    maxima: dict[int, Maxima] = {}
    if snapshots:
        maxima = calibrate(load.model, load.samples, groups, snapshots=snapshots)
    identity = {
        "model": load.name,
        "captions": load.captions,
        "samples": hashlib.sha256(repr(load.samples.ids[:count]).encode()).hexdigest()[:12],
        "count": count,
        "dtype": given.dtype,
        "pairs": sorted(given.pairs),
    }
    results: dict[str, Any] = {
        "identity": identity,
        "machine": _machine.describe(load.device),
        "versions": _machine.versions(),
        "groups": [group.name for group in groups],
    }
    truth = _known_truth(given.json, identity)
    if truth is None:
        truth = _measure_truth(load, cells, candidates, groups, maxima)
    results["truth"] = truth

    def keep() -> None:
        if given.json:
            given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    keep()
    results["methods"] = {}
    results["methods"]["gradient"] = _judge_gradient(load, cells, candidates, groups, maxima, truth)
    keep()
    for draws in given.draws:
        results["methods"][f"fisher, {draws}"] = _judge_fisher(
            load, cells, candidates, groups, maxima, truth, draws, given.seeds
        )
        keep()
    if not given.no_modelopt:
        results["methods"]["ModelOpt"] = _judge_modelopt(load, cells, groups, truth)
        keep()
    return results


def _known_truth(file: Path | None, identity: dict[str, Any]) -> dict[str, Any] | None:
    if file is None or not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    return found["truth"] if found.get("identity") == identity else None


def _measure_truth(
    load: Workload,
    cells: Sequence[Cell],
    candidates: Candidates,
    groups: Sequence[Group],
    maxima: dict[int, Maxima],
) -> dict[str, Any]:
    """Return nats by pair, in the order of the groups, and the seconds of all pairs."""
    started, cpu = time.monotonic(), time.process_time()
    found = diverge(load.model, load.samples, groups, candidates, maxima, boundaries=[])
    return {
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - cpu,
        "nats": {cell.pair.name: _sums(found, candidates, cell).tolist() for cell in cells},
    }


def _judge_gradient(
    load: Workload,
    cells: Sequence[Cell],
    candidates: Candidates,
    groups: Sequence[Group],
    maxima: dict[int, Maxima],
    truth: dict[str, Any],
) -> dict[str, Any]:
    budget = plan_budget(load.model, groups, candidates, limit_gb=None)
    # Once more than is counted: the first run compiles kernels.
    spent = []
    for _ in range(_REPEATS + 1):
        started, cpu = time.monotonic(), time.process_time()
        found = fused.score(load.model, load.samples, groups, candidates, maxima, budget=budget)
        _machine.synchronize(load.device)
        spent.append((time.monotonic() - started, time.process_time() - cpu))
    seconds, cpu_seconds = map(statistics.median, zip(*spent[1:], strict=True))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "pairs": {
            cell.pair.name: {"rho": _rho(_sums(found, candidates, cell), truth, cell)}
            for cell in cells
        },
    }


def _judge_fisher(
    load: Workload,
    cells: Sequence[Cell],
    candidates: Candidates,
    groups: Sequence[Group],
    maxima: dict[int, Maxima],
    truth: dict[str, Any],
    draws: int,
    seeds: int,
) -> dict[str, Any]:
    """Return the median over seeds of every figure, and the estimates of the first seed."""
    budget = plan_budget(load.model, groups, candidates, limit_gb=None, losses=draws)
    seen: dict[str, list[dict[str, float]]] = {cell.pair.name: [] for cell in cells}
    first: dict[str, list[float]] = {}
    seconds, cpu_seconds = [], []
    for seed in range(seeds):
        started, cpu = time.monotonic(), time.process_time()
        found = fisher.estimate(
            load.model,
            load.samples,
            groups,
            candidates,
            maxima,
            draws=draws,
            seed=seed,
            budget=budget,
        )
        seconds.append(time.monotonic() - started)
        cpu_seconds.append(time.process_time() - cpu)
        for cell in cells:
            seen[cell.pair.name].append(_figures(found, candidates, cell, truth))
            first.setdefault(cell.pair.name, _sums(found, candidates, cell).tolist())
    return {
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu_seconds),
        "pairs": {
            pair: {name: statistics.median(each[name] for each in all_) for name in all_[0]}
            for pair, all_ in seen.items()
        },
        "nats": first,
    }


def _figures(
    found: PassScores, candidates: Candidates, cell: Cell, truth: dict[str, Any]
) -> dict[str, float]:
    ours, theirs = _sums(found, candidates, cell), np.array(truth["nats"][cell.pair.name])
    ratio = ours / theirs
    figures = {
        "rho": _rho(ours, truth, cell),
        "ratio": float(np.median(ratio)),
        "ratio_10": float(np.quantile(ratio, 0.1)),
        "ratio_90": float(np.quantile(ratio, 0.9)),
    }
    assert found.draws is not None
    drawn = found.draws[:, candidates.of_cell[cell.name]]
    if drawn.shape[-1] > 1:
        error = (drawn.var(dim=-1) / drawn.shape[-1]).sum(dim=1).sqrt().numpy()
        figures["covered"] = float((np.abs(ours - theirs) <= _Z90 * error).mean())
    return figures


def _judge_modelopt(
    load: Workload, cells: Sequence[Cell], groups: Sequence[Group], truth: dict[str, Any]
) -> dict[str, Any]:
    seconds, cpu_seconds, pairs = 0.0, 0.0, {}
    for cell in cells:
        run = _engines.run_modelopt(load, cell, "padded_left")
        seconds += run.measured.total
        cpu_seconds += run.measured.cpu_seconds
        scores = np.array([run.scores.get(group.name, 0.0) for group in groups])
        pairs[cell.pair.name] = {"rho": _rho(scores, truth, cell)}
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "pairs": pairs}


def _sums(found: PassScores, candidates: Candidates, cell: Cell) -> np.ndarray:
    sums: np.ndarray = found.per_sample[:, candidates.of_cell[cell.name]].sum(dim=-1).numpy()
    return sums


def _rho(scores: np.ndarray, truth: dict[str, Any], cell: Cell) -> float:
    return float(spearmanr(scores, truth["nats"][cell.pair.name]).statistic)


def _print(results: dict[str, Any]) -> None:
    console = Console()
    identity = results["identity"]
    console.print(
        f"{identity['model']}, {identity['count']} samples of {identity['captions']}, "
        f"{identity['dtype']}, {len(results['groups'])} groups"
    )
    truth = results["truth"]
    console.print(
        f"true KL of all groups and pairs: {truth['seconds']:.0f} s, "
        f"{truth['cpu_seconds']:.0f} s of processors"
    )
    cost = Table("method", "s", "CPU s", title="All pairs together")
    for name, method in results["methods"].items():
        cost.add_row(name, f"{method['seconds']:.1f}", f"{method['cpu_seconds']:.1f}")
    console.print(cost)
    columns = ["pair", "method", "rho", "ratio, median", "10 %", "90 %", "covered"]
    table = Table(*columns, title="Against the true KL divergence of each group")
    for pair in identity["pairs"]:
        for name, method in results["methods"].items():
            found = method["pairs"][pair]
            ratios = [found.get(key) for key in ("ratio", "ratio_10", "ratio_90")]
            table.add_row(
                pair,
                name,
                f"{found['rho']:.3f}",
                *("" if value is None else f"{value:.2f}" for value in ratios),
                f"{found['covered']:.0%}" if "covered" in found else "",
            )
        table.add_section()
    console.print(table)


def _drawn(results: dict[str, Any]) -> str:
    """Return a plot of the estimates at 8 draws, or the most that were taken, by pair."""
    draws = 8 if "fisher, 8" in results["methods"] else max(_draws(results))
    found = results["methods"][f"fisher, {draws}"]["nats"]
    count, truth = results["identity"]["count"], results["truth"]["nats"]
    return _plot.scatter(
        {
            pair: list(zip(truth[pair], found[pair], strict=True))
            for pair in results["identity"]["pairs"]
        },
        f"{results['identity']['model']}: KL divergence of each group alone, {draws} draws",
        f"true KL divergence, nats, sum over {count} captions",
        "estimate, nats",
    )


def _draws(results: dict[str, Any]) -> list[int]:
    names = [name for name in results["methods"] if name.startswith("fisher")]
    return [int(name.split(", ")[1]) for name in names]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
