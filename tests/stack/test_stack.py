"""The compose topology under load and under faults: every run ends with the same numbers."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import psycopg2
import pytest

from tests.waiting import wait_for

if TYPE_CHECKING:
    from tests.stack.stack import Stack

PAIRS = ["wfp8_afp8", "wint8_afp16"]
# Every run computes anew, so that there is something to break in it.
SIZES = ["small", "medium", "large"]
CONF = {
    "preset": "demo-text",
    "quant_pair": PAIRS,
    "size": SIZES,
    "force": True,
    "overrides": "autoquant.score_size=512",
}
CELLS = [f"{pair}-{size}" for pair in PAIRS for size in SIZES]
SECONDS = 900

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Run:
    run_id: str
    numbers: Numbers
    tries: dict[str, int]


def end(stack: Stack, run_id: str) -> Run:
    """Wait for a green run; return what it has measured, and check that nothing is left."""
    assert stack.wait(run_id, seconds=SECONDS) == "success", stack.task_log(run_id, "gate")
    published = stack.client.returned(run_id, "publish")
    index = Path(published["index"])
    assert index.is_relative_to(stack.results)
    assert index.is_file()
    summary = json.loads((index.parent / "summary.json").read_text())
    assert summary["complete"] is True
    numbers = {cell["cell"]: cell["rows"] for cell in summary["cells"]}
    assert sorted(numbers) == sorted(CELLS)
    assert all(rows for rows in numbers.values())
    assert stack.leftovers() == []
    tries = {task.name: task.tries for task in stack.client.tasks(run_id)}
    return Run(run_id, numbers, tries)


def in_score(stack: Stack, run_id: str) -> psutil.Process:
    """Stop a score in the middle of its pass, and return its process; SIGCONT lets it go on."""
    wait_for(lambda: "tokens at once" in stack.task_log(run_id, "cell.score"))
    (child,) = stack.children("gpu-worker-0", "score")
    child.suspend()
    time.sleep(0.2)
    assert "taken at most" not in stack.task_log(run_id, "cell.score"), "its pass has ended"
    return child


@pytest.fixture(autouse=True)
def _everything_runs(stack: Stack) -> None:
    stack.start_missing()


@pytest.fixture(scope="module")
def undisturbed(stack: Stack) -> Run:
    return end(stack, stack.client.trigger(CONF))


def test_a_run_is_green_with_reports_and_an_asset_event(stack: Stack, undisturbed: Run) -> None:
    assert undisturbed.tries == {
        "plan": 1,
        **{f"cell.{step} [{' · '.join(cell.split('-'))}]": 1
           for step in ("calibrate", "score") for cell in CELLS},
        "audit": 1,
        "publish": 1,
        "prune": 1,
        "gate": 1,
    }  # fmt: skip
    rows = undisturbed.numbers["wfp8_afp8-small"]
    assert all(row["sensitivity"] > 0 for row in rows if row["status"] == "scored")
    assert sum(row["status"] == "scored" for row in rows) > 5
    _check_the_asset_event(stack, undisturbed)


def _check_the_asset_event(stack: Stack, run: Run) -> None:
    """The index, the counts and the top groups go out with the run."""
    events = stack.client.asset_events(run.run_id)
    (extra,) = events
    assert extra["index"] == stack.client.returned(run.run_id, "publish")["index"]
    # Whatever its keys are called: four cells, and five groups of the summary.
    assert len(CELLS) in _numbers_in(extra)
    layers = {row["layer"] for rows in run.numbers.values() for row in rows}
    assert len([text for text in _texts_in(extra) if text in layers]) >= 5


def _numbers_in(value: Any) -> list[int]:
    return [item for item in _leaves(value) if isinstance(item, int)]


def _texts_in(value: Any) -> list[str]:
    return [item for item in _leaves(value) if isinstance(item, str)]


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def test_secrets_are_where_they_are_needed_alone(stack: Stack, undisturbed: Run) -> None:
    names = [name for name in stack.secrets if name.endswith(("_KEY", "_SECRET", "_PASSWORD"))]
    assert len(names) == 7
    run_id = stack.client.trigger(CONF)
    child = in_score(stack, run_id)
    told = {
        process.pid: {
            name for name in names if stack.secrets[name] in str(process.environ().values())
        }
        for worker in ("worker", "gpu-worker-0")
        for process in stack.family(worker)
    }
    assert told.pop(child.pid) == set()
    # Some have written a title over theirs.
    assert set().union(*told.values()) == {"REDIS_PASSWORD", "POSTGRES_CELERY_PASSWORD"}
    arguments = stack.arguments()
    assert len(arguments) > 8  # the services, and what they have started
    assert [line for line in arguments for name in names if stack.secrets[name] in line] == []
    backend = stack.environment("gpu-worker-0")["AIRFLOW__CELERY__RESULT_BACKEND"]
    own = backend.removeprefix("db+")
    psycopg2.connect(own).close()
    for database in ("airflow", "postgres"):
        with pytest.raises(psycopg2.OperationalError, match="permission denied for database"):
            psycopg2.connect(f"{own.rpartition('/')[0]}/{database}")
    child.resume()
    assert end(stack, run_id).numbers == undisturbed.numbers


def test_a_worker_that_is_killed_in_the_middle_of_a_score(stack: Stack, undisturbed: Run) -> None:
    run_id = stack.client.trigger(CONF)
    child = in_score(stack, run_id)
    stack.kill("gpu-worker-0")
    assert psutil.wait_procs([child], timeout=60)[1] == []
    stack.start("gpu-worker-0")
    run = end(stack, run_id)
    assert max(run.tries.values()) == 2
    assert run.numbers == undisturbed.numbers


def test_a_task_that_is_terminated_leaves_no_process(stack: Stack, undisturbed: Run) -> None:
    run_id = stack.client.trigger(CONF)
    child = in_score(stack, run_id)
    family = [child, *child.children(recursive=True)]
    child.resume()
    # The operator's process: what Airflow signals when a task is to end.
    child.parent().send_signal(signal.SIGTERM)
    assert psutil.wait_procs(family, timeout=60)[1] == []
    run = end(stack, run_id)
    assert max(run.tries.values()) == 2
    assert run.numbers == undisturbed.numbers


def test_a_scheduler_that_is_killed_and_started_again(stack: Stack, undisturbed: Run) -> None:
    run_id = stack.client.trigger(CONF)
    child = in_score(stack, run_id)
    stack.kill("scheduler")
    # What runs goes on without it.
    child.resume()
    assert psutil.wait_procs([child], timeout=60)[1] == []
    stack.start("scheduler")
    run = end(stack, run_id)
    assert run.numbers == undisturbed.numbers


@pytest.mark.parametrize("service", ["postgres", "redis"])
def test_a_service_that_is_restarted(service: str, stack: Stack, undisturbed: Run) -> None:
    run_id = stack.client.trigger(CONF)
    child = in_score(stack, run_id)
    # PostgreSQL: the fast shutdown, which breaks connections.
    stack.restart(service, number=signal.SIGINT if service == "postgres" else signal.SIGTERM)
    child.resume()
    assert end(stack, run_id).numbers == undisturbed.numbers


def test_two_runs_of_one_plan_at_once(stack: Stack, undisturbed: Run) -> None:
    # The same cells for both: a result that is there already would hide what is tested.
    conf = {key: value for key, value in CONF.items() if key != "force"}
    runs = [
        stack.client.trigger(conf | {"overrides": "autoquant.score_size=512 autoquant.seed=7"})
        for _ in range(2)
    ]
    for run_id in runs:  # both: what the other one still works on is nothing left behind
        stack.wait(run_id, seconds=SECONDS)
    ended = [end(stack, run_id) for run_id in runs]
    assert ended[0].numbers == ended[1].numbers == undisturbed.numbers
    sweeps = [stack.client.returned(run_id, "publish")["sweep_id"] for run_id in runs]
    assert len(set(sweeps)) == 2
