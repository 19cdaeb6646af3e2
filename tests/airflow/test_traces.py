"""The task that lets the model answer prompts, in real Airflow task runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG, TaskInstanceState

from qsens_airflow.operators import PlanOperator
from qsens_airflow.params import dag_params
from qsens_airflow.traces import TracesOperator
from tests.airflow.test_operators import run

pytestmark = pytest.mark.usefixtures("airflow_database", "own_signals")

PRESET = """\
defaults: {{model: tiny_qwen3_vl, dataset: demo, quant_pair: wfp8_afp8}}
model: {{path: {root}/checkpoint}}
dag: {{traces: {{prompts: {root}/prompts.jsonl, out: {root}/traces.jsonl, temperature: 0.5}}}}
"""


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "configs" / "sweep").mkdir(parents=True)
    (tmp_path / "configs" / "sweep" / "answers.yaml").write_text(PRESET.format(root=tmp_path))
    monkeypatch.setenv("QSENS_CONFIG_DIR", str(tmp_path / "configs"))
    return "answers"


def operator(tmp_path: Path, kind: Any, preset: str, **arguments: Any) -> Any:
    with DAG(f"dag_{tmp_path.name}", schedule=None, params=dag_params(preset)):
        return kind(task_id="task", retries=0, retry_delay=timedelta(seconds=0), **arguments)


def test_it_asks_the_model_as_the_preset_says(
    tmp_path: Path, preset: str, python: Callable[[str], Path]
) -> None:
    python(f"echo \"$@\" > arguments; echo '{json.dumps({'file': 'f', 'answers': 2})}'")
    instance = run(operator(tmp_path, TracesOperator, preset))
    assert instance.state == TaskInstanceState.SUCCESS
    assert (tmp_path / "arguments").read_text().split() == [
        "-m", "qsens", "traces", "--json",
        f"--out={tmp_path}/traces.jsonl",
        "--max-new-tokens=512", "--temperature=0.5", "--top-p=1.0", "--seed=0", "--batch-size=8",
        "--dtype=float32", "--device=auto",
        "--", f"{tmp_path}/checkpoint", f"{tmp_path}/prompts.jsonl",
    ]  # fmt: skip


def test_answers_that_are_there_stay(
    tmp_path: Path, preset: str, python: Callable[[str], Path]
) -> None:
    python("echo run > runs; exit 1")
    (tmp_path / "traces.jsonl").write_text("{}\n")
    instance = run(operator(tmp_path, TracesOperator, preset))
    assert instance.state == TaskInstanceState.SUCCESS
    assert not (tmp_path / "runs").exists()


def test_a_run_that_computes_nothing_asks_nothing(
    tmp_path: Path, preset: str, python: Callable[[str], Path]
) -> None:
    python("echo run > runs; exit 1")
    for conf in ({"mode": "report_only"}, {"preset": "demo"}):
        instance = run(operator(tmp_path, TracesOperator, preset), conf)
        assert instance.state == TaskInstanceState.SKIPPED
    assert not (tmp_path / "runs").exists()


def test_a_preset_that_asks_where_nothing_answers_is_refused(
    tmp_path: Path, preset: str, python: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    python("echo run > runs; exit 1")
    plan = operator(tmp_path, PlanOperator, "demo", gpu_pool="default_pool")
    instance = run(plan, {"preset": preset})
    assert instance.state == TaskInstanceState.FAILED
    assert "asks for the model's answers" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
