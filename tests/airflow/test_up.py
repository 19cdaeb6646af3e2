"""``make up`` and ``make down``: it comes up, answers, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from qsens_airflow.rest import Client

ROOT = Path(__file__).resolve().parents[2]


def up(root: Path, verb: str, code: int = 0) -> dict[str, str]:
    """Run a verb; return what it prints, by its first word."""
    environment = {key: value for key, value in os.environ.items() if "AIRFLOW" not in key}
    environment |= {
        "PYTHONPATH": str(ROOT / "plugins"),
        "QSENS_ROOT": str(root),
        "QSENS_RESULTS": str(root / "results"),
        # Any but the demo, which would build its checkpoint first.
        "QSENS_PRESET": "single",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "qsens_airflow.up", verb],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == code, done.stdout + done.stderr
    lines = [line.split(maxsplit=1) for line in (done.stdout or done.stderr).splitlines()]
    return {line[0]: line[1] if len(line) > 1 else "" for line in lines}


def processes_of(root: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(root) in f"{process.environ()}" and process.pid != os.getpid():
                found.append(process.pid)
    return found


def test_up_answers_and_down_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    try:
        said = up(tmp_path, "start")
        assert said["address"].startswith("http://127.0.0.1:")
        file = Path(said["password"].removeprefix("in "))
        assert file.stat().st_mode & 0o777 == 0o600
        password = json.loads(file.read_text())[said["user"]]
        client = Client(said["address"], "qsens_sweep", user=said["user"], password=password)
        assert client.is_parsed()
        assert client.pool_slots("gpu") >= 1
        dag: Any = client._call("GET", "/api/v2/dags/qsens_sweep")
        assert dag["is_paused"] is False
        client.close()
        # Behind the login.
        assert said["reports"] == f"{said['address']}/qsens/"
        assert httpx.get(said["reports"], timeout=60).status_code == 401
        # A second start finds the first.
        assert up(tmp_path, "start") == said
    finally:
        ended = up(tmp_path, "stop")
    assert "ended" in ended
    assert processes_of(tmp_path) == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(said["address"])
    assert "nothing" in up(tmp_path, "stop")
    assert not list(tmp_path.glob("**/*.json"))[1:]


def test_a_verb_that_does_not_exist_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    said = up(tmp_path, "begin", code=2)
    assert "start, serve, stop" in said["Verbs:"]
