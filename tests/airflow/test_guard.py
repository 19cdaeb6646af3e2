"""What a task's child can learn of Airflow: as another user than root, in real processes.

Root may read everything, so under root these processes run as nobody. One capability stays with
them, to read files of a checkout that nobody may enter; it opens no other process.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest

from qsens_airflow.guard import computing_environment
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
SECRET = "the-secret-that-a-child-must-not-see"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")

# Tries the doors to every ancestor, and lists what is open here.
PROBE = """
import json, os, sys

def parent(pid):
    return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])

def opens(path):
    try:
        with open(path, "rb") as file:
            return path.endswith("mem") or SECRET in file.read()
    except OSError:
        return False

def holds(pid):
    try:
        paths = [f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]
        return any(os.readlink(path).endswith("/secret") and opens(path) for path in paths)
    except OSError:
        return False

SECRET = bytes.fromhex(os.environ["QSENS_SOUGHT"])
pid, ancestors = os.getppid(), []
while pid > 1:
    ancestors.append(pid)
    pid = parent(pid)
print(json.dumps({
    "ancestors": ancestors,
    "environ": [pid for pid in ancestors if opens(f"/proc/{pid}/environ")],
    "mem": [pid for pid in ancestors if opens(f"/proc/{pid}/mem")],
    "files": [pid for pid in ancestors if holds(pid)],
    "own": opens("/proc/self/environ"),
    "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd")),
}))
"""

# A component of Airflow, and the process that it forks for a task, which starts the child.
COMPONENT = """
import os, sys
import airflow.settings

airflow.settings.initialize()
secret = os.open(sys.argv[1], os.O_RDONLY)
os.set_inheritable(secret, True)
if os.fork() == 0:
    from qsens_airflow.child import Child

    ended = Child(["probe"]).run(print)
    print(ended.code, ended.answer, file=sys.stderr)
    import json
    print(json.dumps({"component": os.getppid(), "task": os.getpid()} | (ended.answer or {})))
    sys.stdout.flush()
    os._exit(ended.code)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def as_a_user(*words: str) -> list[str]:
    """Return a command that runs as somebody who is not root."""
    if os.geteuid() != 0:
        return list(words)
    setpriv = shutil.which("setpriv")
    assert setpriv is not None
    nobody = ["--reuid", "nobody", "--regid", "nogroup", "--clear-groups"]
    reading = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    return [setpriv, *nobody, *reading, *words]


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that such a user may write to."""
    with TemporaryDirectory(prefix="qsens-guard-") as name:
        if os.geteuid() == 0:
            shutil.chown(name, "nobody", "nogroup")
        yield Path(name)


def environment(home: Path, **more: str) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "AIRFLOW__API_AUTH__JWT_SECRET": SECRET,
        "QSENS_ROOT": str(ROOT),
        "QSENS_RESULTS": str(home),
        "QSENS_SOUGHT": SECRET.encode().hex(),
        "PYTHONPATH": str(ROOT),
    } | more


def run(script: str, home: Path, *arguments: str, **more: str) -> dict[str, Any]:
    """Run a script as a user; return the JSON of its last line."""
    done = subprocess.run(
        as_a_user(sys.executable, "-c", script, *arguments),
        env=environment(home, **more),
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(answer, dict)
    return answer


def interpreter(home: Path, body: str) -> str:
    """Write what is started in the place of the child's interpreter."""
    script = home / "child.py"
    script.write_text(textwrap.dedent(body), encoding="utf-8")
    path = home / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}"\n', encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_a_child_reads_neither_environment_nor_memory_of_any_ancestor(home: Path) -> None:
    (home / "secret").write_text(SECRET)
    found = run(COMPONENT, home, str(home / "secret"), QSENS_PYTHON=interpreter(home, PROBE))
    # The chain is as Airflow's is: component, task, child.
    assert found["ancestors"][:2] == [found["task"], found["component"]]
    assert (found["environ"], found["files"]) == ([], [])
    assert not {found["task"], found["component"]} & set(found["mem"])
    assert found["own"] is False
    # Standard input, output and error; the last one lists the directory.
    assert found["descriptors"] == [0, 1, 2, 3]


def test_a_celery_worker_hides_itself_before_it_takes_a_task(home: Path) -> None:
    """The worker and what it forks: nobody's ``environ`` is open once it is ready."""
    more = {
        "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
        "AIRFLOW__CELERY__BROKER_URL": "memory://",
        "AIRFLOW__CELERY__RESULT_BACKEND": "cache+memory://",
    }
    words = ["-m", "airflow", "celery", "worker", "--skip-serve-logs", "--concurrency", "1"]
    with started(home, *words, **more) as (worker, log):
        wait_for(lambda: "celery@" in log.read_text() and " ready" in log.read_text())
        family = [worker.pid, *(child.pid for child in psutil.Process(worker.pid).children(True))]
        assert len(family) >= 2
        assert [pid for pid in family if readable(pid)] == []


def test_a_child_of_a_hidden_process_is_still_found_and_ended(home: Path) -> None:
    body = """
        import subprocess, sys, time
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        open("started", "w").close()
        time.sleep(300)
    """
    script = """
import json, os, threading, time
import psutil
from qsens_airflow.child import Child

child = Child(["wait"])
def end():
    while not os.path.exists("started"):
        time.sleep(0.05)
    found.extend(child._family())
    child.kill()
found = []
thread = threading.Thread(target=end)
thread.start()
ended = child.run(print)
thread.join()
left = [process.pid for process in found if process.is_running()
        and process.status() != psutil.STATUS_ZOMBIE]
print(json.dumps({"found": len(found), "left": left, "killed": ended.killed}))
"""
    ended = run(script, home, QSENS_PYTHON=interpreter(home, body), PYTHONPATH=plugins())
    assert ended == {"found": 2, "left": [], "killed": True}


def test_the_environment_of_a_child_holds_what_computes_and_nothing_else() -> None:
    needed = {
        "PATH": "/bin", "HOME": "/h", "USER": "u", "TMPDIR": "/t", "TZ": "UTC", "LANG": "C",
        "LC_ALL": "C", "PYTHONPATH": "/p", "LD_LIBRARY_PATH": "/l", "CUDA_VISIBLE_DEVICES": "0",
        "NVIDIA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": "/c",
        "PYTORCH_CUDA_ALLOC_CONF": "c", "HF_HOME": "/hf", "HF_HUB_OFFLINE": "1",
        "QSENS_MEMORY_SHARE": "0.5",
    }  # fmt: skip
    # In the ways that Airflow, its services and others are told of a secret.
    names = """
        AIRFLOW__CORE__FERNET_KEY AIRFLOW__CORE__FERNET_KEY_CMD AIRFLOW_CONN_QSENS_AIRFLOW
        AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_SECRET AIRFLOW_VAR_TOKEN _AIRFLOW_WWW_USER_PASSWORD
        ADMIN_PASSWORD REDISCLI_AUTH POSTGRES_PASSWORD PGPASSWORD DATABASE_URL CELERY_BROKER_URL
        HF_TOKEN HUGGING_FACE_HUB_TOKEN AWS_SECRET_ACCESS_KEY SENTRY_DSN https_proxy SSH_AUTH_SOCK
    """
    secret = dict.fromkeys(names.split(), SECRET)
    assert computing_environment(needed | secret) == needed
    more = {"QSENS_CHILD_ENVIRONMENT": "MY_CACHE, OTHER", "MY_CACHE": "/m", "OTHER": "o"}
    assert computing_environment(needed | secret | more) == needed | more


def plugins() -> str:
    return os.pathsep.join([str(ROOT / "plugins"), str(ROOT)])


@contextmanager
def started(home: Path, *words: str, **more: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run a process as a user, in a session of its own, to its end."""
    log = home / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            as_a_user(sys.executable, *words),
            env=environment(home, **more),
            cwd=home,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process, log
    except BaseException:
        print(log.read_text(errors="replace")[-3000:])
        raise
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def readable(pid: int) -> bool:
    """Return whether the same user may read the environment of a process."""
    done = subprocess.run(
        as_a_user("cat", f"/proc/{pid}/environ"), capture_output=True, check=False
    )
    return SECRET.encode() in done.stdout
