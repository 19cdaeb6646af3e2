"""What method ``kl_div`` takes at a shape, beside another version of qsens in the same run.

From the root of the repository, on a machine with a GPU, with the other version checked out:

    git worktree add ../qsens-before COMMIT
    python -m benchmarks.kl_cost --shape qwen3-vl-4b --against ../qsens-before

The true KL divergence of every group of every pair at ``small`` is measured by both in turn, each
time in a process of its own; the first time, which compiles kernels, is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

HERE = Path(__file__).resolve().parent.parent
_ROUNDS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kl_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", required=True, help="random weights of a known shape")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--pairs", help="pairs, by comma; those of nightly when left out")
    parser.add_argument("--against", type=Path, help="root of another checkout")
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.alone:
        print(json.dumps(_measure(given)))
        return 0
    roots = {"this version": HERE}
    if given.against:
        roots["the other"] = given.against.resolve()
    each: dict[str, list[float]] = {name: [] for name in roots}
    for _ in range(given.rounds):
        for name, root in roots.items():
            each[name].append(_in_process(root, given))
    for name, seconds in each.items():
        print(
            f"{name}: {statistics.median(seconds):.2f} s ({', '.join(f'{s:.2f}' for s in seconds)})"
        )
    if len(each) == 2:
        ours, theirs = (statistics.median(seconds) for seconds in each.values())
        print(f"ratio {ours / theirs:.2f}")
    return 0


def _in_process(root: Path, given: argparse.Namespace) -> float:
    """Return the seconds that the version below ``root`` takes."""
    words = ["--alone", "--shape", given.shape, "--device", given.device, "--dtype", given.dtype]
    words += ["--pairs", given.pairs] if given.pairs else []
    done = subprocess.run(
        [sys.executable, Path(__file__).resolve(), *words],
        env={**os.environ, "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"},
        cwd=root,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    )
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def _measure(given: argparse.Namespace) -> dict[str, Any]:
    import torch

    from benchmarks import _engines, _machine, _workload
    from qsens.checkpoint.groups import find_groups
    from qsens.checkpoint.loading import resolve_device
    from qsens.engine.amax import calibrate
    from qsens.engine.candidates import distinct
    from qsens.engine.kl.measure import diverge
    from qsens.engine.memory import plan_budget

    torch.set_grad_enabled(False)
    load = _workload.build(
        model=None,
        shape=given.shape,
        device=resolve_device(given.device),
        dtype=given.dtype,
        captions=None,
        batch_size=8,
        score_size=16,
    )
    pairs = given.pairs.split(",") if given.pairs else list(_workload.NIGHTLY)
    cells = [load.cell(pair, "small") for pair in _workload.pair_configs(pairs)]
    groups = find_groups(load.model, load.disabled)
    candidates = distinct([_engines.request(cell) for cell in cells])
    amax = {}
    if candidates.calibration_sizes():
        amax = calibrate(
            load.model, load.samples, groups, calibration_sizes=candidates.calibration_sizes()
        )
    budget = plan_budget(load.model, groups, candidates, limit_gb=None, losses=0)
    seconds = []
    for _ in range(2):
        _machine.synchronize(load.device)
        started = time.monotonic()
        diverge(load.model, load.samples, groups, candidates, amax, boundaries=[], budget=budget)
        _machine.synchronize(load.device)
        seconds.append(time.monotonic() - started)
    return {"seconds": seconds[-1]}


if __name__ == "__main__":
    sys.exit(main())
