"""Leases of devices: real processes, real locks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from airflow.sdk import DAG, TaskInstanceState

from qsens.config import Roots
from qsens.grid import Plan
from qsens.pipeline.plan import plan_sweep
from qsens.store import Store
from qsens_airflow import base, lease
from qsens_airflow.cells import ScoreOperator
from tests.airflow.test_operators import run
from tests.pipeline import results
from tests.waiting import wait_for

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
Script = Callable[[str], Path]
CELL = "wfp8_afp8-small"
DONE = '{"cell": "wfp8_afp8-small", "status": "done", "computed": true}'
LISTED = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb)
  MIG 3g.40gb     Device  0: (UUID: MIG-cccc)
  MIG 3g.40gb     Device  1: (UUID: MIG-dddd)
"""
# Takes a lease, starts a child that inherits it, and waits.
HOLDER = """
import sys
from qsens_airflow.child import Child
from qsens_airflow.lease import take
lease = take(sys.argv[1:])
print(lease.devices, flush=True)
Child(["score"], inherited=lease.descriptors).run(print)
"""


@pytest.fixture(autouse=True)
def _two_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lease.DIRECTORY, str(tmp_path / "leases"))
    monkeypatch.setenv(lease.VISIBLE, "0,1")


@pytest.fixture
def start_holder(
    tmp_path: Path, python: Script
) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a process that has the first device, with a child that has it too."""
    started: list[subprocess.Popen[str]] = []

    def start(body: str) -> subprocess.Popen[str]:
        python(body)
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, "0", "1"],
            env=os.environ | {"PYTHONPATH": str(PLUGINS)},
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        wait_for(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text() != "")
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def taken(device: str) -> bool:
    found = lease.take([device])
    if found is None:
        return True
    found.release()
    return False


@pytest.mark.parametrize(
    ("visible", "devices"),
    [("0,1", ["0", "1"]), (" GPU-a , GPU-b ", ["GPU-a", "GPU-b"]), ("1", []), ("", [])],
)
def test_what_is_visible_already_is_respected(
    monkeypatch: pytest.MonkeyPatch, visible: str, devices: list[str]
) -> None:
    monkeypatch.setenv(lease.VISIBLE, visible)
    assert lease.devices_to_lease() == devices


@pytest.mark.parametrize(("code", "devices"), [(0, ["GPU-aaaa", "MIG-cccc", "MIG-dddd"]), (9, [])])
def test_devices_are_counted_by_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, devices: list[str]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n[ $1 = -L ] && cat <<'E'\n{LISTED}E\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.delenv(lease.VISIBLE)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert lease.devices_to_lease() == devices


def test_each_lease_is_another_device_until_none_is_left() -> None:
    held = [lease.take(["0", "1"]), lease.take(["0", "1"])]
    assert [one.devices for one in held if one] == ["0", "1"]
    assert lease.take(["0", "1"]) is None
    for one in held:
        assert one is not None
        one.release()
    assert not taken("0")


def test_several_are_leased_at_once_or_none() -> None:
    three = ["0", "1", "2"]
    held = lease.take(three, 2)
    assert held is not None
    assert held.devices == "0,1"
    assert lease.take(three, 2) is None
    assert not taken("2")  # what was not enough is given back
    last = lease.take(three, 1)
    assert last is not None
    assert last.devices == "2"
    held.release()
    assert not taken("0")
    assert not taken("1")
    last.release()


def test_tasks_that_each_need_most_devices_never_hold_half_of_them() -> None:
    taker = """
from qsens_airflow.lease import take
done = misses = 0
while done < 200:
    held = take(["0", "1", "2"], 2)
    if held is None:
        misses += 1
        continue
    done += 1
    held.release()
print(done, misses)
"""
    environment = {**os.environ, "PYTHONPATH": f"{PLUGINS.parent}{os.pathsep}{PLUGINS}"}
    takers = [
        subprocess.Popen(
            [sys.executable, "-c", taker], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    said = [each.communicate(timeout=120)[0].split() for each in takers]
    assert [done for done, _ in said] == ["200"] * 3
    assert not any(taken(device) for device in ("0", "1", "2"))


def test_a_child_that_outlives_the_task_has_its_device_still(
    tmp_path: Path, start_holder: Callable[[str], subprocess.Popen[str]]
) -> None:
    holder = start_holder("trap '' TERM; echo $$ > child; exec sleep 300")
    child = int((tmp_path / "child").read_text())
    assert taken("0")
    assert not taken("1")
    holder.kill()
    holder.wait()
    time.sleep(0.5)
    assert taken("0")
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: not taken("0"))


def test_a_child_ends_with_a_task_that_is_killed_and_the_device_is_free(
    tmp_path: Path, start_holder: Callable[[str], subprocess.Popen[str]]
) -> None:
    holder = start_holder("echo $$ > child; exec sleep 300")
    child = int((tmp_path / "child").read_text())
    holder.kill()
    holder.wait()
    wait_for(lambda: not _runs(child))
    assert not taken("0")


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.fixture
def plan(demo_checkpoint: object, tmp_path: Path, python: Script) -> Plan:
    python(f"echo $CUDA_VISIBLE_DEVICES >> devices; echo '{DONE}'")
    path = demo_checkpoint.directory  # type: ignore[attr-defined]
    return plan_sweep(
        "single",
        [f"model.path={path}"],
        out=tmp_path / "plan.json",
        roots=Roots.from_environment(),
    )


def score(tmp_path: Path, gpus: int = 1) -> ScoreOperator:
    with DAG(f"dag_{tmp_path.name}", schedule=None):
        return ScoreOperator(
            task_id="score", cell=CELL, plan=str(tmp_path / "plan.json"), gpus=gpus, retries=0
        )


def devices(tmp_path: Path) -> list[str]:
    return (tmp_path / "devices").read_text().split("\n")[:-1]


@pytest.mark.usefixtures("airflow_database", "own_signals", "plan")
def test_a_task_has_the_device_that_is_free_for_itself(tmp_path: Path) -> None:
    held = lease.take(["0"])
    assert held is not None
    assert run(score(tmp_path)).state == TaskInstanceState.SUCCESS
    assert devices(tmp_path) == ["1"]
    held.release()
    assert not taken("1")


@pytest.mark.usefixtures("airflow_database", "own_signals", "plan")
def test_a_task_has_all_the_devices_that_it_takes_or_fails_where_there_never_are_as_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(score(tmp_path, gpus=2)).state == TaskInstanceState.SUCCESS
    assert devices(tmp_path) == ["0,1"]
    assert not taken("0")
    assert run(score(tmp_path, gpus=3)).state == TaskInstanceState.FAILED
    assert "takes 3 devices (dag.gpus_per_task), and this host has 2: 0, 1" in (
        capsys.readouterr().out
    )


@pytest.mark.usefixtures("airflow_database", "own_signals", "plan")
def test_a_task_gives_its_slot_back_where_no_device_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(base, "PAUSE", timedelta(seconds=1))
    held = [lease.take(["0", "1"]), lease.take(["0", "1"])]
    log = ScoreOperator.give_back

    def release(*arguments: object) -> Exception:
        answer = log(*arguments)  # type: ignore[arg-type]
        for one in held:
            assert one is not None
            one.release()
        return answer

    monkeypatch.setattr(ScoreOperator, "give_back", release)
    instance = run(score(tmp_path))
    assert (instance.state, instance.try_number) == (TaskInstanceState.SUCCESS, 1)
    assert devices(tmp_path) == ["0"]
    assert "no device is free of 0, 1 | Slot given back" in capsys.readouterr().out


@pytest.mark.usefixtures("airflow_database", "own_signals")
def test_a_result_that_is_there_waits_for_no_device_and_starts_no_child(
    tmp_path: Path, plan: Plan
) -> None:
    results.result(plan, plan.cells[0], seed=0)
    held = [lease.take(["0", "1"]), lease.take(["0", "1"])]
    assert all(held)
    assert run(score(tmp_path)).state == TaskInstanceState.SUCCESS
    assert not (tmp_path / "devices").exists()
    for one in held:
        assert one is not None
        one.release()
    # One that is not what was written is computed again, by a child with a device.
    manifest = Store(plan).manifest(plan.cells[0])
    manifest.write_bytes(manifest.read_bytes().replace(b"scored", b"Scored", 1))
    assert run(score(tmp_path)).state == TaskInstanceState.SUCCESS
    assert devices(tmp_path) in (["0"], ["1"])
