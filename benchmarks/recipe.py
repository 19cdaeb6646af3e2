"""What a recipe costs on captions that nobody has seen, against each pair alone and ModelOpt.

From the root of the repository, on the demo checkpoint (`qsens demo-model`):

    python -m benchmarks.recipe --model models/tiny_qwen3_vl/checkpoints/tiny-qwen3-vl

A sweep of all pairs is run and published in a temporary directory, by methods ``gradient`` and
``fisher``. Its recipe at each target is written as ModelOpt's YAML and applied by ``mtq.quantize``,
calibrated on the sweep's captions; so is each pair alone, and what ``mtq.auto_quantize`` chooses
from the same formats at the same bits, with its loss scaled so that its solver finds the optimum.
Every model quantized in this way is measured on the captions that the demo checkpoint's training
holds out: the increase of the loss, with its difference from ModelOpt's choice and the standard
error of that over the captions, and the KL divergence from the unquantized model. A tied head stays
at 16 bits for all of them, and counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import yaml
from rich.console import Console
from rich.table import Table

from qsens.config import Roots, choices
from qsens.demo.recipe import RECIPE, held_out_captions
from qsens.engine.captions import read_captions
from qsens.engine.checkpoint import load_model, load_tokenizer, resolve_device
from qsens.engine.groups import find_groups
from qsens.engine.samples import tokenize
from qsens.engine.trial import MODELOPT, Measured, Trial
from qsens.errors import AnswerIsNo, QsensError
from qsens.export.modelopt import dump
from qsens.grid import Plan
from qsens.pipeline.plan import plan_sweep
from qsens.pipeline.recipe import recipe_of
from qsens.pipeline.sweep import run_sweep
from qsens.report.sweep import SUMMARY, Summary, read_summary
from qsens.store import Store

METHODS = ("gradient", "fisher")


class Bench:
    """A checkpoint with the captions to calibrate and to measure on."""

    def __init__(self, path: Path, pairs: Sequence[str], size: str, results: Path) -> None:
        roots = Roots.from_environment()
        self.roots = Roots(root=roots.root, results=results, configs=roots.configs)
        self.words = [
            f"model.path={path}",
            f"quant_pair={','.join(pairs)}",
            f"dataset.size={size}",
            "autoquant.device=cpu",
        ]
        self.plan = self._plan("gradient")
        model = self.plan.config.model
        self.pairs = [self.plan.pair(cell) for cell in self.plan.cells]
        tied = self.plan.checkpoint.tied_head is not False
        tokenizer, longest = load_tokenizer(model), self.plan.config.dataset.calib_seq_len
        cell = self.plan.cells[0]
        captions = read_captions(self.plan.samples[cell.size].path)[: self.plan.samples_used(cell)]
        loaded = load_model(model, resolve_device("cpu"))
        self.trial = Trial(
            model=loaded,
            groups=find_groups(loaded, model.vision_patterns),
            excluded=model.vision_patterns,
            kept=("*lm_head*",) if tied else (),
            calibration=tokenize(captions, tokenizer, longest=longest),
            held_out=tokenize(held_out_captions(RECIPE), tokenizer, longest=longest),
        )

    def sweep(self, method: str) -> tuple[Summary, Plan]:
        """Run and publish a sweep."""
        plan = self._plan(method)
        _, errors = run_sweep(plan)
        if errors:
            raise errors[0]
        return read_summary(Store(plan).sweep_dir() / SUMMARY), plan

    def _plan(self, method: str) -> Plan:
        words = [*self.words, f"autoquant.method={method}", "autoquant.score_size=512"]
        return plan_sweep("demo-text", words, roots=self.roots)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="the demo checkpoint")
    parser.add_argument("--bits", type=_floats, default=[6.0], help="targets, by comma")
    parser.add_argument("--size", default="medium", choices=("small", "medium", "large"))
    parser.add_argument("--pairs", type=lambda text: text.split(","), default=choices("quant_pair"))
    parser.add_argument("--json", type=Path, help="write the numbers there")
    given = parser.parse_args(arguments)
    console = Console()
    numbers: dict[str, list[dict[str, Any]]] = {}
    try:
        with tempfile.TemporaryDirectory() as results:
            bench = Bench(given.model.resolve(), given.pairs, given.size, Path(results))
            sweeps = {method: bench.sweep(method) for method in METHODS}
            alone = [
                bench.trial.measure(pair.name, bench.trial.uniform(pair)) for pair in bench.pairs
            ]
            for bits in given.bits:
                found = [entry for entry in alone if entry.bits <= bits]
                found += _recipes(bench, sweeps, bits)
                with contextlib.suppress(AnswerIsNo):
                    found.append(bench.trial.auto_quantize(bench.pairs, bits))
                numbers[f"{bits:g}"] = [entry.numbers() for entry in found]
                console.print(_table(found, bits))
    except QsensError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.json:
        given.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return 0


def _recipes(bench: Bench, sweeps: dict[str, tuple[Summary, Plan]], bits: float) -> list[Measured]:
    found = []
    for method, (summary, plan) in sweeps.items():
        recipe = recipe_of(summary, plan, bits)
        config = yaml.safe_load(dump(recipe))
        predicted = recipe.damage if method == "fisher" else None
        found.append(bench.trial.measure(f"recipe by {method}", config, predicted))
    return found


def _table(found: Sequence[Measured], bits: float) -> Table:
    columns = ("formats", "bits", "loss increase", "against ModelOpt", "KL", "predicted KL")
    modelopt = next((entry for entry in found if entry.name == MODELOPT), None)
    table = Table(*columns, title=f"At most {bits:g} bits; nats a token, captions held out")
    for entry in sorted(found, key=lambda entry: entry.divergence):
        against = ""
        if modelopt is not None and entry is not modelopt:
            more, error = entry.against(modelopt)
            against = f"{more:+.5f} ± {error:.5f}"
        predicted = "" if entry.predicted is None else f"{entry.predicted:.5f}"
        table.add_row(
            entry.name,
            f"{entry.bits:.4f}" + (" (too many)" if entry.bits > bits else ""),
            f"{entry.loss:+.5f}",
            against,
            f"{entry.divergence:.5f}",
            predicted,
        )
    return table


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
