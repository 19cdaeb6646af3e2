"""The order of sweeps is that of their publication: a clock that jumps hides nothing."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qsens.errors import Damaged
from qsens.grid import Plan, read_plan
from qsens.pipeline.publish import publish, report
from qsens.published import (
    Place,
    Published,
    Shown,
    place_of,
    published_sweeps,
    read_summary,
    read_sweep,
)
from qsens.schema.summary import Summary
from qsens.store import PLAN, Store
from qsens.tools.prune import prune
from tests.pipeline import results

# The second was made by a clock that was years ahead.
DAYS = ((1, "a"), (28, "b"), (2, "d"), (3, "e"))


@pytest.fixture
def nights(tmp_path: Path) -> list[Plan]:
    plans = [
        results.whole(results.plan(tmp_path, day=day, checkpoint=name), seed=1)
        for day, name in DAYS
    ]
    for made in plans:
        publish(made)
    return plans


def summary_of(made: Plan) -> Summary:
    return read_summary(Store(made).sweep_dir() / "summary.json")


def shown(made: Plan) -> str:
    """Return the checkpoint whose result the directory of a plan's first cell shows."""
    manifest = json.loads(Store(made).published(made.cells[0])["manifest"].read_text())
    return str(manifest["model"]["digest"])[0]


def test_each_sweep_follows_the_one_published_before_it(nights: list[Plan]) -> None:
    ids = [made.sweep_id for made in nights]
    assert ids[1] == max(ids)
    assert [summary_of(made).previous for made in nights] == [None, *ids[:3]]
    assert [summary_of(made).published for made in nights] == [1, 2, 3, 4]
    drift = summary_of(nights[3]).drift
    assert drift is not None
    assert drift.previous == ids[2]
    assert shown(nights[3]) == "e"
    model_dir = Store(nights[0]).model_dir()
    page = (model_dir / "index.html").read_text()
    places = [page.index(f">{sweep_id}<") for sweep_id in ids]
    assert places == sorted(places, reverse=True)


def test_a_sweep_published_again_keeps_its_place(nights: list[Plan]) -> None:
    directories = [Store(made).sweep_dir() for made in nights]
    before = {path: path.read_bytes() for each in directories for path in each.iterdir()}
    for made, directory in zip(nights, directories, strict=True):
        for path in directory.iterdir():
            if path.name != PLAN:
                path.unlink()
        publish(made)  # as it was planned
        publish(read_plan(directory / PLAN))  # as it was published
        assert shown(made) == "e"
    assert {path: path.read_bytes() for each in directories for path in each.iterdir()} == before


def test_a_file_of_another_sweep_is_refused(nights: list[Plan]) -> None:
    one, other = (Store(made).sweep_dir() for made in nights[:2])
    (one / "summary.json").write_bytes((other / "summary.json").read_bytes())
    for read in (report, read_sweep):
        with pytest.raises(Damaged, match="that of another sweep"):
            read(one)
    publish(nights[0])
    assert read_sweep(one)[0].sweep_id == nights[0].sweep_id
    (one / PLAN).write_bytes((other / PLAN).read_bytes())
    with pytest.raises(Damaged, match="that of another sweep"):
        read_sweep(one)


def test_a_damaged_plan_or_summary_loses_no_place(nights: list[Plan]) -> None:
    directory = Store(nights[2]).sweep_dir()
    text = (directory / PLAN).read_text()
    (directory / PLAN).write_text(text.replace('"published": 3', '"published": 7'))
    assert Published.read(directory).place == Place(3, nights[2].sweep_id)
    publish(nights[2])
    assert (directory / PLAN).read_text() == text
    assert shown(nights[2]) == "e"


def test_sweeps_from_before_there_were_numbers_come_first(
    nights: list[Plan], tmp_path: Path
) -> None:
    # As the version before published them: the one with the wrong clock shown for ever.
    for made in nights:
        directory = Store(made).sweep_dir()
        for name in ("plan.json", "summary.json"):
            data = json.loads((directory / name).read_text())
            del data["checksum"], data["published"]
            (directory / name).write_text(json.dumps(data | {"schema_version": 1}))
        for cell in made.cells:
            (Store(made).cell_dir(cell) / ".sweep").write_text(nights[1].sweep_id)
    ids = [made.sweep_id for made in nights]
    sweeps = Store(nights[0]).model_dir() / "sweeps"
    assert [sweep.place for sweep in published_sweeps(sweeps)] == [
        Place(0, sweep_id) for sweep_id in sorted(ids)
    ]
    publish(nights[0])  # an old one, again: it has no number still
    assert place_of(Store(nights[0])) == Place(0, ids[0])
    assert Shown.read(Store(nights[0]).cell_dir(nights[0].cells[0])) == Shown(
        Place(0, ids[1]), None
    )
    new = results.whole(results.plan(tmp_path, day=4, checkpoint="f"), seed=1)
    publish(new)
    assert place_of(Store(new)) == Place(1, new.sweep_id)
    assert summary_of(new).previous == max(ids)
    assert shown(new) == "f"


def test_pruning_keeps_what_was_published_last(nights: list[Plan], tmp_path: Path) -> None:
    now = datetime(2031, 1, 1, tzinfo=UTC)
    pruned = prune(tmp_path, keep_sweeps=1, keep_days=1, now=now)
    # The last one, and the one that its reports compare it with.
    assert sorted(pruned.sweeps) == sorted(made.sweep_id for made in nights[:2])


def test_one_directory_for_all_shows_what_was_published_last(tmp_path: Path) -> None:
    for day, name in DAYS:
        made = results.plan(tmp_path, day=day, checkpoint=name)
        runner = made.config.runner.model_copy(update={"output_dir": tmp_path / "out"})
        made = made.model_copy(update={"config": made.config.model_copy(update={"runner": runner})})
        publish(results.whole(made, seed=1))
        assert shown(made) == name
        assert summary_of(made).sweep_id == made.sweep_id


def test_what_was_set_aside_goes_in_time(tmp_path: Path) -> None:
    made = results.whole(results.plan(tmp_path, day=1), seed=1)
    store = Store(made)
    store.manifest(made.cells[0]).write_text("{")
    assert store.set_aside_result(made.cells[0]) is True
    (aside,) = (tmp_path / ".damaged").iterdir()
    assert not store.result_dir(made.cells[0]).exists()
    now = datetime.now(UTC)
    assert prune(tmp_path, keep_sweeps=1, keep_days=30, now=now).files == []
    later = now.replace(year=now.year + 1)
    pruned = prune(tmp_path, keep_sweeps=1, keep_days=30, now=later)
    assert str(aside) in pruned.files
    assert not aside.exists()
    shutil.rmtree(tmp_path / ".cells")
