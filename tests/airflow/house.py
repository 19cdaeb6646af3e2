"""A running Airflow with the root that its runs read from and write to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsens_airflow.local import Components
from qsens_airflow.rest import TaskState


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
