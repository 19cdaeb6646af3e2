"""Faults under a real scheduler: a killed child, a terminated task, runs that want the same."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
from safetensors.numpy import load_file

from qsens.config import Roots
from qsens.grid import read_plan
from qsens.pipeline.plan import plan_sweep
from qsens.store import Store
from qsens_airflow.plans import plan_of_run
from tests.airflow.house import House, Run, components
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
# Slow enough to be hit in the middle. No calibration: lanes would wait for that of the first.
PRESET = """
defaults: {model: tiny_qwen3_vl, dataset: demo, quant_pair: [wfp8_afp16, wint8_afp16]}
dataset: {size: [large]}
autoquant: {method: fisher, draws: 8, score_size: 512, memory_gb: 0.2}
dag: {schedule: null, pool: gpu, retries: 1, retry_delay_seconds: 2}
"""
PAIRS = ["wfp8_afp16", "wint8_afp16"]
# Asking costs Airflow's processes as much as they have for the runs.
PATIENCE = {"seconds": 600, "pause": 0.5}
SHARED = {"quant_pair": ["wfp4_afp16"], "size": ["large"]}


@pytest.fixture(scope="module")
def house(demo_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    root = tmp_path_factory.mktemp("house")
    checkpoint = root / "models" / "tiny_qwen3_vl" / "checkpoints" / "tiny-qwen3-vl"
    shutil.copytree(demo_checkpoint.directory, checkpoint)
    preset = root / "configs" / "sweep" / "faults.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text(PRESET, encoding="utf-8")
    environment = {
        "QSENS_ROOT": str(root),
        "QSENS_RESULTS": str(root),
        "QSENS_PRESET": "faults",
        "QSENS_SCHEDULE": "none",
        "OMP_NUM_THREADS": "1",
    }
    home = root / ".airflow"
    with components(home, environment=environment, slots=4) as airflow:
        yield House(airflow, root, preset="faults", seconds=900)


@pytest.fixture(scope="module")
def pool(house: House) -> House:
    """The house with its pool of two slots."""
    house.airflow.client.make_pool("gpu", 2)
    return house


def roots(house: House) -> Roots:
    configs = (house.root / "configs", ROOT / "configs")
    return Roots(root=house.root, results=house.root, configs=configs)


def scoring(house: House, run_id: str) -> dict[str, psutil.Process]:
    """Return the children of a run that are in the middle of a score, by cell."""
    plan = str(plan_of_run(roots(house), run_id))
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if plan in words and "score" in words and sys.executable == words[0]:
            found[words[words.index("--cell") + 1]] = process
    # Its name is known when it has ended; before that, its position.
    tasks = {(task.task_id, task.map_index): task for task in house.airflow.client.tasks(run_id)}
    for index, cell in enumerate(read_plan(Path(plan)).cells if found else []):
        log = house.airflow.task_log(run_id, tasks["cell.score", index])
        if cell.cell in found and not any(" score " in line for line in log):
            del found[cell.cell]
    return found


def tensors(results: Path, cells: list[str]) -> dict[str, dict[str, Any]]:
    """Return what was measured by the newest plan below ``results`` that has ``cells``."""
    plans = sorted(results.glob("models/*/layer-analysis/sweeps/*/plan.json"))
    plan = next(
        plan
        for plan in map(read_plan, reversed(plans))
        if {cell.cell for cell in plan.cells} >= set(cells)
    )
    store = Store(plan.model_copy(update={"results": results}))
    return {cell: dict(load_file(store.state(plan.cell(cell)))) for cell in cells}


@pytest.fixture(scope="module")
def undisturbed(
    house: House, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What the command line measures, lane by lane, when nobody disturbs it."""
    results = tmp_path_factory.mktemp("undisturbed")
    environment = house.airflow.environment | {"QSENS_RESULTS": str(results)}
    found = {}
    for number, pairs in enumerate((PAIRS, SHARED["quant_pair"])):
        plan = results / f"plan-{number}.json"
        words = ["faults", f"quant_pair={','.join(pairs)}", "--lanes", "2", "--out", str(plan)]
        cells = [f"{pair}-large" for pair in pairs]
        for verb in (
            ["plan", *words],
            *(["score", "--plan", str(plan), "--cell", cell] for cell in cells),
            ["publish", "--plan", str(plan)],
        ):
            subprocess.run([sys.executable, "-m", "qsens", *verb], env=environment, check=True)
        found |= tensors(results, cells)
    return found


def assert_numbers(house: House, expected: dict[str, dict[str, Any]], *cells: str) -> None:
    for cell, found in tensors(house.root, list(cells)).items():
        assert found.keys() == expected[cell].keys()
        for name, values in found.items():
            numpy.testing.assert_array_equal(values, expected[cell][name])


def test_a_pool_that_does_not_exist_is_refused_by_name(house: House) -> None:
    run = house.run()
    assert run.state == "failed"
    assert (run.task("plan").state, run.task("plan").tries) == ("failed", 1)
    log = "\n".join(house.airflow.task_log(run.run_id, run.task("plan")))
    assert "Airflow pool gpu: does not exist" in log
    assert "airflow pools set gpu N" in log


@dataclass(frozen=True)
class Hit:
    """A run of two lanes whose one child was killed and whose other task was terminated."""

    run_id: str
    at_once: set[str]


@pytest.fixture(scope="module")
def hit(pool: House) -> Hit:
    run_id = pool.airflow.client.trigger({"preset": "faults"})
    both = wait_for(lambda: len(found := scoring(pool, run_id)) == 2 and found, **PATIENCE)
    killed, terminated = both["wfp8_afp16-large"], both["wint8_afp16-large"]
    killed.kill()
    task = terminated.parent()
    family = [task, terminated, *terminated.children(recursive=True)]
    os.kill(task.pid, signal.SIGTERM)
    # Nothing of it is left, long before it would have ended by itself.
    wait_for(lambda: not any(_runs(process) for process in family))
    return Hit(run_id, set(both))


@pytest.fixture(scope="module")
def blocked(pool: House, hit: Hit) -> Iterator[Run]:
    """A run whose first cell cannot write its result; it runs while the other one recovers."""
    pairs = ["wint8_afp16", "wfp8_afp16"]
    quick = "autoquant.score_size=16"
    words = [f"quant_pair={','.join(pairs)}", "dataset.size=small", quick]
    plan = plan_sweep("faults", words, lanes=2, roots=roots(pool))
    first = Store(plan).result_dir(plan.cells[0])
    assert plan.cells[0].cell == "wint8_afp16-small"
    first.write_text("in the way")
    yield pool.run(quant_pair=pairs, size=["small"], overrides=quick)
    assert first.is_dir()


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_two_slots_give_two_lanes_that_work_at_once(hit: Hit) -> None:
    assert hit.at_once == {"wfp8_afp16-large", "wint8_afp16-large"}


def test_the_first_cell_fails_the_rest_finish_and_clearing_it_mends_the_run(
    pool: House, blocked: Run
) -> None:
    assert blocked.state == "failed"
    failed = blocked.task("cell.score [wint8_afp16 · small]")
    assert {name: state for name, state in blocked.states().items() if state != "success"} == {
        failed.name: "failed",
        "audit": "skipped",
        "gate": "failed",
    }
    published = pool.published(blocked)
    assert [cell["cell"] for cell in published["missing"]] == ["wint8_afp16-small"]
    assert "PARTIAL" in Path(published["index"]).read_text(encoding="utf-8")
    log = "\n".join(pool.airflow.task_log(blocked.run_id, blocked.task("gate")))
    assert f"missing: wint8_afp16-small: {published['missing'][0]['reason']}" in log
    assert pool.airflow.client.asset_events(blocked.run_id) == []

    (obstacle,) = [path for path in (pool.root / ".cells").glob("?" * 64) if path.is_file()]
    obstacle.unlink()
    pool.airflow.client.clear(blocked.run_id, [(failed.task_id, failed.map_index)], downstream=True)
    mended = pool.end(blocked.run_id)
    assert mended.state == "success"
    assert pool.published(mended)["complete"] is True
    assert "PARTIAL" not in Path(published["index"]).read_text(encoding="utf-8")
    assert mended.task("cell.score [wfp8_afp16 · small]").tries == 1
    (event,) = pool.airflow.client.asset_events(blocked.run_id)
    assert event["counts"]["done"] == 2


def test_what_was_killed_and_terminated_comes_again_with_the_same_numbers(
    pool: House, hit: Hit, blocked: Run, undisturbed: dict[str, dict[str, Any]]
) -> None:
    run = pool.end(hit.run_id)
    assert run.state == "success"
    cells = ("wfp8_afp16-large", "wint8_afp16-large")
    names = [f"cell.score [{' · '.join(cell.split('-'))}]" for cell in cells]
    assert [run.task(name).tries for name in names] == [2, 2]
    assert_numbers(pool, undisturbed, *cells)


def test_two_runs_of_one_plan_compute_it_once_and_reports_need_not_wait(
    pool: House, blocked: Run, hit: Hit, undisturbed: dict[str, dict[str, Any]]
) -> None:
    client = pool.airflow.client
    both = [client.trigger({"preset": "faults"} | SHARED) for _ in range(2)]
    wait_for(lambda: any(scoring(pool, run_id) for run_id in both), **PATIENCE)
    report = pool.run(mode="report_only")
    assert report.state == "success"
    assert [client.state(run_id) for run_id in both] == ["running", "running"]
    ended = [pool.end(run_id) for run_id in both]
    assert [run.state for run in ended] == ["success", "success"]
    computed = [client.returned(run.run_id, "cell.score", 0)["computed"] for run in ended]
    assert sorted(computed) == [False, True]
    assert {task.tries for run in ended for task in run.tasks} == {1}
    assert_numbers(pool, undisturbed, "wfp4_afp16-large")
