"""Run the DAG, for real, on the demo checkpoint: ``python -m qsens_airflow.demo``.

Starts a small Airflow, triggers ``qsens_sweep`` with the presets ``demo`` and ``demo-domains``,
shows every task as its state changes, and ends with the paths of the reports. Exit code 0 only if
both runs succeeded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from qsens.config import Roots
from qsens_airflow.entry import run
from qsens_airflow.guard import computing_environment
from qsens_airflow.local import Components
from qsens_airflow.rest import TaskState

_PRESETS = ("demo", "demo-domains")
_RUN_SECONDS = 780
_ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Run the demo; return its exit code."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {text}", flush=True)

    os.environ.setdefault("QSENS_ROOT", str(_ROOT))
    roots = Roots.from_environment()
    environment = {
        "QSENS_ROOT": str(roots.root),
        "QSENS_RESULTS": str(roots.results),
        "QSENS_PRESET": "demo",
        "QSENS_SCHEDULE": "none",
    }
    # One slot, as for one GPU: the first task of a kind computes for all, the others find theirs.
    airflow = Components(roots.root / ".airflow", root=_ROOT, environment=environment, slots=1)
    say("demo checkpoint")
    built = subprocess.run(
        [sys.executable, "-m", "qsens", "demo-model"],
        env=computing_environment(airflow.environment),
        check=False,
    )
    if built.returncode:
        return built.returncode
    say(f"starting Airflow at {airflow.url}; logs: {airflow.logs}")
    with airflow:
        reports = [_run(airflow, preset, say) for preset in _PRESETS]
    if None in reports:
        return 1
    print(*reports, sep="\n")
    return 0


def _run(airflow: Components, preset: str, say: Callable[[str], None]) -> str | None:
    """Run the DAG with a preset; return the path of the report, or none where it failed."""
    run_id = airflow.client.trigger({"preset": preset})
    say(f"run {run_id}, preset {preset}")

    def changed(task: TaskState) -> None:
        if task.state not in ("scheduled", "queued"):
            say(f"{task.name}: {task.state}")

    try:
        state = airflow.wait(run_id, seconds=_RUN_SECONDS, changed=changed)
    except TimeoutError as error:
        say(str(error))
        return None
    if state != "success":
        for task in airflow.client.tasks(run_id):
            if task.state == "failed":
                print(f"--- {task.name}", *airflow.task_log(run_id, task)[-30:], sep="\n")
    stored = airflow.state_in_database(run_id)
    say(f"the run ended: {stored}")
    if stored != "success":
        return None
    return str(airflow.client.returned(run_id, "publish")["index"])


if __name__ == "__main__":
    run(main)
