"""What Airflow itself costs: a run of the DAG whose results are all there already.

    PYTHONPATH=plugins python -m benchmarks.airflow_overhead

Builds the demo checkpoint, computes 21 cells (the seven pairs of the preset ``nightly`` at three
sizes) by the command line, then runs ``qsens_sweep`` over them with LocalExecutor and prints the
seconds from the trigger to the end of the run.
"""

from __future__ import annotations

import argparse
import json
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


def main() -> int:
    """Run the benchmark; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    pairs = ",".join(pair.name for pair in load_sweep("nightly").config.quant_pair)
    parser.add_argument("--pairs", default=pairs, help="pairs, separated by commas")
    parser.add_argument("--sizes", default="small,medium,large", help="sizes, by commas")
    parser.add_argument("--slots", type=int, default=2, help="tasks at once")
    parser.add_argument("--checkpoint", type=Path, help="a demo checkpoint that is there already")
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
    with airflow:
        started = time.monotonic()
        conf = {
            "preset": "demo-text",
            "quant_pair": given.pairs.split(","),
            "size": given.sizes.split(","),
        }
        run_id = airflow.client.trigger(conf)
        state = airflow.wait(run_id, seconds=given.seconds)
        seconds = time.monotonic() - started
        tasks = Counter(str(task.state) for task in airflow.client.tasks(run_id))
    print(
        json.dumps(
            {
                "cells": len(computed["cells"]),
                "slots": given.slots,
                "state": state,
                "tasks": dict(tasks),
                "seconds": round(seconds, 1),
            }
        )
    )
    return 0 if state == "success" else 1


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
