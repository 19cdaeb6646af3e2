"""The topology of the compose file as plain processes on loopback, in a directory of its own.

Commands and settings are those of ``docker-compose.yaml``; what differs is what a machine without
containers has to differ in: addresses, directories, ports, and timeouts that a test can wait for.
"""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil
from filelock import FileLock, Timeout

from qsens_airflow.parent import end_with_parent
from qsens_airflow.processes import descendants, end, free_port
from qsens_airflow.rest import UNFINISHED, Client, TaskState
from tests.compose import ROOT, example, services

DAG_ID = "qsens_sweep"
AIRFLOW = ("api-server", "scheduler", "dag-processor", "triggerer", "worker", "gpu-worker-0")
_START_SECONDS = 600
# What the image without torch does not have.
ABSENT = ("torch", "transformers", "modelopt")


def postgres_directory() -> Path | None:
    """Return where PostgreSQL's programs are; none when it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


def lacks() -> list[str]:
    """Return the Debian packages that the stack needs and that are not installed."""
    needed = {
        "postgresql": postgres_directory() is not None,
        "redis-server": shutil.which("redis-server") is not None,
    }
    return [name for name, there in needed.items() if not there]


@dataclass
class Stack:
    """The running services; use it as a context manager.

    Attributes:
        checkpoint: The demo checkpoint.
        directory: Holds all that the stack writes.
        secrets: The variables of ``.env``, secrets among them.
        restarts: How often a service that ended by itself was started again, as Compose would.
    """

    checkpoint: Path
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="qsens-stack-")))
    restarts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Lay out directories, ports and every service's environment."""
        # PostgreSQL, which is another user, must get through.
        self.directory.chmod(0o755)
        self.project = self.directory / "project"
        self.results = self.directory / "results"
        self.logs = self.directory / "logs"
        self.secrets = {
            name: value or secrets.token_hex(16) for name, value in example().items()
        } | {
            "AIRFLOW_FERNET_KEY": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
            "QSENS_PRESET": "stack",
            "QSENS_SCHEDULE": "none",
            "AIRFLOW_UID": str(os.getuid()),
        }
        self.password = self.secrets["AIRFLOW_ADMIN_PASSWORD"]
        self._ports = {name: free_port() for name in ("postgres", "redis", *AIRFLOW)}
        self.url = f"http://127.0.0.1:{self._ports['api-server']}"
        self._services = services(self.secrets)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """The REST API."""
        assert self._client is not None, "not started"
        return self._client

    def __enter__(self) -> Self:
        """Start everything and wait until the DAG can run."""
        for path in (self.project, self.results, self.logs, self.directory / "airflow"):
            path.mkdir()
        # As in the image: else the first process writes one, with keys in it, and all read it.
        (self.directory / "airflow" / "airflow.cfg").touch()
        preset = self.project / "configs" / "sweep" / "stack.yaml"
        preset.parent.mkdir(parents=True)
        shipped = (ROOT / "configs" / "sweep" / "demo-text.yaml").read_text(encoding="utf-8")
        preset.write_text(f"{shipped}dag: {{retry_delay_seconds: 5}}\n", encoding="utf-8")
        model = self.project / "models" / "tiny_qwen3_vl" / "checkpoints" / "tiny-qwen3-vl"
        shutil.copytree(self.checkpoint, model)
        for name in ABSENT:
            package = self.directory / "no-torch" / name
            package.mkdir(parents=True)
            text = f'raise ModuleNotFoundError("this image has no {name}", name="{name}")\n'
            (package / "__init__.py").write_text(text, encoding="utf-8")
        try:
            self._make_postgres()
            self.start("postgres")
            self.start("redis")
            self._wait("PostgreSQL", self._postgres_answers)
            self._initialise()
            for name in AIRFLOW:
                self.start(name)
            self._wait("the components", self._healthy)
            self._client = Client(self.url, DAG_ID, user="admin", password=self.password)
            self._wait(f"the DAG {DAG_ID}", self._client.is_parsed)
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
        """Stop everything; the directory stays when something failed."""
        self.stop()
        if error is None:
            shutil.rmtree(self.directory)

    def stop(self) -> None:
        """Stop every service, the database last."""
        if self._client is not None:
            self._client.close()
            self._client = None
        first = [self._processes[name] for name in AIRFLOW if name in self._processes]
        end(first, grace=15)
        end([self._processes[name] for name in self._processes if name not in AIRFLOW], grace=10)
        self._processes.clear()

    def start(self, name: str) -> None:
        """Start a service."""
        command, user = self._command(name)
        with (self.logs / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(name),
                cwd=self.directory,
                user=user,
                group=user,
                extra_groups=[] if user else None,
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )

    def kill(self, name: str) -> None:
        """Kill a service and all its processes at once, as the end of its container does."""
        family = self.family(name)
        process = self._processes.pop(name)
        # Nobody may start another one, or see the others go, meanwhile.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.send_signal(number)
        process.wait()

    def restart(self, name: str, *, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop a service and start it again."""
        process = self._processes.pop(name)
        process.send_signal(number)
        process.wait(timeout=60)
        self.start(name)

    def environment(self, name: str) -> dict[str, str]:
        """Return a service's environment: that of the compose file, at other addresses."""
        own = {key: os.environ[key] for key in ("PATH", "LANG", "TZ") if key in os.environ}
        if name == "postgres":
            return own
        environment = dict(self._services[name].environment)
        if name == "redis":
            return own | environment
        absent = [] if name == "gpu-worker-0" else [str(self.directory / "no-torch")]
        environment = {key: self._here(value) for key, value in environment.items()}
        return (
            own
            | environment
            | {
                "AIRFLOW_HOME": str(self.directory / "airflow"),
                "HOME": str(self.directory),
                "PYTHONPATH": os.pathsep.join([*absent, str(ROOT)]),
                "TMPDIR": str(self._made(self.directory / "tmp")),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                # What a test can wait for.
                "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
                "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
                "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "20",
                "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT": "60",
                "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT_CHECK_INTERVAL": "15",
                "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "20",
                "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.5",
                "AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES": "1",
                "AIRFLOW__SCHEDULER__ENABLE_HEALTH_CHECK": "false",
                "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "2",
                "AIRFLOW__TRIGGERER__CAPACITY": "10",
            }
        )

    def family(self, name: str) -> list[psutil.Process]:
        """Return the processes of a service."""
        process = self._processes[name]
        return [psutil.Process(process.pid), *descendants([process])]

    def arguments(self) -> list[str]:
        """Return the arguments of every process of every service."""
        found = []
        for process in [process for name in self._processes for process in self.family(name)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(" ".join(process.cmdline()))
        return found

    def _here(self, text: str) -> str:
        """Return a text of the compose file with the addresses and places of this machine."""
        places = {
            "@postgres:5432/": f"@127.0.0.1:{self._ports['postgres']}/",
            "@redis:6379/": f"@127.0.0.1:{self._ports['redis']}/",
            "http://api-server:8080/": f"{self.url}/",
            "http://localhost:8080": self.url,
            "/opt/airflow/dags": str(ROOT / "dags"),
            "/opt/airflow/plugins": str(ROOT / "plugins"),
            "/opt/airflow/logs": str(self.logs),
            "/opt/qsens": str(self.project),
            "/results": str(self.results),
        }
        for there, here in places.items():
            text = text.replace(there, here)
        return text

    def start_missing(self) -> None:
        """Start what a test has killed and not started again."""
        for name in ("postgres", "redis", *AIRFLOW):
            if name not in self._processes:
                self.start(name)

    def keep_up(self) -> None:
        """Start every service again that has ended by itself, as ``restart: unless-stopped``."""
        for name, process in list(self._processes.items()):
            if process.poll() is not None:
                self.restarts[name] = self.restarts.get(name, 0) + 1
                self.start(name)

    def wait(
        self,
        run_id: str,
        *,
        seconds: float,
        until: Callable[[list[TaskState]], bool] | None = None,
    ) -> str:
        """Wait for the end of a run, or until its tasks are as asked.

        Returns:
            The state of the run.
        """
        last = time.monotonic() + seconds
        while True:
            with contextlib.suppress(httpx.TransportError):
                state = self.client.state(run_id)
                tasks = self.client.tasks(run_id)
                if state not in UNFINISHED or (until is not None and until(tasks)):
                    return state
            self.keep_up()
            if time.monotonic() > last:
                shown = ", ".join(f"{task.name}: {task.state}" for task in tasks)
                raise TimeoutError(f"{run_id} is still {state} after {seconds} s: {shown}")
            time.sleep(0.5)

    def task_log(self, run_id: str, task_id: str) -> str:
        """Return all tries of all instances of a task, as the API's log files hold them."""
        directory = self.logs / f"dag_id={DAG_ID}" / f"run_id={run_id}" / f"task_id={task_id}"
        return "\n".join(path.read_text(errors="replace") for path in directory.rglob("*.log"))

    def children(self, name: str, verb: str) -> list[psutil.Process]:
        """Return the processes ``python -m qsens VERB`` below a service."""
        found = []
        for process in descendants([self._processes[name]]):
            with contextlib.suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if words[1:4] == ["-m", "qsens", verb]:
                    found.append(process)
        return found

    def leftovers(self) -> list[str]:
        """Return what a finished run should not have left: processes, files, locks."""
        found = [f"process {process.pid}" for process in self._of_the_command_line()]
        for path in self.results.rglob("*"):
            if path.name.endswith(".tmp"):
                found.append(f"file {path}")
            if path.suffix == ".lock" and path.is_file():
                try:
                    with FileLock(path, timeout=0):
                        pass
                except Timeout:
                    found.append(f"lock {path}")
        found += [f"file {path}" for path in (self.directory / "tmp").glob("tmp*")]
        return found

    def processes(self) -> list[psutil.Process]:
        """Return every process that belongs to the stack, whoever started it."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if str(self.directory) in f"{process.cmdline()} {process.environ()}":
                    found.append(process)
        return [process for process in found if process.pid != os.getpid()]

    def _of_the_command_line(self) -> Iterator[psutil.Process]:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.cmdline()[1:3] == ["-m", "qsens"]:
                    yield process

    def _command(self, name: str) -> tuple[list[str], str | None]:
        service = self._services[name]
        root = os.geteuid() == 0
        if name == "postgres":
            directory = postgres_directory()
            assert directory is not None
            data = self.directory / "postgres"
            settings = {
                "port": self._ports["postgres"],
                "listen_addresses": "127.0.0.1",
                "unix_socket_directories": data,
                "fsync": "off",
            }
            words = [f"{key}={value}" for key, value in settings.items()]
            options = [part for word in words for part in ("-c", word)]
            return [f"{directory}/postgres", "-D", str(data), *options], (
                "postgres" if root else None
            )
        if name == "redis":
            data = self._made(self.directory / "redis")
            *shell, script = service.command
            here = f"--port {self._ports['redis']} --bind 127.0.0.1 --dir {data}"
            return [*shell, script.replace("redis-server -", f"redis-server - {here}")], None
        words = [
            {"0.0.0.0": "127.0.0.1", "8080": str(self._ports["api-server"])}.get(word, word)
            for word in service.command
        ]
        if words[0] == "celery":
            words += ["--celery-hostname", f"{name}@stack", "--pid", str(self.logs / f"{name}.pid")]
            # Two processor cores in all.
            words = ["2" if word == "4" else word for word in words]
        return [sys.executable, "-m", "airflow", *words], None

    def _make_postgres(self) -> None:
        directory = postgres_directory()
        assert directory is not None
        data = self.directory / "postgres"
        data.mkdir(mode=0o700)
        password = self.directory / "postgres-password"
        password.write_text(self.secrets["POSTGRES_PASSWORD"])
        user = "postgres" if os.geteuid() == 0 else None
        if user:
            for path in (data, password):
                shutil.chown(path, user, user)
        words = ["-U", "airflow", "-A", "scram-sha-256", "--pwfile", str(password), "-N"]
        self._run(
            "initdb", [f"{directory}/initdb", "-D", str(data), *words], self._plain(), user=user
        )
        password.unlink()

    def _initialise(self) -> None:
        """Make the databases, as the image does, then run the service ``init``."""
        postgres = self._services["postgres"].environment
        words = ["psql", "--no-psqlrc", "--set", "ON_ERROR_STOP=1", "--username", "airflow"]
        words += ["--host", "127.0.0.1", "--port", str(self._ports["postgres"]), "--dbname"]
        environment = self._plain() | postgres | {"PGPASSWORD": postgres["POSTGRES_PASSWORD"]}
        make = "CREATE DATABASE airflow"
        self._run("createdb", [*words, "postgres", "--command", make], environment)
        file = str(ROOT / "docker" / "celery.sql")
        self._run("celery-sql", [*words, "airflow", "--file", file], environment)
        init = self._services["init"]
        script = self._here(init.command[0])
        if os.geteuid() != 0:
            # Nobody but root may give files away, or become somebody else.
            script = f'chown() {{ :; }}; setpriv() {{ shift 5; "$@"; }}\n{script}'
        environment = self.environment("init")
        own = [str(Path(sys.executable).parent), environment["PATH"]]
        environment["PATH"] = os.pathsep.join(own)
        self._run("init", [*init.definition["entrypoint"], script], environment)

    def _run(
        self, name: str, command: list[str], environment: Mapping[str, str], *, user: Any = None
    ) -> None:
        with (self.logs / f"{name}.log").open("wb") as log:
            done = subprocess.run(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.directory,
                user=user,
                group=user,
                extra_groups=[] if user else None,
                check=False,
            )
        if done.returncode:
            raise RuntimeError((self.logs / f"{name}.log").read_text()[-3000:])

    def _plain(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        last = time.monotonic() + _START_SECONDS
        while not ready():
            for name, process in self._processes.items():
                if process.poll() is not None:
                    tail = (self.logs / f"{name}.log").read_text(errors="replace")[-3000:]
                    raise RuntimeError(f"{name} ended with {process.returncode}:\n{tail}")
            if time.monotonic() > last:
                raise TimeoutError(f"waited {_START_SECONDS} s for {what}; logs: {self.logs}")
            time.sleep(0.5)

    def _postgres_answers(self) -> bool:
        directory = postgres_directory()
        words = ["-h", "127.0.0.1", "-p", str(self._ports["postgres"]), "-U", "airflow", "-q"]
        return not subprocess.call([f"{directory}/pg_isready", *words])

    def _healthy(self) -> bool:
        try:
            health = httpx.get(f"{self.url}/api/v2/monitor/health", timeout=10).json()
        except (httpx.TransportError, ValueError):
            return False
        parts = ("metadatabase", "scheduler", "dag_processor", "triggerer")
        return all(health[part]["status"] == "healthy" for part in parts)

    @staticmethod
    def _made(path: Path) -> Path:
        path.mkdir(exist_ok=True)
        return path
