"""Several devices, a process each: the numbers of one, and nothing left of a run that one ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qsens.config import Roots
from qsens.errors import UserError
from qsens.grid import Plan
from qsens.pipeline.plan import plan_json, plan_sweep
from qsens.results import read_manifest
from qsens.store import Store
from qsens.writing import write_text

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult

REPO = Path(__file__).resolve().parents[2]


def planned(checkpoint: DemoResult, results: Path, *more: str, method: str = "fisher") -> Plan:
    roots = Roots.from_environment()
    words = [
        f"model.path={checkpoint.directory}",
        "quant_pair=wfp8_afp8,wint8_afp16",
        "dataset.size=small,medium",
        "autoquant.device=cpu",
        f"autoquant.method={method}",
        *more,
    ]
    return plan_sweep(
        "single", words, roots=Roots(root=roots.root, results=results, configs=roots.configs)
    )


def start(plan: Plan, verb: str) -> subprocess.Popen[str]:
    path = plan.results / "plan.json"
    write_text(path, plan_json(plan))
    cell = ("--cell", plan.cells[0].cell) if verb != "audit" else ()
    return subprocess.Popen(
        [sys.executable, "-m", "qsens", verb, "--json", "--plan", str(path), *cell],
        env={**os.environ, "QSENS_ROOT": str(REPO), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows_of(plan: Plan) -> dict[str, float]:
    manifests = {cell.cell: read_manifest(Store(plan).manifest(cell)) for cell in plan.cells}
    return {
        f"{cell} {name}": row.sensitivity
        for cell, manifest in manifests.items()
        for name, row in manifest.layer_sensitivity.items()
        if row.sensitivity is not None
    }


def workers_of(pid: int) -> list[int]:
    """Return the workers of a process: its children that run the module."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                words = (entry / "cmdline").read_text().split("\0")
            except OSError:
                continue
            if int(stat[1]) == pid and stat[0] != "Z" and "qsens.pipeline.worker" in words:
                found.append(int(entry.name))
    return found


def until(condition: Any, seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


def reaches(run: subprocess.Popen[str], words: str) -> None:
    """Read what a run says until it says ``words``."""
    assert run.stderr is not None
    for line in run.stderr:
        if words in line:
            return
    raise AssertionError(f"it never said {words!r}")


@pytest.fixture(scope="module")
def undisturbed(
    demo_checkpoint: DemoResult, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, float]:
    plan = planned(demo_checkpoint, tmp_path_factory.mktemp("one"))
    run = start(plan, "score")
    assert run.communicate()[0]
    assert run.returncode == 0
    return rows_of(plan)


def test_two_processes_calibrate_score_and_audit_as_one(
    demo_checkpoint: DemoResult, tmp_path: Path, undisturbed: dict[str, float]
) -> None:
    plan = planned(demo_checkpoint, tmp_path, "autoquant.devices=2", "autoquant.audit=sample")
    for verb in ("calibrate", "score", "audit"):
        out, said = start(plan, verb).communicate()
        assert json.loads(out), said
    assert rows_of(plan) == pytest.approx(undisturbed, rel=1e-6)
    assert len(json.loads(out)["audits"]) == 2


def test_a_worker_that_is_killed_ends_the_step_with_its_rank_and_the_next_try_is_whole(
    demo_checkpoint: DemoResult, tmp_path: Path, undisturbed: dict[str, float]
) -> None:
    # Little memory: many windows, and time to be hit between two of them.
    plan = planned(demo_checkpoint, tmp_path, "autoquant.devices=3", "autoquant.memory_gb=0.05")
    run = start(plan, "score")
    reaches(run, " score 1/")  # in the middle of the pass
    workers = until(lambda: workers_of(run.pid))
    assert len(workers) == 2
    killed = time.monotonic()
    os.kill(workers[1], signal.SIGKILL)
    out, _ = run.communicate(timeout=60)
    assert time.monotonic() - killed < 20
    assert run.returncode == 1
    told = json.loads(out)
    assert told["error"] == "Fault"
    assert "was ended by SIGKILL" in told["what"]
    assert told["where"] in [f"process {rank} of 3 (autoquant.devices)" for rank in (1, 2)]
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    store = Store(plan)
    assert not any(store.is_done(cell) for cell in plan.cells)
    assert not list(tmp_path.rglob("*manifest.json"))
    again = start(plan, "score")
    assert again.communicate()[0]
    assert again.returncode == 0
    assert rows_of(plan) == pytest.approx(undisturbed, rel=1e-6)


def test_workers_end_with_the_process_that_leads_them(
    demo_checkpoint: DemoResult, tmp_path: Path
) -> None:
    run = start(planned(demo_checkpoint, tmp_path, "autoquant.devices=2"), "score")
    workers = until(lambda: workers_of(run.pid))
    run.kill()
    run.communicate()
    until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), 10)


def test_a_worker_that_cannot_load_says_why(demo_checkpoint: DemoResult, tmp_path: Path) -> None:
    plan = planned(demo_checkpoint, tmp_path, "autoquant.devices=2", "autoquant.memory_gb=0.001")
    out, _ = (run := start(plan, "score")).communicate()
    assert run.returncode == 2
    assert "a pass needs 0.0" in json.loads(out)["what"]
    assert not workers_of(run.pid)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["autoquant.devices=0"], "neither a number of devices, 1 to 64, nor auto"),
        (["autoquant.devices=all"], "neither a number of devices, 1 to 64, nor auto"),
        (["autoquant.devices=2", "autoquant.device=cuda:1"], "device=cuda:1 is one"),
        (["autoquant.devices=2", "autoquant.engine=modelopt"], "runs on one device"),
    ],
)
def test_devices_that_cannot_be_are_refused(
    demo_checkpoint: DemoResult, tmp_path: Path, words: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        planned(demo_checkpoint, tmp_path, *words, method="gradient")
