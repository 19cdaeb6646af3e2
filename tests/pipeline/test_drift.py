from __future__ import annotations

import json
import shutil
from pathlib import Path

from qsens.grid import Plan
from qsens.pipeline.publish import publish, report
from qsens.schema.summary import Summary
from qsens.store import Store
from tests.pipeline import results

MOVING = {results.LAYERS[3]: 5.0}


def published(made: Plan) -> Summary:
    index = Path(publish(made)["index"])
    return Summary.model_validate_json((index.parent / "summary.json").read_bytes())


def test_a_new_checkpoint_names_the_groups_that_moved_and_the_cause(tmp_path: Path) -> None:
    first = published(results.whole(results.plan(tmp_path, day=1), seed=1))
    assert (first.previous, first.drift) == (None, None)
    second = published(results.whole(results.plan(tmp_path, day=2, checkpoint="b"), 1, MOVING))
    drift = second.drift
    assert drift is not None
    assert drift.previous == first.sweep_id
    # The larger size alone: the smaller one's samples are in it.
    assert drift.compared == ("wint8_afp16-medium",)
    assert (drift.tested, drift.paired, drift.identical) == (12, True, 0)
    (moved,) = drift.moved
    assert moved.layer == results.LAYERS[3]
    assert round(moved.after / moved.before, 6) == 5.0
    assert [(entry.cause, entry.what) for entry in drift.differences] == [("checkpoint", "digest")]
    text = (
        Store(results.plan(tmp_path, day=2, checkpoint="b")).sweep_dir() / "summary.md"
    ).read_text()
    assert "1 group moved beyond noise" in text
    assert "Changed: checkpoint." in text


def test_other_captions_of_the_same_model_are_silent(tmp_path: Path) -> None:
    published(results.whole(results.plan(tmp_path, day=1), seed=1))
    drift = published(results.whole(results.plan(tmp_path, day=2, captions="d"), seed=999)).drift
    assert drift is not None
    assert (drift.moved, drift.paired, drift.tested) == ((), False, 12)
    assert [(entry.cause, entry.what) for entry in drift.differences] == [("captions", "digest")]


def test_the_same_inputs_are_the_same_result(tmp_path: Path) -> None:
    results.whole(results.plan(tmp_path, day=1), seed=1)
    published(results.plan(tmp_path, day=1))
    drift = published(results.plan(tmp_path, day=2)).drift
    assert drift is not None
    assert (drift.identical, drift.tested, drift.moved, drift.differences) == (1, 0, (), ())


def test_settings_and_methods_are_causes_too(tmp_path: Path) -> None:
    published(results.whole(results.plan(tmp_path, day=1), seed=1))
    drift = published(results.whole(results.plan(tmp_path, day=2, batch_size=3), seed=1)).drift
    assert drift is not None
    assert [entry.what for entry in drift.differences] == ["autoquant.batch_size"]
    assert drift.moved == ()
    drift = published(results.whole(results.plan(tmp_path, day=3, method="kl_div"), seed=1)).drift
    assert drift is not None
    assert drift.compared == ()
    assert "method was gradient" in drift.not_compared[0].reason


def test_publishing_again_gives_the_same_bytes_even_when_earlier_results_are_gone(
    tmp_path: Path,
) -> None:
    first = results.whole(results.plan(tmp_path, day=1), seed=1)
    second = results.whole(results.plan(tmp_path, day=2, checkpoint="b"), 1, MOVING)
    published(first)
    published(second)
    directory = Store(second).sweep_dir()
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    published(first)
    published(second)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    for cell in first.cells:
        shutil.rmtree(Store(first).result_dir(cell))
    published(second)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert json.loads(before["summary.json"])["drift"]["moved"]


def test_a_sweep_can_be_reported_again_from_its_directory(tmp_path: Path) -> None:
    made = results.whole(results.plan(tmp_path, day=1), seed=1)
    published(made)
    directory = Store(made).sweep_dir()
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    written = report(directory)
    assert [Path(path).name for path in written["reports"]] == [
        "summary.md",
        "summary.json",
        "index.html",
        "summary.svg",
    ]
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    cell = Store(made).cell_dir(made.cells[0])
    page = cell / "per-layer-sensitivity.html"
    linked = page.read_bytes()
    report(cell, single_file=True)
    assert len(page.read_bytes()) > 4_000_000
    report(cell)
    assert page.read_bytes() == linked
    assert not (cell / "assets").exists()
