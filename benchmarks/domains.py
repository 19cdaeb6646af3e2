"""What a recipe is worth on data that it was not chosen for: captions, and a model's own answers.

    python -m benchmarks.domains --model .cache/smollm2 --device cpu --work .cache/domains

One sweep by ``fisher`` of two data sets, under the amax of both; from it the recipe of each alone,
of both by their tokens, and of their worst case, at each target; each applied by ``mtq.quantize``
and measured on samples of both that the sweep did not use. The answers are the model's own, by
``qsens traces``, to prompts that this makes; a tied head may be quantized. Every part is kept in
the work directory, so that a second call goes on.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import spearmanr

from benchmarks._parts import Parts
from benchmarks._prompts import as_records, prompts
from qsens.analysis.samples import Floats, read_samples
from qsens.config import Roots
from qsens.engine.kl.whole import Measured
from qsens.engine.modelopt.end_to_end import EndToEnd
from qsens.errors import AnswerIsNo
from qsens.grid import Plan
from qsens.pipeline.evaluate_recipe import evaluation_of, held_out
from qsens.pipeline.plan import plan_sweep
from qsens.pipeline.recipe import recipe_of
from qsens.pipeline.sweep import run_sweep
from qsens.published import read_summary
from qsens.recipes.formats import modelopt
from qsens.schema.recipe import Recipe
from qsens.schema.summary import Summary
from qsens.store import SUMMARY, Store

ASKED = 256
# Tokens of sets whose rankings are compared, and how many sets of each.
_SETTLED = (128, 256, 512, 1024)
_SETS = 12
# What a recipe is chosen by: a mix, or both by their tokens, or their worst case.
CHOSEN: Mapping[str, Mapping[str, Any]] = {
    "captions": {"mix": {"captions": 1.0}},
    "traces": {"mix": {"traces": 1.0}},
    "both": {},
    "worst case": {"worst_case": True},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.domains",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="directory of a checkpoint")
    parser.add_argument("--captions", type=Path, help="one a line; the project's when left out")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pairs", default="wnvfp4_afp16,wint4_afp16,wint8_afp16,wfp8_afp8")
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5, 5.0])
    parser.add_argument("--chosen", nargs="+", choices=CHOSEN, default=list(CHOSEN))
    parser.add_argument("--tokens", default="4k", help="of each data set, to score")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=64, help="samples of each to measure on")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--work", type=Path, default=Path(".cache/domains"))
    given = parser.parse_args(arguments)
    here = Roots.from_environment()
    captions = given.captions or here.configs[-1] / "dataset" / "demo" / "captions_large.txt"
    traces = make_traces(given)
    plan = plan_of(given, here, captions.resolve(), traces.resolve())
    identity = {
        "model": given.model.resolve().name,
        "plan": plan.digest,
        "held_out": given.held_out,
    }
    parts = Parts(given.work, identity)
    summary = swept(plan)
    print(settled(plan))
    print(compared(summary))
    trials: dict[str, EndToEnd] = {}
    for bits in given.bits:
        try:
            recipes = {
                name: recipe_of(summary, plan, bits, tied_head=True, **by)
                for name, by in CHOSEN.items()
                if name in {*given.chosen, "both"}
            }
        except AnswerIsNo as error:
            print(error, file=sys.stderr)
            continue
        print(table(bits, recipes, plan, parts, trials, given.held_out))
    return 0


def make_traces(given: argparse.Namespace) -> Path:
    """Return the model's answers to prompts, made where they are not there."""
    out: Path = given.work / "traces.jsonl"
    if out.is_file():
        return out
    given.work.mkdir(parents=True, exist_ok=True)
    asked = given.work / "prompts.jsonl"
    asked.write_text(as_records(prompts(ASKED)), encoding="utf-8")
    options = {
        "out": out,
        "temperature": 0.7,
        "top-p": 0.9,
        "max-new-tokens": given.max_new_tokens,
        "batch-size": 32,
        "dtype": "float32",
        "device": given.device,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "qsens", "traces", *words, str(given.model), str(asked)]
    subprocess.run(command, check=True)
    return out


def plan_of(given: argparse.Namespace, here: Roots, captions: Path, traces: Path) -> Plan:
    """Return the sweep of both data sets."""
    chosen = given.work.resolve() / "configs" / "dataset"
    chosen.mkdir(parents=True, exist_ok=True)
    for name, file in (("captions", captions), ("traces", traces)):
        dataset = {
            "name": name,
            "directory": str(file.parent),
            "files": {"small": file.name},
            "sizes": {"small": f"{given.tokens} tokens"},
            "size": ["small"],
        }
        (chosen / f"{name}.yaml").write_text(yaml.safe_dump(dataset), encoding="utf-8")
    return plan_sweep(
        "single",
        [
            f"model.path={given.model.resolve()}",
            "model.dtype=float32",
            "dataset=captions,traces",
            "dataset.size=small",
            f"quant_pair={given.pairs}",
            "autoquant.method=fisher",
            f"autoquant.draws={given.draws}",
            "autoquant.score_size=100000",
            f"autoquant.device={given.device}",
        ],
        roots=Roots(
            root=here.root,
            results=given.work.resolve() / "results",
            configs=(chosen.parent, *here.configs),
        ),
    )


def swept(plan: Plan) -> Summary:
    """Return the sweep as it was published, run where it was not."""
    _, errors = run_sweep(plan)
    if errors:
        raise errors[0]
    return read_summary(Store(plan).sweep_dir() / SUMMARY)


def settled(plan: Plan) -> str:
    """Return how alike rankings from other samples of one data set are, as a table.

    The samples are cut into sets of as many tokens that follow one another; what is stated is the
    mean of Spearman's correlation over pairs of them.
    """
    lines = [f"| {' | '.join(['pair', 'data set', *(f'{n} tokens' for n in _SETTLED)])} |"]
    lines.append("| --- " * (2 + len(_SETTLED)) + "|")
    store = Store(plan)
    for cell in plan.cells:
        samples = read_samples(store.state(cell), plan.config.autoquant.method)
        if cell.domain is None or samples is None:
            continue
        means = []
        for tokens in _SETTLED:
            rankings = [
                samples.scores[:, start:stop].sum(axis=1) / samples.tokens[start:stop].sum()
                for start, stop in _cuts(samples.tokens, tokens)
            ]
            pairs = itertools.combinations(rankings[:_SETS], 2)
            alike = [float(spearmanr(one, other).statistic) for one, other in pairs]
            means.append(f"{np.mean(alike):.3f}" if alike else "")
        lines.append(f"| `{cell.pair}` | {cell.domain} | {' | '.join(means)} |")
    return "\n".join([*lines, ""])


def _cuts(tokens: Floats, count: int) -> list[tuple[int, int]]:
    """Return ranges of samples that follow one another, of so many tokens at least."""
    cuts, start, held = [], 0, 0.0
    for at, own in enumerate(tokens):
        held += own
        if held >= count:
            cuts.append((start, at + 1))
            start, held = at + 1, 0.0
    return cuts


def compared(summary: Summary) -> str:
    """Return how alike the rankings of both data sets are, as a table."""
    lines = ["| pair | groups | Spearman | of first 5 | of first 10 | of first 20 |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for entry in summary.domains_compared:
        overlaps = " | ".join(str(entry.overlap.get(cut, "")) for cut in (5, 10, 20))
        lines.append(f"| `{entry.pair}` | {entry.groups} | {entry.spearman:.3f} | {overlaps} |")
    alone = [f"{one.layer} ({one.domain}, {one.pair})" for one in summary.alone_in_domain]
    return "\n".join([*lines, "", f"In one alone: {', '.join(alone) or 'none'}.", ""])


def table(
    bits: float,
    recipes: Mapping[str, Recipe],
    plan: Plan,
    parts: Parts,
    trials: dict[str, EndToEnd],
    count: int,
) -> str:
    """Return what each recipe costs on samples of both that were not used, as a table."""
    sets = [dataset.name for dataset in plan.config.dataset]
    heads = " | ".join(f"KL, {name} | against both | predicted" for name in sets)
    lines = [f"| {bits:g} bits, chosen by | bits | {heads} |", "| --- |" + " --- |" * 7]
    measured = {
        (chosen, name): _measured(bits, chosen, recipe, name, plan, parts, trials, count)
        for chosen, recipe in recipes.items()
        for name in sets
    }
    for chosen, recipe in recipes.items():
        cells = []
        for name in sets:
            own, both = measured[chosen, name], measured["both", name]
            mean, error = own.divergence_against(both)
            against = "" if chosen == "both" else f"{mean:+.5f} ± {error:.5f}"
            damage = next(one.damage for one in recipe.domains if one.name == name)
            cells.append(f"{own.divergence:.5f} | {against} | {damage:.5f}")
        lines.append(f"| {chosen} | {recipe.bits:.3f} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _measured(
    bits: float,
    chosen: str,
    recipe: Recipe,
    name: str,
    plan: Plan,
    parts: Parts,
    trials: dict[str, EndToEnd],
    count: int,
) -> Measured:
    """Return what a recipe does on held-out samples of a data set, measured where it was not."""

    def measure() -> dict[str, Any]:
        if name not in trials:
            cell = next(cell for cell in plan.cells if cell.domain is None)
            left = held_out(plan, "text")[name][:count]
            made = evaluation_of(plan, cell, {name: left}, ())
            assert isinstance(made, EndToEnd), "a second copy of the model has no room"
            trials[name] = replace(made, scored=0)
        done = trials[name].measure(chosen, modelopt.config(recipe))
        arrays = ("by_caption", "labels", "nats", "predictions")
        return {**done.numbers(), **{key: getattr(done, key).tolist() for key in arrays}}

    kept = parts.get(f"{bits:g}-{chosen.replace(' ', '-')}-{name}", measure)
    given: dict[str, Any] = {
        key: np.array(value) if isinstance(value, list) else value for key, value in kept.items()
    }
    return Measured(**given)


if __name__ == "__main__":
    sys.exit(main())
