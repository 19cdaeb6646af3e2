"""A real Airflow for the tests: its own home and database, set before Airflow is imported."""

from __future__ import annotations

import importlib.util
import os
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_HOME = tempfile.TemporaryDirectory(prefix="qsens-airflow-")

os.environ |= {
    "AIRFLOW_HOME": _HOME.name,
    "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
    "AIRFLOW__CORE__DAGS_FOLDER": f"{_HOME.name}/dags",
    "AIRFLOW__CORE__PLUGINS_FOLDER": f"{_HOME.name}/plugins",
    "AIRFLOW__CORE__UNIT_TEST_MODE": "false",
    "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{_HOME.name}/airflow.db",
}
for name in ("dags", "plugins"):
    Path(_HOME.name, name).mkdir()

collect_ignore_glob = [] if importlib.util.find_spec("airflow") else ["test_*.py"]

Script = Callable[[str], Path]


@pytest.fixture(scope="session")
def airflow_database() -> None:
    """Airflow's tables."""
    from airflow.dag_processing.bundles.manager import DagBundlesManager
    from airflow.utils.db import initdb

    initdb()
    DagBundlesManager().sync_bundles_to_db()


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Give the interpreter that operators start: a real executable with the given shell body."""

    def write(body: str) -> Path:
        path = tmp_path / "python"
        path.write_text(f'#!/bin/sh\ncd "{tmp_path}"\n{body}\n', encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("QSENS_PYTHON", str(path))
        return path

    monkeypatch.setenv("QSENS_ROOT", str(ROOT))
    monkeypatch.setenv("QSENS_RESULTS", str(tmp_path / "results"))
    return write


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Put the handlers back that Airflow's task runner leaves in place."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
