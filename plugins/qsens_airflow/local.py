"""A small, real Airflow on this machine: api-server, scheduler and dag-processor as children.

SQLite and LocalExecutor, for the demo and the tests; it listens on a loopback port only, with
secrets drawn anew at every start.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from qsens.errors import TryAgain
from qsens.locks import lock_at, try_lock
from qsens_airflow.environment import environment_of
from qsens_airflow.guard import hide
from qsens_airflow.parent import end_with_parent
from qsens_airflow.pool import CONNECTION_VARIABLE, connection_text
from qsens_airflow.processes import end, free_port
from qsens_airflow.rest import UNFINISHED, Client, TaskState

DAG_ID = "qsens_sweep"
_START_SECONDS = 180
_STOP_SECONDS = 10


class Components:
    """Airflow's processes; use it as a context manager.

    Args:
        home: ``AIRFLOW_HOME``: database, logs, passwords.
        root: The checkout: ``dags/``, ``plugins/`` and the package itself.
        environment: Variables for Airflow and its tasks, such as ``QSENS_RESULTS``.
        slots: Tasks that run at once.

    Attributes:
        home: ``AIRFLOW_HOME``.
        url: Address of the UI and the REST API.
        user: Name of the one user.
        password_file: JSON file with the password of every user; it dies with the start after.
        environment: Variables of the components, and of the tasks that they start.
    """

    def __init__(
        self, home: Path, *, root: Path, environment: Mapping[str, str], slots: int = 2
    ) -> None:
        # The passwords that are drawn here are in this process's memory.
        hide()
        self.home = home.resolve()
        self.user = "qsens"
        self.password_file = self.home / "passwords.json"
        self._password = secrets.token_urlsafe(24)
        self._port = free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._client: Client | None = None
        self.url = f"http://127.0.0.1:{self._port}"
        self.environment = environment_of(
            self.home,
            root.resolve(),
            url=self.url,
            user=self.user,
            password_file=self.password_file,
            slots=slots,
        )
        self.environment[CONNECTION_VARIABLE] = connection_text(self.url, self.user, self._password)
        self.environment |= environment
        self._lock = lock_at(self.home / "running.lock")

    @property
    def logs(self) -> Path:
        """Directory of the logs, of components and tasks."""
        return self.home / "logs"

    @property
    def client(self) -> Client:
        """The REST API of the running Airflow."""
        assert self._client is not None, "not started"
        return self._client

    def __enter__(self) -> Self:
        """Make the database, start the components, and wait until the DAG can run."""
        self.logs.mkdir(parents=True, exist_ok=True)
        if not try_lock(self._lock):
            raise TryAgain(
                "an Airflow is running there already",
                where=str(self.home),
                remedy="Stop it first: `make demo` and `make up` share one.",
            )
        try:
            self._write_password()
            self.migrate()
            self._start(
                "api-server", "api-server", "--host", "127.0.0.1", "--port", str(self._port)
            )
            self._start("scheduler", "scheduler", "--skip-serve-logs")
            self._start("dag-processor", "dag-processor")
            self._wait("the components", self._healthy)
            self._client = Client(self.url, DAG_ID, user=self.user, password=self._password)
            self._wait(f"the DAG {DAG_ID}", self._client.is_parsed)
            self._client.end_unfinished()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop every process that was started."""
        self.stop()

    def wait(
        self,
        run_id: str,
        *,
        seconds: float,
        changed: Callable[[TaskState], None] = lambda task: None,
    ) -> str:
        """Wait for the end of a run.

        Args:
            run_id: The run.
            seconds: How long to wait at most.
            changed: Called with every task whose state has changed.

        Returns:
            The state of the run.

        Raises:
            TimeoutError: The run has not ended in time.
            RuntimeError: A component has ended.
        """
        seen: dict[tuple[str, int], str | None] = {}
        last = time.monotonic() + seconds
        while True:
            state = self.client.state(run_id)
            for task in self.client.tasks(run_id):
                key = (task.task_id, task.map_index)
                if task.state is not None and seen.get(key) != task.state:
                    changed(task)
                seen[key] = task.state
            if state not in UNFINISHED:
                return state
            self._check()
            if time.monotonic() > last:
                raise TimeoutError(f"run {run_id} is still {state} after {seconds:.0f} s")
            time.sleep(1)

    def state_in_database(self, run_id: str) -> str | None:
        """Return the state of a run as the database has it; needs no component."""
        uri = f"{(self.home / 'airflow.db').as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
            row = database.execute(
                "SELECT state FROM dag_run WHERE dag_id = ? AND run_id = ?", (DAG_ID, run_id)
            ).fetchone()
        return str(row[0]) if row else None

    def task_log(self, run_id: str, task: TaskState) -> list[str]:
        """Return the lines of the last try of a task, without their timestamps."""
        directory = self.logs / f"dag_id={DAG_ID}" / f"run_id={run_id}" / f"task_id={task.task_id}"
        if task.map_index >= 0:
            directory /= f"map_index={task.map_index}"
        attempts = sorted(directory.glob("attempt=*.log"), key=lambda path: path.stat().st_mtime)
        return [] if not attempts else [_event(line) for line in _lines(attempts[-1])]

    def stop(self) -> None:
        """Stop every process that was started, and all that those have started."""
        if self._client is not None:
            self._client.close()
            self._client = None
        end(self._processes.values(), grace=_STOP_SECONDS)
        self._processes.clear()
        self._lock.release()

    def _write_password(self) -> None:
        self.password_file.unlink(missing_ok=True)
        self.password_file.touch(mode=0o600)
        self.password_file.write_text(json.dumps({self.user: self._password}), encoding="utf-8")

    def _start(self, name: str, *arguments: str) -> None:
        with self._log(name).open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "airflow", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.home,
                # Ctrl-C is ours to pass on, in order.
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        last = time.monotonic() + _START_SECONDS
        while not ready():
            self._check()
            if time.monotonic() > last:
                raise TimeoutError(f"waited {_START_SECONDS} s for {what}; logs: {self.logs}")
            time.sleep(0.3)

    def _check(self) -> None:
        for name, process in self._processes.items():
            if process.poll() is not None:
                tail = "\n".join(_lines(self._log(name))[-30:])
                raise RuntimeError(f"{name} ended with code {process.returncode}:\n{tail}")

    def migrate(self) -> None:
        """Make the database, or bring an older one up to date; not twice for one Airflow."""
        self.logs.mkdir(parents=True, exist_ok=True)
        mark, installed = self.home / "migrated", version("apache-airflow")
        with contextlib.suppress(OSError):
            if (self.home / "airflow.db").stat().st_size and mark.read_text() == installed:
                return
        mark.unlink(missing_ok=True)
        command = [sys.executable, "-m", "airflow", "db", "migrate"]
        with self._log("db-migrate").open("wb") as log:
            subprocess.run(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.home,
                check=True,
            )
        mark.write_text(installed)

    def _healthy(self) -> bool:
        try:
            health = httpx.get(f"{self.url}/api/v2/monitor/health", timeout=10).json()
        except (httpx.TransportError, ValueError):
            return False
        parts = ("metadatabase", "scheduler", "dag_processor")
        return all(health[part]["status"] == "healthy" for part in parts)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _event(line: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError:
        return line
    details = "".join(
        f"\n  {error['exc_type']}: {error['exc_value']}" for error in entry.get("error_detail", [])
    )
    return f"{entry.get('event', '')}{details}"
