"""The built wheel, installed elsewhere, plans ``demo``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult

REPO = Path(__file__).resolve().parents[2]


def test_wheel_plans_demo(demo_checkpoint: DemoResult, tmp_path: Path) -> None:
    subprocess.run(
        # With the build backend that is pinned and installed here.
        [
            sys.executable,
            "-m",
            "build",
            "--no-isolation",
            "--wheel",
            "--outdir",
            str(tmp_path / "dist"),
            str(REPO),
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    # The dependencies of this environment are seen; the project itself comes from the wheel.
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env/bin/python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = tmp_path / "env/lib" / version / "site-packages"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel],
        check=True,
        capture_output=True,
    )
    seen = [path for path in sys.path if path.endswith("site-packages")]
    (site / "zz_dependencies.pth").write_text("\n".join(seen))
    work = tmp_path / "work"
    work.mkdir()
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("QSENS_") and key != "PYTHONPATH"
    }
    done = subprocess.run(
        [
            python,
            "-m",
            "qsens",
            "plan",
            "demo",
            f"model.path={demo_checkpoint.directory}",
            "--json",
        ],
        cwd=work,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["cells"]) == 8
    where = subprocess.run(
        [python, "-c", "import qsens; print(qsens.__file__)"],
        cwd=work,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(site))
