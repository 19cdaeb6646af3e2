"""The DAG file: it loads, it is cheap, it is stable, and it has the shape that the runs need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "dags").glob("*.py"))

# Runs in a fresh interpreter: what the DAG's file adds to a process that has Airflow's SDK.
PROBE = """
import json, sys, time
import airflow.sdk
from airflow.sdk import BaseOperator, Param, TriggerRule, XComArg, dag, task_group
import airflow.sdk.configuration, airflow.sdk.exceptions
started = time.process_time()
import qsens_sweep
seconds = time.process_time() - started
heavy = sorted({"torch", "transformers", "modelopt", "numpy"} & set(sys.modules))
from airflow.serialization.serialized_objects import DagSerialization
dag = qsens_sweep.qsens_sweep()
from airflow.models.serialized_dag import SerializedDagModel
data = DagSerialization.to_dict(dag)
print(json.dumps({"seconds": seconds, "heavy": heavy, "dag": data,
                  "hash": SerializedDagModel.hash(data)}))
"""


def load(**environment: str) -> DagBag:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QSENS_ROOT", str(ROOT))
        for name in ("QSENS_PRESET", "QSENS_SCHEDULE", "QSENS_QUEUE", "QSENS_POOL"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        return DagBag(str(ROOT / "dags"), bundle_name="dags-folder")


@pytest.fixture(scope="module")
def dag() -> Any:
    bag = load()
    assert bag.import_errors == {}
    return bag.dags["qsens_sweep"]


@pytest.fixture(scope="module")
def probes() -> list[dict[str, Any]]:
    """Two fresh interpreters that load the DAG under different hash seeds, from elsewhere."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "plugins", ROOT / "dags")))
    processes = [
        subprocess.run(
            [sys.executable, "-c", PROBE],
            env=os.environ | {"PYTHONPATH": path, "QSENS_ROOT": str(ROOT), "PYTHONHASHSEED": seed},
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
        )
        for seed in ("1", "2")
    ]
    return [json.loads(process.stdout.splitlines()[-1]) for process in processes]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_dag_file_loads_without_errors_and_without_warnings(file: Path) -> None:
    bag = load()
    assert bag.import_errors == {}
    assert not bag.captured_warnings
    assert {Path(dag.fileloc) for dag in bag.dags.values()} == set(FILES)


def test_the_file_costs_less_than_a_second_and_imports_nothing_heavy(
    probes: list[dict[str, Any]],
) -> None:
    assert min(probe["seconds"] for probe in probes) < 1.0
    assert [probe["heavy"] for probe in probes] == [[], []]


def test_two_processes_serialize_the_same_dag(probes: list[dict[str, Any]]) -> None:
    assert probes[0]["dag"] == probes[1]["dag"]
    # What Airflow compares to decide whether there is a new version.
    assert probes[0]["hash"] == probes[1]["hash"]


def test_the_order_of_the_tasks(dag: Any) -> None:
    edges = {task.task_id: sorted(task.downstream_task_ids) for task in dag.tasks}
    assert edges == {
        "plan": ["cell.calibrate", "cell.score", "publish"],
        "cell.calibrate": ["cell.score"],
        "cell.score": ["audit"],
        "audit": ["publish"],
        "publish": ["prune"],
        "prune": ["gate"],
        "gate": [],
    }
    assert dag.get_task("publish").trigger_rule == "all_done"
    assert dag.get_task("gate").trigger_rule == "all_done"
    # A cell that failed is left out; skipped, without a slot of the pool, where no cell was to run.
    assert dag.get_task("audit").trigger_rule == "all_done_min_one_success"
    assert (dag.get_task("prune").keep_sweeps, dag.get_task("prune").keep_days) == (30, 90)
    assert [task.task_id for task in dag.leaves] == ["gate"]


def test_settings_come_from_the_preset_and_the_environment(
    dag: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (dag.schedule, dag.catchup, dag.max_active_runs) == ("0 2 * * *", False, 4)
    assert dag.get_task("cell.score").execution_timeout == timedelta(hours=6)
    assert dag.get_task("cell.score").retry_delay == timedelta(minutes=1)
    assert dag.params["preset"] == "nightly"

    own = tmp_path / "sweep" / "weekly.yaml"
    own.parent.mkdir()
    own.write_text(
        "defaults: {model: tiny_qwen3_vl, dataset: demo, quant_pair: wfp8_afp8}\n"
        "dag: {schedule: '0 5 * * 0', max_active_runs: 1, pool: gpus, retries: 7,\n"
        "      retry_delay_seconds: 3, execution_timeout_minutes: 30, gpus_per_task: 2}\n"
    )
    weekly = load(QSENS_CONFIG_DIR=str(tmp_path), QSENS_PRESET="weekly", QSENS_QUEUE="gpu").dags[
        "qsens_sweep"
    ]
    assert (weekly.schedule, weekly.max_active_runs) == ("0 5 * * 0", 1)
    assert weekly.params["preset"] == "weekly"
    for name in ("cell.calibrate", "cell.score", "audit"):
        task = weekly.get_task(name)
        assert (task.pool, task.queue, task.retries) == ("gpus", "gpu", 7)
        assert task.execution_timeout == timedelta(minutes=30)
        assert task.retry_delay == timedelta(seconds=3)
        assert task.pool_slots == 2
    for name in ("cell.calibrate", "cell.score"):
        task = weekly.get_task(name)
        assert task.map_index_template == "{{ task.title }}"
    # What needs no GPU takes no GPU slot.
    assert {weekly.get_task(name).pool for name in ("plan", "publish", "prune", "gate")} == {
        "default_pool"
    }
    assert {weekly.get_task(name).queue for name in ("plan", "publish")} == {"default"}


def test_the_pool_can_be_chosen_without_a_preset() -> None:
    assert load(QSENS_POOL="gpu").dags["qsens_sweep"].get_task("cell.score").pool == "gpu"


@pytest.mark.parametrize(("given", "schedule"), [("none", None), ("30 1 * * *", "30 1 * * *")])
def test_the_schedule_can_be_chosen_without_a_preset(given: str, schedule: str | None) -> None:
    assert load(QSENS_SCHEDULE=given).dags["qsens_sweep"].schedule == schedule


def test_a_broken_preset_is_an_import_error_that_names_it() -> None:
    (message,) = load(QSENS_PRESET="nightli").import_errors.values()
    assert "Did you mean nightly?" in message


def test_everything_is_documented(dag: Any) -> None:
    assert dag.doc_md
    assert all(task.doc_md for task in dag.tasks)
    assert all(dag.params.get_param(name).schema["description_md"] for name in dag.params)


def test_the_gate_gives_the_asset_an_event(dag: Any) -> None:
    assert [asset.name for asset in dag.get_task("gate").outlets] == ["qsens_layer_analysis"]
    assert not any(dag.get_task(name).outlets for name in ("plan", "publish", "cell.score"))


TRACES = (
    "defaults: {model: tiny_qwen3_vl, dataset: demo, quant_pair: wfp8_afp8}\n"
    "dag: {traces: {prompts: prompts.jsonl, out: traces.jsonl}}\n"
)


def test_answers_are_made_before_the_plan_where_the_preset_asks_for_them(tmp_path: Path) -> None:
    own = tmp_path / "sweep" / "answers.yaml"
    own.parent.mkdir()
    own.write_text(TRACES)
    asks = load(QSENS_CONFIG_DIR=str(tmp_path), QSENS_PRESET="answers").dags["qsens_sweep"]
    assert asks.get_task("traces").downstream_task_ids == {"plan"}
    assert asks.get_task("traces").pool == "default_pool"
    # A run that computes nothing skips them, and plans all the same.
    assert asks.get_task("plan").trigger_rule == "none_failed"
    assert asks.get_task("plan").makes_traces is True
