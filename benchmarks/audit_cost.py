"""What an audit of a sample of groups adds to the pass that scores all cells.

From the root of the repository, on a machine with a GPU:

    python -m benchmarks.audit_cost --shape qwen3-vl-4b

The pass is that of every pair at three sizes, calibration included; the audit is that of
``autoquant.audit=sample``: for each pair at ``small``, the true KL divergence of the top five
groups, the head, and others from all over the ranking. Both run several times in turn, after a
first time that is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import torch

from benchmarks import _engines, _machine, _workload
from qsens.analysis.audit import choose_groups
from qsens.checkpoint.groups import Group, find_groups
from qsens.checkpoint.loading import resolve_device
from qsens.config import AutoquantConfig
from qsens.engine.scoring_pass import calibrate, run_pass
from qsens.pipeline.audit import GROUPS
from qsens.schema.summary import Row

SCORED = 128
_REPEATS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help="directory of a checkpoint")
    which.add_argument("--shape", choices=sorted(_workload.SHAPES), help="random weights")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--pairs", type=lambda text: text.split(","), default=list(_workload.NIGHTLY)
    )
    parser.add_argument("--json", type=Path, help="write the numbers there")
    given = parser.parse_args(arguments)
    measured = _run(given)
    share = measured["audit"] / measured["pass"]
    print(
        f"pass over {measured['cells']} cells {measured['pass']:.2f} s, audit of "
        f"{measured['audited']} groups of pairs {measured['audit']:.2f} s: {share:.0%}"
    )
    if given.json:
        given.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return 0


def _run(given: argparse.Namespace) -> dict[str, Any]:
    load = _workload.build(
        model=given.model,
        shape=given.shape,
        device=resolve_device(given.device),
        dtype=given.dtype,
        captions=None,
        batch_size=8,
        score_size=SCORED,
    )
    pairs = _workload.pair_configs(given.pairs)
    cells = [load.cell(pair, size) for pair in pairs for size in load.sizes]
    small = [cell for cell in cells if cell.size == "small"]
    groups = find_groups(load.model, load.disabled)
    amax = calibrate(
        load.model, load.samples, groups, [cell.calibrated for cell in small[:1]], load.boundaries()
    )
    seconds: dict[str, list[float]] = {"pass": [], "audit": []}
    for _ in range(_REPEATS + 1):
        run = _engines.run_fused(load, cells)
        seconds["pass"].append(run.measured.total)
        only: set[tuple[str, str]] = set()
        used: set[str] = set()
        for cell in small:
            chosen = choose_groups(_rows(groups, run.scores[cell.name]), GROUPS, used)
            used |= set(chosen)
            only |= {(name, cell.name) for name in chosen}
        audit = run_pass(
            load.model,
            load.samples,
            groups,
            [_engines.request(cell) for cell in small],
            AutoquantConfig(method="kl_div"),
            boundaries=load.boundaries(),
            calibrated=lambda _: amax,
            only=only,
        )
        seconds["audit"].append(audit.seconds["score"])
    return {
        "machine": _machine.describe(load.device),
        "versions": _machine.versions(),
        "model": load.name,
        "cells": len(cells),
        "audited": len(only),
        "groups": len(used),
        **{name: statistics.median(each[1:]) for name, each in seconds.items()},
        "each": seconds,
    }


def _rows(groups: Sequence[Group], scores: dict[str, float]) -> list[Row]:
    """Return the groups of a cell with their places, as reports rank them."""
    ranked = sorted(scores, key=lambda name: -scores[name])
    places = {name: place for place, name in enumerate(ranked, start=1)}
    return [
        Row(
            layer=group.name,
            members=group.members,
            kind=group.kind,
            depth=group.depth,
            status="scored" if group.name in places else "disabled",
            num_bits=None,
            sensitivity=scores.get(group.name),
            sensitivity_per_token=None,
            size_cost=None,
            position=places.get(group.name),
            share=None,
        )
        for group in groups
    ]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
