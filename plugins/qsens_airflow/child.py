"""One run of the command line in a fresh interpreter: its log streamed, its JSON read.

The child stays in the process group of the Airflow task, so that what ends the task ends it too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import psutil  # type: ignore[import-untyped]

from qsens.config import Roots
from qsens_airflow.guard import computing_environment, hide
from qsens_airflow.parent import end_with_parent

# Airflow sends SIGKILL five seconds after SIGTERM; the child must be gone before.
GRACE_SECONDS = 3.0
# Environment variable by which a child's whole family is found, orphans included.
_MARK = "QSENS_CHILD"


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: Exit code; negative for the signal that ended it.
        answer: What it printed as JSON; none when it printed anything else.
        killed: Whether it was ended from here.
    """

    code: int
    answer: dict[str, Any] | None
    killed: bool

    @property
    def signal(self) -> str | None:
        """Name of the signal that ended the child, if one did."""
        if self.code >= 0 and not self.killed:
            return None
        with contextlib.suppress(ValueError):
            return signal.Signals(-self.code).name
        return "SIGTERM" if self.killed else f"signal {-self.code}"


@dataclass
class Child:
    """A run of ``python -m qsens``.

    Attributes:
        arguments: Arguments of the command line.
        environment: Variables that it gets beside what it needs of this process's.
        inherited: Descriptors that it inherits.
    """

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    inherited: Sequence[int] = ()
    _mark: str = field(default_factory=lambda: uuid.uuid4().hex, init=False)
    _process: subprocess.Popen[str] | None = field(default=None, init=False)
    _killed: bool = field(default=False, init=False)

    def run(self, log: Callable[[str], None]) -> Ended:
        """Run it to its end.

        Args:
            log: Gets every line of the child's stderr as it comes.
        """
        roots = Roots.from_environment()
        python = os.environ.get("QSENS_PYTHON") or sys.executable
        # What started this process is hidden where Airflow starts: see airflow_local_settings.
        hide()
        environment = {
            **computing_environment(os.environ),
            "QSENS_ROOT": str(roots.root),
            "QSENS_RESULTS": str(roots.results),
            _MARK: self._mark,
            **self.environment,
        }
        with tempfile.TemporaryFile("w+", encoding="utf-8") as stdout:
            process = subprocess.Popen(
                [python, "-m", "qsens", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=environment,
                pass_fds=self.inherited,
                # A worker that is killed must not leave a device busy.
                preexec_fn=end_with_parent(),
            )
            self._process = process
            assert process.stderr is not None
            reader = threading.Thread(target=_each_line, args=(process.stderr, log), daemon=True)
            reader.start()
            try:
                if self._killed:
                    self.kill()
                code = process.wait()
            finally:
                self.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
                _signal(self._family(), signal.SIGKILL)
            # A process that the child left behind may hold the pipe open: do not wait for it.
            reader.join(timeout=2)
            stdout.seek(0)
            return Ended(code, _json(stdout.read()), self._killed)

    def kill(self) -> None:
        """End the child and all that it started: SIGTERM, then SIGKILL after a grace."""
        if self._process is None:
            self._killed = True
            return
        if self._process.returncode is not None:
            return
        self._killed = True
        # Runs inside a signal handler while `run` waits, so it must not reap the child itself.
        _signal(self._family(), signal.SIGTERM)
        end = time.monotonic() + GRACE_SECONDS
        while self._family() and time.monotonic() < end:
            time.sleep(0.05)
        _signal(self._family(), signal.SIGKILL)

    def _family(self) -> list[psutil.Process]:
        """Return the processes alive of the child and all that it started."""
        return [process for process in psutil.process_iter() if _is_marked(process, self._mark)]


def _each_line(stream: IO[str], log: Callable[[str], None]) -> None:
    with stream, contextlib.suppress(ValueError):
        for line in stream:
            log(line.rstrip())


def _json(text: str) -> dict[str, Any] | None:
    """Return the object in the last line; libraries may have printed lines before it."""
    try:
        value = json.loads(text.rstrip().rpartition("\n")[2])
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return bool(process.environ().get(_MARK) == mark)
    except (psutil.Error, OSError):
        return False


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
