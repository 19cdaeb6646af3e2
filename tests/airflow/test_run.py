"""The DAG under a real scheduler, with real tasks, on the demo checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qsens.grid import read_plan
from qsens.store import Store
from qsens_airflow.rest import TaskState
from tests.airflow.house import House, Run, components

ROOT = Path(__file__).resolve().parents[2]
# Floats that neither the numerics nor ModelOpt know: this pair fails when it is scored.
BROKEN = """
name: wbroken_afp16
weight: broken
activation: fp16
format: BROKEN
weight_quantizer: {num_bits: [7, 7], axis: null}
effective_bits: 8.0
"""


@pytest.fixture(scope="module")
def house(demo_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    root = tmp_path_factory.mktemp("house")
    checkpoint = root / "models" / "tiny_qwen3_vl" / "checkpoints" / "tiny-qwen3-vl"
    shutil.copytree(demo_checkpoint.directory, checkpoint)
    pair = root / "configs" / "quant_pair" / "wbroken_afp16.yaml"
    pair.parent.mkdir(parents=True)
    pair.write_text(BROKEN, encoding="utf-8")
    environment = {
        "QSENS_ROOT": str(root),
        "QSENS_RESULTS": str(root),
        "QSENS_PRESET": "demo-text",
        "QSENS_SCHEDULE": "none",
        "OMP_NUM_THREADS": "1",
    }
    with components(root / ".airflow", environment=environment) as airflow:
        yield House(airflow, root)


@pytest.fixture(scope="module")
def green(house: House) -> Run:
    return house.run(
        quant_pair=["wfp8_afp8", "wint8_afp16"],
        size=["small"],
        overrides="autoquant.method=fisher autoquant.audit=sample",
    )


def test_a_complete_grid_is_green(house: House, green: Run) -> None:
    assert green.state == "success"
    assert green.states() == dict.fromkeys(
        [
            "plan",
            "cell.calibrate [wfp8_afp8 · small]",
            "cell.calibrate [wint8_afp16 · small]",
            "cell.score [wfp8_afp8 · small]",
            "cell.score [wint8_afp16 · small]",
            "audit",
            "publish",
            "prune",
            "gate",
        ],
        "success",
    )
    published = house.published(green)
    assert published["complete"] is True
    assert published["missing"] == []
    index = Path(published["index"])
    assert index.is_relative_to(house.root)
    assert "wint8_afp16" in index.read_text(encoding="utf-8")
    manifests = sorted(path.name for path in house.files(green) if "manifest" in path.name)
    assert manifests == [
        "wfp8_afp8_autoquant_lm_quant_manifest.json",
        "wint8_afp16_autoquant_lm_quant_manifest.json",
    ]


def test_the_audit_of_a_run_is_published_with_it(house: House, green: Run) -> None:
    found = house.airflow.client.returned(green.run_id, "audit")
    assert isinstance(found, dict)
    assert found["missing"] == []
    summary = json.loads(
        (Path(house.published(green)["index"]).parent / "summary.json").read_text()
    )
    stored = {entry["cell"]: entry["judgement"]["verdict"] for entry in summary["audit"]}
    assert found["verdicts"] == stored
    assert set(stored) == {"wfp8_afp8-small", "wint8_afp16-small"}
    assert all(len(entry["points"]) == 12 for entry in summary["audit"])


def test_a_complete_run_causes_an_event_that_tells_what_was_found(house: House, green: Run) -> None:
    (event,) = house.airflow.client.asset_events(green.run_id)
    published = house.published(green)
    assert (event["sweep_id"], event["index"]) == (published["sweep_id"], published["index"])
    assert event["counts"] == {"cells": 2, "done": 2, "partial": 0, "missing": 0}
    # Worked out from the rows: the mean of a group's shares of the totals of both cells.
    summary = json.loads((Path(event["index"]).parent / "summary.json").read_text())
    shares: dict[str, float] = {}
    for cell in summary["cells"]:
        scored = [row for row in cell["rows"] if row["sensitivity"] is not None]
        total = sum(row["sensitivity"] for row in scored)
        for row in scored:
            shares[row["layer"]] = shares.get(row["layer"], 0.0) + row["sensitivity"] / total / 2
    first = sorted(shares, key=lambda name: -shares[name])[:5]
    assert [group["layer"] for group in event["top"]] == first
    assert [group["share"] for group in event["top"]] == pytest.approx(
        [shares[name] for name in first]
    )


@pytest.mark.parametrize("by", ["sweep", "model"])
def test_report_only_makes_the_same_reports_without_a_gpu_task(
    house: House, green: Run, by: str
) -> None:
    before = house.files(green)
    lost = [path for path in before if path.suffix in (".md", ".html")]
    assert lost
    for path in lost:
        path.unlink()
    sweep = house.published(green)["sweep_id"] if by == "sweep" else None
    run = house.run(mode="report_only", sweep=sweep)
    assert run.state == "success"
    assert run.states() == {
        "plan": "success",
        "cell.calibrate": "skipped",
        "cell.score": "skipped",
        "audit": "skipped",
        "publish": "success",
        "prune": "success",
        "gate": "success",
    }
    gpu_tasks = ("cell.calibrate", "cell.score", "audit")
    assert [run.task(name).tries for name in gpu_tasks] == [0, 0, 0]
    assert house.published(run)["sweep_id"] == house.published(green)["sweep_id"]
    assert house.files(green) == before


def test_a_cell_that_fails_fails_alone_and_the_run_is_red(house: House, green: Run) -> None:
    run = house.run(quant_pair=["wbroken_afp16", "wint8_afp8"], size=["small"])
    assert run.state == "failed"
    broken = run.task("cell.score [wbroken_afp16 · small]")
    # Nothing that the user must mend is tried again.
    assert (broken.state, broken.tries) == ("failed", 1)
    assert {name: state for name, state in run.states().items() if state != "success"} == {
        broken.name: "failed",
        "audit": "skipped",
        "gate": "failed",
    }
    published = house.published(run)
    assert published["complete"] is False
    assert [cell["cell"] for cell in published["missing"]] == ["wbroken_afp16-small"]
    assert "PARTIAL" in Path(published["index"]).read_text(encoding="utf-8")
    log = "\n".join(house.airflow.task_log(run.run_id, run.task("gate")))
    assert f"wbroken_afp16-small: {published['missing'][0]['reason']}" in log


def test_a_cell_that_is_computed_elsewhere_gives_its_slot_back_and_comes_again(
    house: House, tmp_path: Path
) -> None:
    overrides = ["quant_pair=wint4_afp16", "dataset.size=small"]
    file = tmp_path / "plan.json"
    subprocess.run(
        [sys.executable, "-m", "qsens", "plan", "--out", str(file), "demo-text", *overrides],
        env=house.airflow.environment,
        check=True,
    )
    plan = read_plan(file)
    lock = Store(plan).lock(plan.cells[0])
    seen: list[str | None] = []

    def changed(task: TaskState) -> None:
        if task.task_id == "cell.score":
            seen.append(task.state)
            if task.state == "up_for_reschedule":
                lock.release()

    lock.acquire()
    conf = {"preset": "demo-text", "quant_pair": ["wint4_afp16"], "size": ["small"]}
    run_id = house.airflow.client.trigger(conf)
    assert house.airflow.wait(run_id, seconds=house.seconds, changed=changed) == "success"
    assert "up_for_reschedule" in seen
    score = house.end(run_id).task("cell.score [wint4_afp16 · small]")
    assert (score.state, score.tries) == ("success", 1)


def test_publish_alone_can_be_cleared_in_an_old_run(house: House, green: Run) -> None:
    before = house.files(green)
    lost = [path for path in before if path.name == "summary.md"]
    for path in lost:
        path.unlink()
    house.airflow.client.clear(green.run_id, ["publish"])
    run = house.end(green.run_id)
    assert run.state == "success"
    tries = {task.name: task.tries for task in run.tasks}
    assert tries == {task.name: 1 for task in green.tasks} | {"publish": 2}
    assert house.files(green) == before


@pytest.mark.parametrize(
    ("conf", "line"),
    [
        ({"quant_pairs": ["wfp8_afp8"]}, "param quant_pairs"),
        ({"overrides": "model.path=/etc"}, "model.path (a run of the DAG): '/etc' lies outside"),
        ({"overrides": "model.path=nowhere"}, "the checkpoint's directory does not exist"),
        ({"overrides": "autoquant.draws=none"}, "autoquant.draws"),
    ],
)
def test_a_wrong_value_fails_in_plan_at_once_with_one_line(
    house: House, conf: dict[str, Any], line: str
) -> None:
    run = house.run(**conf)
    assert run.state == "failed"
    assert (run.task("plan").state, run.task("plan").tries) == ("failed", 1)
    log = house.airflow.task_log(run.run_id, run.task("plan"))
    assert any(line in text for text in log)
    assert "Traceback" not in "\n".join(log)
    assert (run.task("publish").state, run.task("publish").tries) == ("failed", 1)
    assert run.task("cell.calibrate").tries == 0


@pytest.mark.parametrize(
    "conf",
    [
        {"quant_pair": ["wfp9_afp9"]},
        {"size": "small"},
        {"mode": "report"},
        {"model": "../x"},
        {"sweep": "../x"},
        {"force": "yes"},
    ],
)
def test_a_value_that_the_form_does_not_offer_is_answered_with_400(
    house: House, conf: dict[str, Any]
) -> None:
    with pytest.raises(RuntimeError, match=r"dagRuns: 400: (?!.*Traceback)"):
        house.airflow.client.trigger({"preset": "demo-text"} | conf)


def test_three_phases_of_int8_publish_six_directories_in_one_run(house: House) -> None:
    run = house.run(preset="int8-3phase", model="tiny_qwen3_vl", dataset=["demo_drawings"])
    assert run.state == "success"
    sizes = ("small", "medium", "large")
    published = house.published(run)
    assert (published["complete"], published["missing"]) == (True, [])
    assert len([task for task in run.tasks if task.name.startswith("cell.score")]) == 6
    model = house.root / "models" / "tiny_qwen3_vl" / "layer-analysis"
    found = model / "weight-int8-act-int8"
    assert {path.name for path in found.iterdir()} == {
        f"tiny_qwen3_vl_autoquant_{kind}_{size}"
        for kind in ("all_layers_int8", "int8_lm")
        for size in sizes
    }
    for path in found.iterdir():
        assert list(path.glob("*_quant_manifest.json"))
        assert (path / "per-layer-sensitivity.html").is_file()
