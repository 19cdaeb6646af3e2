"""What a run of the DAG costs whose results are all there already, beside Airflow's own share.

    PYTHONPATH=plugins python -m benchmarks.airflow_overhead

Builds the demo checkpoint, computes 21 cells (the seven pairs of the preset ``nightly`` at three
sizes) by the command line, then runs ``qsens_sweep`` over them with LocalExecutor, in turns with
the same DAG whose commands do nothing: a shell that prints what ours printed. Prints the seconds
from the trigger to the end of each run, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from qsens.config import load_sweep
from qsens.store import CHECKPOINTS, MODELS
from qsens_airflow.local import Components

ROOT = Path(__file__).resolve().parents[1]
# Called as `python -m qsens VERB --json ...`; `plan` has to leave its file where it is told to.
_SCRIPT = """#!/bin/sh
verb=$3
for word; do [ "$before" = --out ] && out=$word; before=$word; done
if [ -e "{root}/nothing" ]; then
  [ "$verb" = plan ] && mkdir -p "$(dirname "$out")" && cp "{root}/plan.json" "$out"
  cat "{root}/$verb.answer"
else
  "{python}" "$@" >"{root}/$$.answer"
  code=$?
  cat "{root}/$$.answer"
  mv "{root}/$$.answer" "{root}/$verb.answer"
  [ "$verb" = plan ] && cp "$out" "{root}/plan.json"
  exit $code
fi
"""


def main() -> int:
    """Run the benchmark; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    pairs = ",".join(pair.name for pair in load_sweep("nightly").config.quant_pair)
    parser.add_argument("--pairs", default=pairs, help="pairs, separated by commas")
    parser.add_argument("--sizes", default="small,medium,large", help="sizes, by commas")
    parser.add_argument("--slots", type=int, default=2, help="tasks at once")
    parser.add_argument("--checkpoint", type=Path, help="a demo checkpoint that is there already")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each")
    parser.add_argument("--seconds", type=float, default=900, help="longest run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qsens-overhead-") as name:
        return _measure(Path(name), given)


def _measure(root: Path, given: argparse.Namespace) -> int:
    environment = {
        "QSENS_ROOT": str(root),
        "QSENS_RESULTS": str(root),
        "QSENS_PRESET": "demo-text",
        "QSENS_SCHEDULE": "none",
        "QSENS_PYTHON": str(_interpreter(root)),
    }
    checkpoint = root / MODELS / "tiny_qwen3_vl" / CHECKPOINTS / "tiny-qwen3-vl"
    home = root / ".airflow"
    airflow = Components(home, root=ROOT, environment=environment, slots=given.slots)
    if given.checkpoint is not None:
        checkpoint.parent.mkdir(parents=True)
        checkpoint.symlink_to(given.checkpoint.resolve())
    else:
        _qsens(airflow, "demo-model")
    words = [f"quant_pair={given.pairs}", f"dataset.size={given.sizes}"]
    computed = json.loads(_qsens(airflow, "sweep", "demo-text", *words, "--json"))
    seconds: dict[str, list[float]] = {"qsens": [], "nothing": []}
    tasks: Counter[str] = Counter()
    with airflow:
        for turn in range(given.runs + 1):
            for name, runs in seconds.items():
                mark = root / "nothing"
                mark.touch() if name == "nothing" else mark.unlink(missing_ok=True)
                started = time.monotonic()
                run_id = airflow.client.trigger(
                    {
                        "preset": "demo-text",
                        "quant_pair": given.pairs.split(","),
                        "size": given.sizes.split(","),
                    }
                )
                state = airflow.wait(run_id, seconds=given.seconds)
                if turn:  # the first of each fills caches, and records what ours prints
                    runs.append(round(time.monotonic() - started, 1))
                tasks.update(str(task.state) for task in airflow.client.tasks(run_id))
                if state != "success":
                    print(f"a run with {name} ended as {state}", file=sys.stderr)
                    return 1
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    print(
        json.dumps(
            {
                "cells": len(computed["cells"]),
                "slots": given.slots,
                "tasks": dict(tasks),
                "seconds": seconds,
                "ratio": round(medians["qsens"] / medians["nothing"], 2),
            }
        )
    )
    return 0


def _interpreter(root: Path) -> Path:
    """Write what operators start in place of Python: it does nothing while a file is there."""
    path = root / "python"
    path.write_text(_SCRIPT.format(root=root, python=sys.executable), encoding="utf-8")
    path.chmod(0o755)
    return path


def _qsens(airflow: Components, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "qsens", *words],
        env=airflow.environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
