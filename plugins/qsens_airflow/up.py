"""A local Airflow to look around in: ``python -m qsens_airflow.up``; Ctrl-C ends it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from qsens.config import Roots
from qsens_airflow.entry import run
from qsens_airflow.local import Components

_ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Start the components and wait for a signal."""
    os.environ.setdefault("QSENS_ROOT", str(_ROOT))
    roots = Roots.from_environment()
    environment = {"QSENS_ROOT": str(roots.root), "QSENS_RESULTS": str(roots.results)}
    airflow = Components(roots.root / ".airflow", root=_ROOT, environment=environment)
    with airflow:
        print(f"address   {airflow.url}")
        print(f"user      {airflow.user}")
        print(f"password  in {airflow.password_file}", flush=True)
        signal.pause()
    return 0


if __name__ == "__main__":
    run(main)
