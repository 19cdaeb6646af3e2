"""A small client of Airflow's REST API, for what the demo and the tests need."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import httpx

UNFINISHED = ("queued", "running")
_ATTEMPTS = 10
# Longer than SQLite waits for a lock: see `environment_of`.
_SECONDS = 120


@dataclass(frozen=True)
class TaskState:
    """One task instance.

    Attributes:
        task_id: The task, with its group.
        map_index: Position in a mapped group; -1 outside.
        name: What the UI shows for it.
        state: Airflow's state; none before it is scheduled.
        tries: How often it has been started.
    """

    task_id: str
    map_index: int
    name: str
    state: str | None
    tries: int


class Client:
    """Talks to one DAG through the REST API.

    Args:
        url: Address of the api-server.
        dag_id: The DAG.
        user: Name of the user.
        password: Password of the user.
    """

    def __init__(self, url: str, dag_id: str, *, user: str, password: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=_SECONDS)
        token = self._call("POST", "/auth/token", {"username": user, "password": password})[
            "access_token"
        ]
        self._http.headers["Authorization"] = f"Bearer {token}"
        self._dag = f"/api/v2/dags/{dag_id}"

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def is_parsed(self) -> bool:
        """Return whether the DAG is known.

        Raises:
            RuntimeError: Its file cannot be imported.
        """
        errors = self._call("GET", "/api/v2/importErrors")["import_errors"]
        if errors:
            raise RuntimeError(errors[0]["stack_trace"])
        return self._http.get(self._dag).status_code == httpx.codes.OK

    def unpause(self) -> None:
        """Let the DAG run."""
        self._call("PATCH", self._dag, {"is_paused": False})

    def trigger(self, conf: Mapping[str, Any]) -> str:
        """Let the DAG run if it is paused, start a run with params, and return its id."""
        self.unpause()
        run_id = f"manual__{datetime.now(UTC).isoformat()}"
        body = {"dag_run_id": run_id, "logical_date": None, "conf": dict(conf)}
        self._call("POST", f"{self._dag}/dagRuns", body)
        return run_id

    def state(self, run_id: str) -> str:
        """Return the state of a run."""
        return str(self._call("GET", self._run(run_id))["state"])

    def end_unfinished(self) -> None:
        """Mark runs failed that an earlier, broken off session has left unfinished."""
        for state in UNFINISHED:
            for run in self._call("GET", f"{self._dag}/dagRuns?state={state}")["dag_runs"]:
                self._call("PATCH", self._run(run["dag_run_id"]), {"state": "failed"})

    def tasks(self, run_id: str) -> list[TaskState]:
        """Return the task instances of a run."""
        answer = self._call("GET", f"{self._run(run_id)}/taskInstances?limit=1000")
        return [
            TaskState(
                task_id=task["task_id"],
                map_index=task["map_index"],
                name=f"{task['task_id']} [{task['rendered_map_index'] or task['map_index']}]"
                if task["map_index"] >= 0
                else task["task_id"],
                state=task["state"],
                tries=task["try_number"],
            )
            for task in answer["task_instances"]
        ]

    def clear(
        self, run_id: str, tasks: Sequence[str | tuple[str, int]], *, downstream: bool = False
    ) -> None:
        """Run some tasks of a finished run again.

        Args:
            run_id: The run.
            tasks: Tasks, or a task with its position in a mapped group.
            downstream: Whether all that depends on them runs again too.
        """
        body = {
            "dry_run": False,
            "dag_run_id": run_id,
            "task_ids": list(tasks),
            "include_downstream": downstream,
            "only_failed": False,
        }
        self._call("POST", f"{self._dag}/clearTaskInstances", body)

    def returned(self, run_id: str, task_id: str, map_index: int = -1) -> Any:
        """Return what a task returned."""
        path = f"{self._run(run_id)}/taskInstances/{task_id}/xcomEntries/return_value"
        return self._call("GET", f"{path}?map_index={map_index}")["value"]

    def asset_events(self, run_id: str) -> list[dict[str, Any]]:
        """Return the extra of every asset event that a run has caused."""
        path = f"/api/v2/assets/events?source_run_id={quote(run_id, safe='')}"
        return [event["extra"] for event in self._call("GET", path)["asset_events"]]

    def pool_slots(self, name: str) -> int | None:
        """Return how many slots a pool has; none where there is no such pool."""
        answer = self._http.get(f"/api/v2/pools/{quote(name, safe='')}")
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        answer.raise_for_status()
        return int(answer.json()["slots"])

    def make_pool(self, name: str, slots: int) -> None:
        """Make a pool."""
        self._call("POST", "/api/v2/pools", {"name": name, "slots": slots})

    def _run(self, run_id: str) -> str:
        return f"{self._dag}/dagRuns/{quote(run_id, safe='')}"

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send a request, again if the server failed: SQLite may be locked for a moment.

        A request that is sent again has the same effect once: a second run of the same id is
        refused as a conflict.
        """
        again = 0
        answer = self._http.request(method, path, json=body)
        while answer.is_server_error and again < _ATTEMPTS - 1:
            time.sleep(1)
            again += 1
            answer = self._http.request(method, path, json=body)
        if answer.is_error and not (again and answer.status_code == httpx.codes.CONFLICT):
            raise RuntimeError(f"{method} {path}: {answer.status_code}: {answer.text[:2000]}")
        return answer.json()
