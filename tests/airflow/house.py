"""A running Airflow with the root that its runs read from and write to."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from qsens_airflow.local import Components
from qsens_airflow.rest import TaskState

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    run_id: str
    state: str
    tasks: list[TaskState]

    def states(self) -> dict[str, str | None]:
        return {task.name: task.state for task in self.tasks}

    def task(self, name: str) -> TaskState:
        (found,) = [task for task in self.tasks if task.name == name]
        return found


def components(home: Path, *, environment: Mapping[str, str], slots: int = 2) -> Components:
    """Return an Airflow of this checkout; its database is made once for all tests and kept."""
    cache = ROOT / ".cache" / f"airflow-{version('apache-airflow')}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache.with_suffix(".lock")):
        Components(cache, root=ROOT, environment={}).migrate()
    home.mkdir(parents=True, exist_ok=True)
    for name in ("airflow.db", "migrated"):
        shutil.copy2(cache / name, home / name)
    return Components(home, root=ROOT, environment=environment, slots=slots)


@dataclass(frozen=True)
class House:
    """Airflow, and the root that its runs read from and write to."""

    airflow: Components
    root: Path
    preset: str = "demo-text"
    seconds: float = 900

    def run(self, **conf: Any) -> Run:
        return self.end(self.airflow.client.trigger({"preset": self.preset} | conf))

    def end(self, run_id: str) -> Run:
        state = self.airflow.wait(run_id, seconds=self.seconds)
        assert self.airflow.state_in_database(run_id) == state
        return Run(run_id, state, self.airflow.client.tasks(run_id))

    def published(self, run: Run) -> dict[str, Any]:
        value = self.airflow.client.returned(run.run_id, "publish")
        assert isinstance(value, dict)
        return value

    def files(self, run: Run) -> dict[Path, bytes]:
        """Return every file that a run has published: its sweep's and its cells'."""
        sweep = Path(self.published(run)["index"]).parent
        files = [path for path in sweep.rglob("*") if path.is_file()]
        model = sweep.parents[1]
        files += [path for path in model.glob("weight-*/**/*") if path.is_file()]
        return {path: path.read_bytes() for path in sorted(files)}
