"""What the DAG takes from configuration and from the environment when its file is parsed.

Environment variables, not Airflow Variables: those would be a request to the API at every parse.

| variable | meaning | default |
| --- | --- | --- |
| ``QSENS_PRESET`` | sweep preset that the DAG runs, and takes its own settings from | ``nightly`` |
| ``QSENS_SCHEDULE`` | cron expression in UTC, or ``none`` for manual triggers only | the preset's |
| ``QSENS_QUEUE`` | Celery queue of the tasks that take a GPU | the executor's default |
| ``QSENS_POOL`` | Airflow pool of the tasks that take a GPU; it must exist | the preset's |
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from qsens.config import DagConfig, load_sweep


@dataclass(frozen=True)
class DagSettings:
    """How the DAG is laid out.

    Attributes:
        preset: Name of the sweep preset that a run uses when its params do not say otherwise.
        schedule: Cron expression, UTC; none for manual triggers only.
        queue: Queue of the tasks that need a GPU; none for the executor's default.
        pool: Pool of the tasks that need a GPU.
        dag: The preset's own section for the DAG.
    """

    preset: str
    schedule: str | None
    queue: str | None
    pool: str
    dag: DagConfig

    @classmethod
    def from_environment(cls) -> DagSettings:
        """Read the settings.

        Raises:
            UserError: The preset does not exist or does not validate.
        """
        preset = os.environ.get("QSENS_PRESET") or "nightly"
        dag = load_sweep(preset).config.dag
        schedule = os.environ.get("QSENS_SCHEDULE") or dag.schedule
        return cls(
            preset=preset,
            schedule=None if schedule == "none" else schedule,
            queue=os.environ.get("QSENS_QUEUE") or None,
            pool=os.environ.get("QSENS_POOL") or dag.pool,
            dag=dag,
        )

    def gpu_task(self, gpus: int | None = None) -> dict[str, Any]:
        """Return the operator arguments of tasks that take GPUs.

        Args:
            gpus: How many; as many as the configuration says when not given.
        """
        gpus = gpus or self.dag.gpus_per_task
        taken = {"pool": self.pool, "pool_slots": gpus, "gpus": gpus}
        return taken | ({"queue": self.queue} if self.queue else {})

    def execution_timeout(self) -> timedelta:
        """Return the time limit of one task."""
        return timedelta(minutes=self.dag.execution_timeout_minutes)
