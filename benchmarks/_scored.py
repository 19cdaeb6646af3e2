"""Scores of each group against its true KL divergence, and what they cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks import _engines, _machine
from benchmarks._parts import Parts
from benchmarks._workload import Cell, Workload, pair_configs
from qsens.analysis.audit import judge
from qsens.checkpoint.groups import find_groups
from qsens.config import AutoquantConfig
from qsens.engine.amax import AmaxBySize
from qsens.engine.candidates import Candidates
from qsens.engine.scoring_pass import ScoringPass, calibrate, run_pass
from qsens.schema.audit import Point

_REPEATS = 3


class Scored:
    """A model with samples, and every method on them.

    Args:
        load: The model and its samples.
        pairs: Names of the pairs.
        parts: Where what was measured is kept.
    """

    def __init__(self, load: Workload, pairs: Sequence[str], parts: Parts) -> None:
        self.load, self.parts = load, parts
        self.count = min(load.score_size, len(load.samples))
        self.cells = [load.cell(pair, self.count) for pair in pair_configs(pairs)]
        self.groups = [group for group in find_groups(load.model, load.disabled) if group.covered]
        self._amax: AmaxBySize | None = None

    def truth(self) -> dict[str, dict[str, Any]]:
        """Return of every pair the divergence of each group alone, in nats, and the seconds."""
        return {
            cell.pair.name: self.parts.get(f"truth-{cell.pair.name}", partial(self._truth, cell))
            for cell in self.cells
        }

    def methods(self, draws: Sequence[int], seeds: int) -> dict[str, Any]:
        """Return how ``gradient`` and ``fisher`` stand to the truth, by method and pair."""
        truth = self.truth()
        by_method = {"gradient": self.parts.get("gradient", lambda: self._gradient(truth))}
        for count in draws:
            by_method[f"fisher, {count}"] = self.parts.get(
                f"fisher-{count}-{seeds}", partial(self._fisher, truth, count, seeds)
            )
        return by_method

    def modelopt(self) -> dict[str, dict[str, Any]]:
        """Return how ModelOpt's scores stand to the truth, run as its examples do, by pair."""
        truth = self.truth()
        return {
            cell.pair.name: self.parts.get(
                f"modelopt-{cell.pair.name}", partial(self._modelopt, cell, truth)
            )
            for cell in self.cells
        }

    def cost(self, draws: Sequence[int]) -> dict[str, Any]:
        """Return the seconds of a pass over all pairs, by method; rounds of all, in turn."""
        name = f"cost-{self.load.device.type}-{'-'.join(map(str, draws))}"
        cost: dict[str, Any] = self.parts.get(name, lambda: self._cost(draws))
        return cost

    def _run(self, cells: Sequence[Cell], method: str, **settings: int) -> ScoringPass:
        """Run the product's own pass; calibration is done once for all runs."""
        return run_pass(
            self.load.model,
            self.load.samples,
            self.groups,
            [_engines.request(cell) for cell in cells],
            # A single draw, too: no sweep takes fewer than two.
            AutoquantConfig().model_copy(update={"method": method, **settings}),
            boundaries=[],
            calibrated=self._calibrated,
        )

    def _calibrated(self, candidates: Candidates) -> AmaxBySize:
        sizes = candidates.calibration_sizes()
        if sizes and self._amax is None:
            self._amax = calibrate(self.load.model, self.load.samples, self.groups, sizes, [])
        return {size: (self._amax or {})[size] for size in sizes}

    def _truth(self, cell: Cell) -> dict[str, Any]:
        cpu = time.process_time()
        done = self._run([cell], "kl_div")
        return {
            "seconds": done.seconds["score"],
            "cpu_seconds": time.process_time() - cpu,
            "nats": _sums(done, cell).tolist(),
        }

    def _gradient(self, truth: dict[str, Any]) -> dict[str, Any]:
        done = self._run(self.cells, "gradient")
        return {
            cell.pair.name: {"rho": _rho(_sums(done, cell), truth, cell)} for cell in self.cells
        }

    def _fisher(self, truth: dict[str, Any], draws: int, seeds: int) -> dict[str, Any]:
        """Return the median over seeds of every figure, with estimates and verdict of the first."""
        seen: dict[str, list[dict[str, float]]] = {cell.pair.name: [] for cell in self.cells}
        first: dict[str, dict[str, Any]] = {}
        for seed in range(seeds):
            done = self._run(self.cells, "fisher", draws=draws, seed=seed)
            for cell in self.cells:
                points = self._points(done, cell, truth)
                judged = judge(points, in_nats=True).model_dump(exclude={"reason"})
                seen[cell.pair.name].append(judged)
                first.setdefault(cell.pair.name, {"nats": [point.estimate for point in points]})
        return {
            pair: {
                **{
                    name: statistics.median(each[name] for each in all_)
                    for name in all_[0]
                    if name != "verdict" and all_[0][name] is not None
                },
                "verdicts": [each["verdict"] for each in all_],
                **first[pair],
            }
            for pair, all_ in seen.items()
        }

    def _points(self, done: ScoringPass, cell: Cell, truth: dict[str, Any]) -> list[Point]:
        """Return the groups as an audit states them, in nats summed over the samples."""
        ours, theirs = _sums(done, cell), truth[cell.pair.name]["nats"]
        assert done.scores.draws is not None
        drawn = done.scores.draws[:, done.candidates.of_cell[cell.name]]
        errors = [None] * len(ours)
        if drawn.shape[-1] > 1:
            errors = (drawn.var(dim=-1) / drawn.shape[-1]).sum(dim=1).sqrt().tolist()
        return [
            Point(layer=group.name, kind=group.kind, estimate=a, standard_error=error, truth=b)
            for group, a, error, b in zip(self.groups, ours.tolist(), errors, theirs, strict=True)
        ]

    def _modelopt(self, cell: Cell, truth: dict[str, Any]) -> dict[str, Any]:
        run = _engines.run_modelopt(self.load, cell, "padded_left")
        scores = np.array([run.scores.get(group.name, 0.0) for group in self.groups])
        return {
            "seconds": run.measured.total,
            "cpu_seconds": run.measured.cpu_seconds,
            "rho": _rho(scores, truth, cell),
        }

    def _cost(self, draws: Sequence[int]) -> dict[str, Any]:
        runs = {"gradient": partial(self._run, self.cells, "gradient")}
        for count in draws:
            runs[f"fisher, {count}"] = partial(self._run, self.cells, "fisher", draws=count)
        each: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        # One round more than is counted: the first run compiles kernels.
        for _ in range(_REPEATS + 1):
            for name, run in runs.items():
                started, cpu = time.monotonic(), time.process_time()
                run()
                _machine.synchronize(self.load.device)
                each[name].append((time.monotonic() - started, time.process_time() - cpu))
        return {
            "machine": _machine.describe(self.load.device),
            "versions": _machine.versions(),
            "seconds": {
                name: statistics.median(s for s, _ in all_[1:]) for name, all_ in each.items()
            },
            "cpu_seconds": {
                name: statistics.median(c for _, c in all_[1:]) for name, all_ in each.items()
            },
            "each": each,
        }


def _sums(done: ScoringPass, cell: Cell) -> np.ndarray:
    index = done.candidates.of_cell[cell.name]
    sums: np.ndarray = done.scores.per_sample[:, index].sum(dim=-1).numpy()
    return sums


def _rho(scores: np.ndarray, truth: dict[str, Any], cell: Cell) -> float:
    return float(spearmanr(scores, truth[cell.pair.name]["nats"]).statistic)
