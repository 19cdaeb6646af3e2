"""The other processes of a team, from their start to their end, as the leading one sees them.

Whoever of them ends takes the rest along, and the step that they were at ends with the reason,
within seconds: nothing of it was written. Imports torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import torch
from torch import nn

from qsens.documents import dump_document
from qsens.engine.team import ProcessTeam, join
from qsens.errors import Fault, OutOfMemory, QsensError, UserError
from qsens.grid import Plan
from qsens.pipeline.worker import ready_of, reason_of
from qsens.writing import write_text

_OUT_OF_MEMORY = ("OutOfMemoryError", "OutOfMemory", "MemoryError")
_POLL = 0.1  # seconds
# A connection that breaks may be seen before the process that broke it is seen to have ended.
_GRACE = 5.0


class _Ended(BaseException):
    """A process of the team has ended."""


class Workers:
    """Starts the other processes, and ends them.

    Args:
        plan: The plan.
        count: Processes in all, this one included.
    """

    def __init__(self, plan: Plan, count: int) -> None:
        self._count = count
        # On a CPU they share its cores: more threads than those only wait for each other.
        self._threads = torch.get_num_threads()
        torch.set_num_threads(max(1, self._threads // count))
        self._directory = TemporaryDirectory(prefix="qsens-team-")
        self._meeting = Path(self._directory.name) / "meeting"
        path = self._meeting.with_name("plan.json")
        write_text(path, dump_document(plan))
        self._team: ProcessTeam | None = None
        self._lock = threading.Lock()
        self._closing = self._working = False
        self._reason: QsensError | None = None
        self._ended = threading.Event()
        self._processes = {rank: self._start(path, rank) for rank in range(1, count)}
        threading.Thread(target=self._watch, name="workers", daemon=True).start()

    def _start(self, plan: Path, rank: int) -> subprocess.Popen[bytes]:
        words = [str(plan), str(rank), str(self._count), str(self._meeting), str(os.getpid())]
        with self._log(rank).open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "qsens.pipeline.worker", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            )

    def join(self, model: nn.Module) -> None:
        """Make a team of all processes, once all have loaded their model.

        Raises:
            QsensError: One of them has ended.
        """
        with self._guard():
            while not all(ready_of(self._meeting, rank).exists() for rank in self._processes):
                time.sleep(_POLL)
            self._team = ProcessTeam(0, self._count, self._meeting, self._guard)
        join(model, self._team)

    def close(self) -> None:
        """End the others; what they have open is theirs alone."""
        with self._lock:
            self._closing = True
        self._end_all()
        if self._team is not None:
            self._team.close()
            self._team = None
        self._directory.cleanup()
        torch.set_num_threads(self._threads)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Raise why a process has ended, in place of what this one makes of it."""
        here = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGUSR1, _interrupt) if here else None
        try:
            with self._lock:
                self._working = True
            if self._ended.is_set():
                raise _Ended
            yield
        except BaseException as error:
            if type(error) is RuntimeError or isinstance(error, torch.distributed.DistError):
                self._ended.wait(_GRACE)
            if self._reason is None:
                raise
            raise self._reason from (None if isinstance(error, _Ended) else error)
        finally:
            with self._lock:
                self._working = False
            if here:
                signal.signal(signal.SIGUSR1, before)

    def _watch(self) -> None:
        while not self._closing:
            for rank, process in self._processes.items():
                if process.poll() is not None:
                    self._fail(rank, process.returncode)
                    return
            time.sleep(_POLL)

    def _fail(self, rank: int, code: int) -> None:
        with self._lock:
            if self._closing:
                return
        self._end_all()
        self._reason = self._why(rank, code)
        with self._lock:
            self._ended.set()
            if self._working:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _end_all(self) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()

    def _why(self, rank: int, code: int) -> QsensError:
        """Return why a process has ended, as an error of the step."""
        where = f"process {rank} of {self._count} (autoquant.devices)"
        try:
            told = json.loads(reason_of(self._meeting, rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            last = self._log(rank).read_text("utf-8", "replace").strip().splitlines()[-1:]
            ended = f"ended with exit code {code}"
            if code < 0:
                ended = f"was ended by {signal.Signals(-code).name}"
            told = {"error": "", "what": ": ".join([ended, *last])}
        if told["error"] in _OUT_OF_MEMORY:
            remedy = "Set a smaller autoquant.memory_gb, or use devices with more memory."
            return OutOfMemory(told["what"], where=where, remedy=remedy)
        if told["error"] in (UserError.__name__, "Damaged"):
            return UserError(told["what"], where=told["where"] or where, remedy=told["remedy"])
        name = f"{told['error']}: " if told["error"] else ""
        return Fault(
            f"{name}{told['what']}", where=where, remedy="Nothing of it was stored. Run it again."
        )

    def _log(self, rank: int) -> Path:
        return self._meeting.with_name(f"{rank}.log")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Ended
