"""Computes, publishes, prunes and reads results of one root in processes side by side.

    python beside.py DIRECTORY TIMES

``DIRECTORY/plans`` holds plans of the root ``DIRECTORY/results``, and ``DIRECTORY/stock`` every
result of theirs. Those that publish do it so many times, and the others go on until they have.
Every process writes a line of JSON for each thing that it did.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from collections.abc import Iterable
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from qsens.errors import QsensError
from qsens.grid import Plan, read_plan
from qsens.pipeline.publish import publish, report
from qsens.pipeline.recipe import write_recipe
from qsens.published import shown_sweeps
from qsens.results import MANIFEST, STATE, read_result
from qsens.store import Store
from qsens.tools.prune import prune

READING = ("report", "recipe", "shown")
PROCESSES = (("compute",), ("publish",), ("publish",), ("prune",), ("prune",), READING)
# All results are older by then than what is kept.
NOW = datetime(2035, 1, 1, tzinfo=UTC)


def compute(plan: Plan, stock: Path) -> None:
    """Write the results that are not there, as scoring does, and let them be old."""
    store = Store(plan)
    for cell in plan.cells:
        with store.lock(cell):
            if not store.is_done(cell):
                stored = stock / cell.digest
                store.write_result(cell, read_result(stored), (stored / STATE).read_bytes())
                os.utime(store.result_dir(cell) / MANIFEST, (1, 1))


def work(kind: str, directory: Path, plan: Plan) -> Any:
    """Do one thing with what lies below the results root."""
    store = Store(plan)
    if kind == "compute":
        return compute(plan, directory / "stock")
    if kind == "publish":
        return publish(plan)["complete"]
    if kind == "prune":
        return prune(plan.results, keep_sweeps=1, keep_days=1, now=NOW).sweeps
    if kind == "report":
        return report(store.cell_dir(plan.cells[0]))["manifest"]
    if kind == "recipe":
        return write_recipe(str(store.sweep_dir()), bits=12.0, target="modelopt")["bits"]
    return sorted(shown_sweeps(store.model_dir()))


def run(name: str, kinds: tuple[str, ...], directory: Path, turns: Iterable[object]) -> None:
    """Do things of those kinds, one each turn."""
    rng = random.Random(name)
    plans = [read_plan(path) for path in sorted((directory / "plans").iterdir())]
    with (directory / f"{name}.jsonl").open("w") as out:
        for _ in turns:
            time.sleep(rng.random() * 0.1)
            kind = rng.choice(kinds)
            try:
                said = {"done": work(kind, directory, rng.choice(plans))}
            except QsensError as error:
                said = error.as_dict() | {"code": error.exit_code}
            except Exception:
                said = {"traceback": traceback.format_exc()}
            out.write(json.dumps({"kind": kind, **said}) + "\n")


def main(directory: Path, times: int) -> None:
    """Run all of them, and wait for them."""
    context = get_context("fork")
    published = context.Event()
    publishers, others = [], []
    for at, kinds in enumerate(PROCESSES):
        publishes = kinds == ("publish",)
        turns = range(times) if publishes else iter(published.is_set, True)
        arguments = (f"{at}-{kinds[0]}", kinds, directory, turns)
        process = context.Process(target=run, args=arguments)
        (publishers if publishes else others).append(process)
        process.start()
    for process in publishers:
        process.join()
    published.set()
    for process in others:
        process.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
