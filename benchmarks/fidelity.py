"""How well scores stand for the true KL divergence of each group, what they cost, what recipes do.

From the root of the repository:

    python -m benchmarks.fidelity --model .cache/smollm2 --model DEMO --work .cache/fidelity

The truth is method ``kl_div``: every group of every pair quantized alone, KL divergence over all
real tokens. Against it stand

- ``gradient``: ModelOpt's formula, without padding, as ``autoquant.method=gradient`` has it;
- ``fisher`` at 1 to 16 draws, as ``autoquant.method=fisher`` has it, the median of several seeds;
- ``ModelOpt``: ``mtq.auto_quantize`` as its examples run it, on captions padded on the left.

*rho* is Spearman's rank correlation over the groups, *ratio* the estimate over the truth (a proxy
has none), *covered* the share of groups whose truth lies in the estimate's 90 % interval.

Recipes by ``fisher`` are compared with each pair alone and with ModelOpt's choice from the same
pairs at the same bits, on captions that nobody has seen: those that the demo checkpoint's training
holds out, or those of the file behind the first 128.

Each part (a pair's truth, a method's scores, a choice of formats) is kept below ``--work`` as soon
as it is there: a call that was cut off goes on where it was. At the end, ``fidelity.md`` there
holds the tables of all parts that are there, and an SVG of each model the estimates against the
truth. ``DEMO`` is the demo checkpoint (`qsens demo-model`).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import torch

from benchmarks import _tables, _workload
from benchmarks._chosen import Chosen
from benchmarks._parts import Parts
from benchmarks._scored import Scored
from benchmarks._workload import NIGHTLY
from qsens.checkpoint.files import identify
from qsens.checkpoint.loading import resolve_device
from qsens.config import choices
from qsens.data.records import Record
from qsens.demo.recipe import RECIPE, held_out_captions, read_record
from qsens.errors import QsensError
from qsens.grid import Plan
from qsens.pipeline.evaluate_recipe import held_out
from qsens.writing import write_text

DRAWS = (1, 2, 4, 8, 16)
COST = (1, 4, 8, 16)
HELD_OUT = 256
PARTS = ("truth", "methods", "modelopt", "cost", "recipes")
_DEMO_CAPTIONS = _workload.ROOT / "configs" / "dataset" / "demo" / "captions_large.txt"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", type=Path, action="append", required=True, help="a checkpoint; repeatable"
    )
    parser.add_argument("--work", type=Path, required=True, help="where parts are kept")
    parser.add_argument("--only", type=_words, default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--captions", type=Path, help="512 samples, one a line; the demo checkpoint has its own"
    )
    parser.add_argument("--count", type=int, default=16, help="samples of truth and methods")
    parser.add_argument("--pairs", type=_words, default=list(NIGHTLY), help="of truth and methods")
    parser.add_argument("--draws", type=_numbers, default=list(DRAWS))
    parser.add_argument("--seeds", type=int, default=5, help="seeds of fisher")
    parser.add_argument("--cost-draws", type=_numbers, default=list(COST))
    parser.add_argument("--bits", type=_numbers, default=[5, 6, 8], help="targets of recipes")
    parser.add_argument(
        "--head",
        choices=("quantized", "kept"),
        default="quantized",
        help="whether recipes may quantize a tied head, or keep it at 16 bits",
    )
    parser.add_argument(
        "--sets",
        type=_words,
        default=["nightly", "all"],
        help="pairs to choose from: nightly, all, or the pairs of --pairs as 'given'",
    )
    given = parser.parse_args(arguments)
    unknown = sorted({*given.only} - {*PARTS})
    if unknown:
        parser.error(f"--only: no part '{unknown[0]}'; there are {', '.join(PARTS)}")
    try:
        tables = [_tables.text(results) for results in (_run(given, path) for path in given.model)]
    except QsensError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_text(given.work / "fidelity.md", "\n".join(tables))
    print("\n".join(tables))
    return 0


def _run(given: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Run what is asked for of one model; return what is there of all parts."""
    demo = read_record(path) is not None
    captions = _DEMO_CAPTIONS if demo else given.captions
    load = _workload.build(
        model=path,
        shape=None,
        device=resolve_device(given.device),
        dtype=given.dtype,
        captions=captions,
        batch_size=8,
        score_size=given.count,
    )
    subject = {
        "model": load.name,
        "checkpoint": identify(path).digest[:12],
        "captions": load.captions,
        "samples": hashlib.sha256(repr(load.samples.ids).encode()).hexdigest()[:12],
        "dtype": given.dtype,
        "device": load.device.type,
    }
    scores = Parts(given.work, {**subject, "count": given.count, "pairs": sorted(given.pairs)})
    scored = Scored(load, given.pairs, scores)
    results: dict[str, Any] = {"subject": subject, "count": scored.count, "pairs": given.pairs}
    steps: dict[str, tuple[Parts, Callable[[], Any]]] = {
        "truth": (scores, scored.truth),
        "methods": (scores, lambda: scored.methods(given.draws, given.seeds)),
        "modelopt": (scores, scored.modelopt),
        "cost": (scores, lambda: scored.cost(given.cost_draws)),
    }
    for name, (parts, make) in steps.items():
        results[name] = make() if name in given.only else parts.known(make)
    recipes = Parts(given.work, subject)
    results["recipes"] = (
        _recipes(given, path, captions, recipes)
        if "recipes" in given.only
        else recipes.known(lambda: _recipes(given, path, captions, recipes))
    )
    if results["methods"]:
        write_text(given.work / f"{subject['model']}.svg", _tables.drawn(results))
    return results


def _recipes(
    given: argparse.Namespace, path: Path, captions: Path | None, parts: Parts
) -> dict[str, Any]:
    """Return the choices by set and bits."""
    file = captions or _workload.captions_file()
    everything = list(choices("quant_pair"))
    sets = {"nightly": list(NIGHTLY), "all": everything, "given": given.pairs}
    pairs = list(dict.fromkeys(name for chosen in given.sets for name in sets[chosen]))
    words = [
        f"model.path={path.resolve()}",
        f"model.dtype={given.dtype}",
        f"quant_pair={','.join(pairs)}",
        f"dataset.directory={file.parent.resolve()}",
        *(f"dataset.files.{size}={file.name}" for size in ("small", "medium", "large")),
        f"autoquant.device={given.device}",
    ]

    def unseen(plan: Plan) -> dict[str, list[Record]]:
        left = held_out(plan, "text")
        if read_record(path) is not None:
            own = [Record("", caption) for caption in held_out_captions(RECIPE)]
            return dict.fromkeys(left, own)
        return {name: records[:HELD_OUT] for name, records in left.items()}

    chosen = Chosen(words, unseen, parts, tied_head=given.head == "quantized")
    recipes = {
        f"{name}, {bits:g} bits, tied head {given.head}": chosen.compare(sets[name], bits)
        for name in given.sets
        for bits in given.bits
    }
    return {**recipes, "floor": chosen.floor()}


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _words(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
