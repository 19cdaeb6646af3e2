"""A local Airflow to work with: ``python -m qsens_airflow.up start``, and ``stop``.

The DAG is not paused, and the pool is made with a slot for each GPU. What is not set in the
environment is that of the demo, so that a run works at once. ``serve`` is what ``start`` leaves
running.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from qsens.config import Roots
from qsens.errors import TryAgain, UserError
from qsens.writing import write_text
from qsens_airflow.entry import run
from qsens_airflow.guard import computing_environment
from qsens_airflow.lease import devices_to_lease
from qsens_airflow.local import Components
from qsens_airflow.plugin import PREFIX

_ROOT = Path(__file__).resolve().parents[2]
_START_SECONDS = 300
_STOP_SECONDS = 60


def main() -> int:
    """Do what the first argument says."""
    os.environ.setdefault("QSENS_ROOT", str(_ROOT))
    roots = Roots.from_environment()
    home = roots.root / ".airflow"
    verbs = {"start": start, "serve": lambda home: serve(home, roots), "stop": stop}
    words = sys.argv[1:] or ["start"]
    if len(words) > 1 or words[0] not in verbs:
        raise UserError(
            f"'{' '.join(words)}' is no verb of it",
            where="qsens_airflow.up",
            remedy=f"Verbs: {', '.join(verbs)}.",
        )
    return verbs[words[0]](home)


def start(home: Path) -> int:
    """Start Airflow in the background, unless it runs, and say where it is."""
    if (running := _running(home)) is None:
        (home / "logs").mkdir(parents=True, exist_ok=True)
        log = home / "logs" / "up.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "qsens_airflow.up", "serve"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        last = time.monotonic() + _START_SECONDS
        while (running := _running(home)) is None:
            if process.poll() is not None or time.monotonic() > last:
                process.terminate()
                tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
                raise TryAgain("did not start", where="Airflow", remedy=f"{tail}\nLog: {log}")
            time.sleep(0.3)
    for name in ("address", "user", "password", "reports"):
        print(f"{name:<9} {running[name]}")
    print("end it    make down")
    return 0


def serve(home: Path, roots: Roots) -> int:
    """Run Airflow until a signal comes."""
    slots = max(1, len(devices_to_lease()))
    environment = {
        "QSENS_PRESET": "demo",
        "QSENS_SCHEDULE": "none",
        "QSENS_POOL": "gpu",
        "QSENS_GPUS": str(slots),
    } | {key: value for key, value in os.environ.items() if key.startswith("QSENS_") and value}
    environment |= {"QSENS_ROOT": str(roots.root), "QSENS_RESULTS": str(roots.results)}
    # Tasks that need no GPU run beside those that do.
    airflow = Components(home, root=_ROOT, environment=environment, slots=slots + 2)
    if environment["QSENS_PRESET"] == "demo":
        words = [sys.executable, "-m", "qsens", "demo-model"]
        subprocess.run(words, env=computing_environment(airflow.environment), check=True)
    with airflow:
        pool = environment["QSENS_POOL"]
        if airflow.client.pool_slots(pool) is None:
            airflow.client.make_pool(pool, int(environment["QSENS_GPUS"]))
        airflow.client.unpause()
        known = {
            "pid": os.getpid(),
            "address": airflow.url,
            "user": airflow.user,
            "password": f"in {airflow.password_file}",
            "reports": f"{airflow.url}{PREFIX}/",
        }
        try:
            write_text(_state(home), json.dumps(known))
            signal.pause()
        finally:
            _state(home).unlink(missing_ok=True)
    return 0


def stop(home: Path) -> int:
    """End what ``start`` has started."""
    running = _running(home)
    if running is None:
        print("nothing to end: no Airflow is running here")
        return 0
    process = psutil.Process(running["pid"])
    process.terminate()
    try:
        process.wait(timeout=_STOP_SECONDS)
    except psutil.TimeoutExpired as error:
        raise TryAgain(
            f"has not ended within {_STOP_SECONDS} s",
            where=f"process {process.pid}",
            remedy=f"Its log: {home / 'logs' / 'up.log'}. `kill -9 {process.pid}` ends it.",
        ) from error
    print("ended")
    return 0


def _running(home: Path) -> dict[str, Any] | None:
    """Return what the Airflow that runs there has said of itself; none where none runs."""
    try:
        known: dict[str, Any] = json.loads(_state(home).read_text(encoding="utf-8"))
        words = psutil.Process(known["pid"]).cmdline()
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None
    # The number may be another process's by now.
    return known if words[1:] == ["-m", "qsens_airflow.up", "serve"] else None


def _state(home: Path) -> Path:
    return home / "up.json"


if __name__ == "__main__":
    run(main)
