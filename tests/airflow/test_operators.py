"""The operators in real Airflow task runs, over real child processes."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
from airflow.sdk import DAG, BaseOperator, TaskInstanceState
from airflow.sdk.execution_time.supervisor import WatchedSubprocess

from qsens.config import Roots
from qsens.pipeline.plan import plan_sweep
from qsens_airflow import base, child
from qsens_airflow.audit import AuditOperator
from qsens_airflow.base import one_line
from qsens_airflow.cells import ScoreOperator
from qsens_airflow.operators import GateOperator, PlanOperator, PublishOperator
from tests.waiting import wait_for

pytestmark = pytest.mark.usefixtures("airflow_database", "own_signals")

Script = Callable[[str], Path]
CELL = "wfp8_afp8-small"
DONE = '{"cell": "wfp8_afp8-small", "status": "done", "computed": true}'
ERROR = '{"error": "UserError", "what": "no such file", "where": "p.json", "remedy": "Make it."}'

FULL = '{"error": "DiskFull", "what": "no space left", "where": "/d", "remedy": "Free some."}'


def run(operator: BaseOperator, conf: dict[str, Any] | None = None) -> Any:
    """Run the operator's DAG in this process; return its task instance as the database has it."""
    bag = DagBag(os.environ["AIRFLOW__CORE__DAGS_FOLDER"], bundle_name="dags-folder")
    bag.bag_dag(operator.dag)
    sync_bag_to_db(bag, "dags-folder", None)
    dag_run = operator.dag.test(run_conf=conf)
    (instance,) = dag_run.get_task_instances()
    return instance


def score(tmp_path: Path, **arguments: Any) -> ScoreOperator:
    with DAG(f"dag_{tmp_path.name}", schedule=None):
        return ScoreOperator(
            task_id="score",
            cell=CELL,
            plan="p.json",
            retries=arguments.pop("retries", 2),
            retry_delay=timedelta(seconds=0),
            map_index_template="{{ task.title }}",
            **arguments,
        )


def first_then_done(first: str) -> str:
    """Return a shell body that does ``first`` at its first call and succeeds at the second."""
    return f"echo run >> runs; [ $(wc -l < runs) -gt 1 ] && echo '{DONE}' && exit 0\n{first}"


def runs(tmp_path: Path) -> int:
    return len((tmp_path / "runs").read_text().splitlines())


def run_and_kill(tmp_path: Path) -> tuple[Any, float]:
    """Run a score and end it when its child has written its id; return the seconds that it took."""
    started: list[float] = []

    def kill() -> None:
        file = tmp_path / "child"
        wait_for(lambda: file.exists() and file.read_text().strip())
        started.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    instance = run(score(tmp_path, retries=0))
    ended = time.monotonic()
    thread.join()
    return instance, ended - started[0]


def test_runs_the_verb_in_the_interpreter_named_and_returns_its_json(
    tmp_path: Path, python: Script
) -> None:
    python(f"echo \"$@\" > arguments; env > env; echo 'a library speaks'; echo '{DONE}'")
    instance = run(score(tmp_path))
    assert instance.state == TaskInstanceState.SUCCESS
    assert (tmp_path / "arguments").read_text() == (
        f"-m qsens score --json --plan p.json --cell {CELL}\n"
    )
    assert f"QSENS_RESULTS={tmp_path / 'results'}\n" in (tmp_path / "env").read_text()
    assert instance.xcom_pull(task_ids="score") == {
        "cell": CELL,
        "status": "done",
        "computed": True,
    }
    assert instance.rendered_map_index == "wfp8_afp8 · small"


def test_every_line_of_stderr_reaches_the_task_log_as_it_comes(
    tmp_path: Path, python: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    python(f"echo 'load 1/2' >&2; echo 'load 2/2' >&2; echo '{DONE}'")
    run(score(tmp_path))
    printed = capsys.readouterr().out
    assert printed.index("load 1/2") < printed.index("load 2/2")


@pytest.mark.parametrize("code", [2, 3])
def test_what_the_user_must_mend_is_not_tried_again(
    tmp_path: Path, python: Script, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    python(f"echo run >> runs; echo '{ERROR}'; exit {code}")
    assert run(score(tmp_path)).state == TaskInstanceState.FAILED
    assert runs(tmp_path) == 1
    assert "p.json: no such file | Make it." in capsys.readouterr().out


@pytest.mark.parametrize(
    "first", ["exit 1", "kill -9 $$", "kill -15 $$", "echo '[]'", f"echo '{FULL}'; exit 75"]
)
def test_what_may_pass_counts_as_a_try(tmp_path: Path, python: Script, first: str) -> None:
    python(first_then_done(first))
    instance = run(score(tmp_path))
    assert instance.state == TaskInstanceState.SUCCESS
    assert instance.try_number == 2
    assert runs(tmp_path) == 2


def test_out_of_memory_is_tried_once_more_with_half_the_budget(
    tmp_path: Path, python: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    python(f"echo $QSENS_MEMORY_SHARE >> shares\n{first_then_done(f'echo {ERROR!r}; exit 74')}")
    instance = run(score(tmp_path))
    assert instance.state == TaskInstanceState.SUCCESS
    assert instance.try_number == 1
    assert (tmp_path / "shares").read_text().splitlines() == ["", "0.5"]
    assert "Once more with 0.5 of the memory budget" in capsys.readouterr().out


def test_out_of_memory_with_half_the_budget_is_final(
    tmp_path: Path, python: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    python(f"echo run >> runs; echo '{ERROR}'; exit 74")
    assert run(score(tmp_path)).state == TaskInstanceState.FAILED
    assert runs(tmp_path) == 2
    assert "no such file | Make it. | With half the memory budget too." in capsys.readouterr().out


def test_a_child_gets_no_setting_of_airflow(tmp_path: Path, python: Script) -> None:
    python(f"env > env; echo '{DONE}'")
    assert run(score(tmp_path)).state == TaskInstanceState.SUCCESS
    variables = (tmp_path / "env").read_text()
    assert "QSENS_ROOT=" in variables
    assert "AIRFLOW_" not in variables


def test_a_signal_fails_the_task_when_no_try_is_left(tmp_path: Path, python: Script) -> None:
    python("kill -9 $$")
    assert run(score(tmp_path, retries=0)).state == TaskInstanceState.FAILED


def test_try_again_gives_the_slot_back_and_costs_no_try(
    tmp_path: Path, python: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "PAUSE", timedelta(seconds=2))
    python(first_then_done(f"echo '{ERROR}'; exit 75"))
    started = time.monotonic()
    instance = run(score(tmp_path, retries=0))
    assert instance.state == TaskInstanceState.SUCCESS
    assert instance.try_number == 1
    assert runs(tmp_path) == 2
    assert time.monotonic() - started >= 2


def test_trying_again_ends_with_the_time_that_the_task_may_run(
    tmp_path: Path, python: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "PAUSE", timedelta(seconds=1))
    python(f"echo run >> runs; echo '{ERROR}'; exit 75")
    operator = score(tmp_path, retries=0, execution_timeout=timedelta(seconds=2))
    assert run(operator).state == TaskInstanceState.FAILED
    # A busy machine has time for fewer.
    assert 1 <= runs(tmp_path) <= 3


@pytest.mark.parametrize("child_listens", [False, True])
def test_a_killed_task_leaves_no_process(
    tmp_path: Path, python: Script, child_listens: bool
) -> None:
    # What the child started never listens to SIGTERM; where the child does, that is an orphan.
    own = "" if child_listens else "trap '' TERM;"
    python(f"{own} (trap '' TERM; sleep 300) & echo $! > grandchild; echo $$ > child; wait")
    instance, seconds = run_and_kill(tmp_path)
    assert instance.state == TaskInstanceState.FAILED
    assert seconds >= child.GRACE_SECONDS
    left = [int((tmp_path / name).read_text()) for name in ("child", "grandchild")]
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in left))


def test_a_child_may_use_the_grace_and_nobody_waits_longer(
    tmp_path: Path, python: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "GRACE_SECONDS", 100)
    python("trap 'sleep 1; echo saved > saved; exit 1' TERM; sleep 300 & echo $$ > child; wait")
    instance, seconds = run_and_kill(tmp_path)
    assert instance.state == TaskInstanceState.FAILED
    assert (tmp_path / "saved").exists()
    assert 1 <= seconds < 100


def test_the_grace_is_over_before_airflow_kills_the_task() -> None:
    patience = inspect.signature(WatchedSubprocess.kill).parameters["escalation_delay"].default
    assert patience > child.GRACE_SECONDS + 1


def test_a_task_that_runs_too_long_leaves_no_process(tmp_path: Path, python: Script) -> None:
    python("echo $$ > child; exec sleep 300")
    operator = score(tmp_path, retries=0, execution_timeout=timedelta(seconds=1))
    assert run(operator).state == TaskInstanceState.FAILED
    assert not psutil.pid_exists(int((tmp_path / "child").read_text()))


def test_plan_refuses_a_param_that_the_dag_does_not_declare(
    tmp_path: Path, python: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    python("echo run >> runs")
    with DAG(f"dag_{tmp_path.name}", schedule=None, params={"preset": "demo-text"}):
        operator = PlanOperator(task_id="plan", gpu_pool="default_pool", retries=2)
    assert run(operator, {"quant_pairs": ["wfp8_afp8"]}).state == TaskInstanceState.FAILED
    assert "param quant_pairs" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_plan_returns_the_cells_in_order_and_where_the_plan_lies(
    tmp_path: Path, python: Script
) -> None:
    made = '{"sweep_id": "s", "cells": [{"cell": "b-small", "done": true}, {"cell": "a-small"}]}'
    python(f"echo \"$@\" > arguments; echo '{made}'")
    with DAG(f"dag_{tmp_path.name}", schedule=None, params={"preset": "demo-text"}):
        operator = PlanOperator(task_id="plan", gpu_pool="default_pool")
    instance = run(operator, {"size": ["medium", "small"], "overrides": "model.path='a b/c'"})
    path = instance.xcom_pull(task_ids="plan", key="plan")
    assert instance.xcom_pull(task_ids="plan") == [
        {"cell": "b-small", "plan": path},
        {"cell": "a-small", "plan": path},
    ]
    assert Path(path).is_relative_to(tmp_path / "results" / ".plans")
    assert (tmp_path / "arguments").read_text() == (
        f"-m qsens plan --json --out {path} --lanes 1 -- demo-text dataset.size=small,medium "
        "model.path=a b/c\n"
    )


@pytest.mark.parametrize(
    ("slots", "overrides", "lanes"), [("3", "", "3"), ("3", "dag.lanes=2", "2"), ("", "", "1")]
)
def test_lanes_are_those_of_the_configuration_or_the_slots_that_are_known(
    tmp_path: Path,
    python: Script,
    monkeypatch: pytest.MonkeyPatch,
    slots: str,
    overrides: str,
    lanes: str,
) -> None:
    monkeypatch.setenv("QSENS_GPUS", slots)
    python("""echo "$@" > arguments; echo '{"sweep_id": "s", "cells": [{"cell": "a"}]}'""")
    with DAG(f"dag_{slots}_{lanes}", schedule=None, params={"preset": "demo-text"}):
        operator = PlanOperator(task_id="plan", gpu_pool="gpu")
    assert run(operator, {"overrides": overrides}).state == TaskInstanceState.SUCCESS
    assert f"--lanes {lanes} --" in (tmp_path / "arguments").read_text()


def test_tasks_of_several_gpus_are_as_many_as_their_slots_allow(
    tmp_path: Path, python: Script, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("QSENS_GPUS", "5")
    python("""echo "$@" > arguments; echo '{"sweep_id": "s", "cells": [{"cell": "a"}]}'""")
    operators = []
    for gpus in (2, 8):
        with DAG(f"dag_{gpus}_{tmp_path.name}", schedule=None, params={"preset": "demo-text"}):
            operators.append(PlanOperator(task_id="plan", gpu_pool="gpu", gpus_per_task=gpus))
    two, eight = operators
    assert run(two).state == TaskInstanceState.SUCCESS
    said = (tmp_path / "arguments").read_text()
    assert "--lanes 2 -- demo-text autoquant.devices=2" in said
    assert run(eight).state == TaskInstanceState.FAILED
    assert "has 5 slots, and a task takes 8: it would wait for ever" in capsys.readouterr().out


def test_a_pool_without_slots_is_refused(
    tmp_path: Path, python: Script, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("QSENS_GPUS", "0")
    python("echo run >> runs")
    with DAG(f"dag_{tmp_path.name}", schedule=None, params={"preset": "demo-text"}):
        operator = PlanOperator(task_id="plan", gpu_pool="gpu", retries=2)
    assert run(operator).state == TaskInstanceState.FAILED
    assert "Airflow pool gpu, size 0: has no slot" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_a_grid_larger_than_a_task_may_map_is_refused(
    tmp_path: Path, python: Script, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__MAX_MAP_LENGTH", "1")
    python("""echo '{"sweep_id": "s", "cells": [{"cell": "a"}, {"cell": "b"}]}'""")
    with DAG(f"dag_{tmp_path.name}", schedule=None, params={"preset": "demo-text"}):
        operator = PlanOperator(task_id="plan", gpu_pool="gpu", retries=2)
    instance = run(operator)
    assert (instance.state, instance.try_number) == (TaskInstanceState.FAILED, 1)
    assert "2 cells, but [core] max_map_length is 1" in capsys.readouterr().out


def test_publish_takes_several_plans_and_returns_what_the_last_one_gave(
    tmp_path: Path, python: Script
) -> None:
    answer = '{"sweep_id": "\'$7\'", "index": "i", "complete": true, "missing": [], '
    answer += '"cells": [], "counts": {}, "top": []}'
    python(f"echo $7 >> plans; echo '{answer}'")
    with DAG(f"dag_{tmp_path.name}", schedule=None):
        operator = PublishOperator(task_id="publish", plan="a.json\nb.json")
    instance = run(operator)
    assert (tmp_path / "plans").read_text() == "a.json\nb.json\n"
    assert instance.xcom_pull(task_ids="publish")["sweep_id"] == "b.json"


def test_publish_without_a_plan_says_so_and_is_not_tried_again(
    tmp_path: Path, python: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    python("echo run >> runs")
    with DAG(f"dag_{tmp_path.name}", schedule=None):
        operator = PublishOperator(task_id="publish", plan="", retries=2)
    assert run(operator).state == TaskInstanceState.FAILED
    assert "left no plan" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def audit(tmp_path: Path, checkpoint: Path, mode: str) -> AuditOperator:
    words = [f"model.path={checkpoint}", "dataset.size=small", f"autoquant.audit={mode}"]
    roots = Roots.from_environment()
    plan_sweep("demo-text", words, roots=roots, out=tmp_path / "plan.json")
    with DAG(f"dag_{tmp_path.name}", schedule=None, params={"mode": "full"}):
        return AuditOperator(task_id="audit", plan=str(tmp_path / "plan.json"), retries=2)


@pytest.mark.parametrize(("mode", "words"), [("sample", ""), ("full", " --full")])
def test_an_audit_that_distrusts_is_an_answer(
    tmp_path: Path, python: Script, demo_checkpoint: Any, mode: str, words: str
) -> None:
    judged = '"judgement": {"verdict": "do not trust", "reason": "rho"}'
    found = f'{{"audits": [{{"cell": "{CELL}", {judged}}}], "missing": []}}'
    python(f"echo \"$@\" > arguments; echo '{found}'; exit 3")
    instance = run(audit(tmp_path, demo_checkpoint.directory, mode))
    assert instance.state == TaskInstanceState.SUCCESS
    assert instance.xcom_pull(task_ids="audit") == {
        "verdicts": {CELL: "do not trust"},
        "missing": [],
    }
    assert (tmp_path / "arguments").read_text() == (
        f"-m qsens audit --json --plan {tmp_path / 'plan.json'}{words}\n"
    )


def test_an_error_with_the_exit_code_of_an_answer_is_none(
    tmp_path: Path, python: Script, demo_checkpoint: Any
) -> None:
    python(f"echo run >> runs; echo '{ERROR}'; exit 3")
    instance = run(audit(tmp_path, demo_checkpoint.directory, "sample"))
    assert instance.state == TaskInstanceState.FAILED
    assert runs(tmp_path) == 1


@pytest.mark.parametrize(("mode", "run_mode"), [("none", "full"), ("sample", "report_only")])
def test_no_audit_starts_no_child(
    tmp_path: Path, python: Script, demo_checkpoint: Any, mode: str, run_mode: str
) -> None:
    python("echo run >> runs")
    operator = audit(tmp_path, demo_checkpoint.directory, mode)
    assert run(operator, {"mode": run_mode}).state == TaskInstanceState.SKIPPED
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("complete", [True, False])
def test_the_gate_fails_for_an_incomplete_grid_and_lists_what_is_missing(
    tmp_path: Path, complete: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = [] if complete else [{"cell": "wfp4_afp8-small", "reason": "does not divide"}]
    published = {"sweep_id": "s", "index": "i", "complete": complete, "missing": missing}
    published |= {"counts": {"cells": 1}, "top": []}
    with DAG(f"dag_{tmp_path.name}_{complete}", schedule=None):
        operator = GateOperator(task_id="gate", published=published, retries=2)
    state = run(operator).state
    printed = capsys.readouterr().out
    assert state == (TaskInstanceState.SUCCESS if complete else TaskInstanceState.FAILED)
    assert ("wfp4_afp8-small: does not divide" in printed) is not complete


def test_the_gate_says_why_a_sweep_without_a_missing_cell_is_partial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [{"cell": f"c{at}-small", "partial": [f"reason {at}", "more"]} for at in range(7)]
    cells.append({"cell": "whole-small", "partial": []})
    (tmp_path / "summary.json").write_text(json.dumps({"cells": cells}))
    published = {
        "sweep_id": "s",
        "index": str(tmp_path / "index.html"),
        "complete": False,
        "missing": [],
        "counts": {"cells": 8},
        "top": [],
    }
    with DAG(f"dag_{tmp_path.name}", schedule=None):
        operator = GateOperator(task_id="gate", published=published, retries=2)
    ended = run(operator)
    printed = capsys.readouterr().out
    assert ended.state == TaskInstanceState.FAILED
    assert "is PARTIAL: c0-small: reason 0; more; c1-small: reason 1; more; " in printed
    assert "c4-small: reason 4; more; and 2 more" in printed
    for at in range(7):
        assert f"partial: c{at}-small: reason {at}; more" in printed
    assert "whole-small" not in printed


def test_an_error_is_one_line_with_where_what_and_remedy() -> None:
    error = {"error": "UserError", "what": "two\nlines", "where": "key (file)", "remedy": "Mend."}
    assert one_line(error) == "key (file): two lines | Mend."
    assert one_line({"what": "bare", "where": "", "remedy": ""}) == "bare"


def test_a_grid_of_171_cells_plans_and_maps(
    tmp_path: Path, python: Script, demo_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """19 pairs at three sizes and three granularities, planned for real."""
    pairs = tmp_path / "own" / "quant_pair"
    pairs.mkdir(parents=True)
    names = [f"wblock{16 * (number + 5)}_afp16" for number in range(19)]
    for name in names:
        size = name.removeprefix("wblock").removesuffix("_afp16")
        (pairs / f"{name}.yaml").write_text(
            f"weight: block{size}\nactivation: fp16\nformat: F{size}\neffective_bits: 8\n"
            f"weight_quantizer: {{num_bits: 8, block_sizes: {{'-1': {size}}}}}\n"
        )
    monkeypatch.setenv("QSENS_CONFIG_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("QSENS_DATA_ROOTS", str(demo_checkpoint.directory))
    python(f'[ $3 = plan ] && exec {sys.executable} "$@"\necho "$8" >> scored\necho \'{DONE}\'')
    with DAG(f"dag_{tmp_path.name}", schedule=None, params={"preset": "demo-text"}) as dag:
        plan = PlanOperator(task_id="plan", gpu_pool="gpu")
        ScoreOperator.partial(task_id="score").expand_kwargs(plan.output)
    bag = DagBag(os.environ["AIRFLOW__CORE__DAGS_FOLDER"], bundle_name="dags-folder")
    bag.bag_dag(dag)
    sync_bag_to_db(bag, "dags-folder", None)
    dag_run = dag.test(
        run_conf={
            "quant_pair": names,
            "size": ["small", "medium", "large"],
            "quant_granularity": ["default", "w_channel", "w_group64"],
            "overrides": f"model.path={demo_checkpoint.directory}",
        }
    )
    assert dag_run.state == "success"
    instances = dag_run.get_task_instances()
    assert sum(instance.task_id == "score" for instance in instances) == 171
    assert len(set((tmp_path / "scored").read_text().splitlines())) == 171
