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
import copy
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import modelopt.torch.quantization as mtq
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

from qsens.config import PairConfig, Roots, choices
from qsens.demo.recipe import RECIPE, held_out_captions
from qsens.engine.captions import read_captions
from qsens.engine.checkpoint import load_model, load_tokenizer, resolve_device
from qsens.engine.groups import Group, find_groups
from qsens.engine.quantizer import on_cpu
from qsens.engine.samples import Batch, equal_length_batches, tokenize
from qsens.errors import AnswerIsNo, QsensError
from qsens.export.modelopt import dump
from qsens.grid import Plan
from qsens.pipeline.plan import plan_sweep
from qsens.pipeline.recipe import recipe_of
from qsens.pipeline.sweep import run_sweep
from qsens.report.sweep import SUMMARY, Summary, read_summary
from qsens.store import Store

MODELOPT = "ModelOpt"
METHODS = ("gradient", "fisher")
# ModelOpt's solver takes scores near 1e-5 for 0.
_LOSS_SCALE = 1e4


@dataclass(frozen=True)
class Measured:
    """What one way to quantize does.

    Attributes:
        name: What chose the formats.
        bits: Bits a weight over what may be quantized, a tied head included at 16.
        loss: Increase of the loss, nats a token.
        divergence: KL divergence from the unquantized model, nats a token.
        predicted: The recipe's own prediction; none where there is none in nats.
        by_caption: Increase of the loss summed over each caption, nats.
        labels: Labels of each caption.
    """

    name: str
    bits: float
    loss: float
    divergence: float
    predicted: float | None
    by_caption: np.ndarray
    labels: np.ndarray

    def against(self, other: Measured) -> tuple[float, float]:
        """Return how much more loss a token this has than ``other``, with its standard error.

        Both ran on the same captions: what all captions have in common drops out.
        """
        difference = self.by_caption - other.by_caption
        mean = float(difference.sum() / self.labels.sum())
        rest = difference - mean * self.labels
        return mean, float(np.sqrt(len(rest) * rest.var(ddof=1)) / self.labels.sum())

    def numbers(self) -> dict[str, Any]:
        """Return it as JSON can hold it, without the captions."""
        numbers = {"name": self.name, "bits": self.bits, "loss": self.loss}
        return numbers | {"divergence": self.divergence, "predicted": self.predicted}


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
        self.model = load_model(model, resolve_device("cpu"))
        tied = self.plan.checkpoint.tied_head is not False
        self.disabled = (*model.vision_patterns, *(("*lm_head*",) if tied else ()))
        self.covered = find_groups(self.model, model.vision_patterns)
        tokenizer, longest = load_tokenizer(model), self.plan.config.dataset.calib_seq_len
        cell = self.plan.cells[0]
        captions = read_captions(self.plan.samples[cell.size].path)[: self.plan.samples_used(cell)]
        self.calibration = self._batches(tokenize(captions, tokenizer, longest=longest))
        self.held_out = self._batches(
            tokenize(held_out_captions(RECIPE), tokenizer, longest=longest)
        )

    def sweep(self, method: str) -> tuple[Summary, Plan]:
        """Run and publish a sweep."""
        plan = self._plan(method)
        _, errors = run_sweep(plan)
        if errors:
            raise errors[0]
        return read_summary(Store(plan).sweep_dir() / SUMMARY), plan

    def uniform(self, pair: PairConfig) -> dict[str, Any]:
        """Return the configuration of one pair everywhere but in what stays at 16 bits."""
        off = [{"quantizer_name": f"{pattern}", "enable": False} for pattern in self.disabled]
        return {**pair.modelopt(), "quant_cfg": [*pair.quant_cfg(), *off]}

    def measure(
        self, name: str, config: dict[str, Any], predicted: float | None = None
    ) -> Measured:
        """Quantize a copy by ``config`` and run it on the captions held out."""
        model = copy.deepcopy(self.model)
        with _quiet():
            mtq.quantize(model, on_cpu(config), self._run_calibration)
        return self.judge(name, model, predicted)

    def auto_quantize(self, bits: float) -> Measured:
        """Let ModelOpt choose from the same formats at the same bits."""
        model = copy.deepcopy(self.model)
        with _quiet(), torch.enable_grad():
            model, _ = mtq.auto_quantize(
                model,
                constraints={
                    "effective_bits": bits,
                    "cost": {
                        "excluded_module_name_patterns": list(
                            self.plan.config.model.vision_patterns
                        )
                    },
                },
                quantization_formats=[on_cpu(_stated(pair)) for pair in self.pairs],
                data_loader=self.calibration,
                forward_step=_logits,
                loss_func=lambda logits, batch: _LOSS_SCALE * _losses(logits, batch).mean(),
                disabled_layers=list(self.disabled),
                num_calib_steps=len(self.calibration),
                num_score_steps=len(self.calibration),
                verbose=False,
            )
        return self.judge(MODELOPT, model)

    def judge(self, name: str, model: nn.Module, predicted: float | None = None) -> Measured:
        """Measure a quantized model against the unquantized one."""
        lost, labels = [], []
        divergence, tokens = 0.0, 0
        with torch.no_grad():
            for batch in self.held_out:
                before, after = _logits(self.model, batch), _logits(model, batch)
                change = _losses(after, batch).double() - _losses(before, batch).double()
                lost += change.sum(dim=1).tolist()
                labels += [change.shape[1]] * len(change)
                p, q = (logits.double().log_softmax(dim=-1) for logits in (before, after))
                divergence += float((p.exp() * (p - q)).sum())
                tokens += batch.input_ids.numel()
        bits, mean = self._bits(model), sum(lost) / sum(labels)
        found = (np.array(lost), np.array(labels))
        return Measured(name, bits, mean, divergence / tokens, predicted, *found)

    def _bits(self, model: nn.Module) -> float:
        """Return bits a weight as ModelOpt's quantizers state them."""
        return effective_bits(model, [group for group in self.covered if group.covered])

    def _plan(self, method: str) -> Plan:
        words = [*self.words, f"autoquant.method={method}", "autoquant.score_size=512"]
        return plan_sweep("demo", words, roots=self.roots)

    def _run_calibration(self, model: nn.Module) -> None:
        for batch in self.calibration:
            _logits(model, batch)

    @staticmethod
    def _batches(samples: Any) -> list[Batch]:
        return equal_length_batches(samples, boundaries=[len(samples)], batch_size=16)


def _stated(pair: PairConfig) -> dict[str, Any]:
    """Return a pair as ModelOpt takes it, its bits stated on the inputs as well.

    ModelOpt counts the fewest bits that any quantizer of a format has: FP8 weights with INT4
    activations would count as 4 bits a weight, and its choice would miss the target.
    """
    entries = [
        {**entry, "cfg": {**entry["cfg"], "effective_bits": pair.effective_bits}}
        if "cfg" in entry
        else entry
        for entry in pair.quant_cfg()
    ]
    return {**pair.modelopt(), "quant_cfg": entries}


def effective_bits(model: nn.Module, groups: Sequence[Group]) -> float:
    """Return bits a weight over ``groups``; what has no quantizer on counts 16."""
    used = total = 0.0
    for name in (name for group in groups for name in group.members):
        module = model.get_submodule(name)
        count = module.weight.numel()
        quantizer = module.weight_quantizer
        total += count
        used += count * (quantizer._effective_bits if quantizer.is_enabled else 16.0)
    return used / total


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
            alone = [bench.measure(pair.name, bench.uniform(pair)) for pair in bench.pairs]
            for bits in given.bits:
                found = [entry for entry in alone if entry.bits <= bits]
                found += _recipes(bench, sweeps, bits)
                with contextlib.suppress(AnswerIsNo):
                    found.append(bench.auto_quantize(bits))
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
        found.append(bench.measure(f"recipe by {method}", config, predicted))
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


def _logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return ``(samples, tokens, vocabulary)``; batches hold no padding."""
    logits: torch.Tensor = model(input_ids=batch.input_ids, use_cache=False).logits
    return logits


def _losses(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the cross-entropy of every label, ``(samples, labels)``, in nats."""
    labels = batch.input_ids[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels.flatten(), reduction="none"
    )
    return losses.view(labels.shape)


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    sys.exit(main())
