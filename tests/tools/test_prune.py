"""Pruning: what is old goes, and never what a kept sweep refers to."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from qsens.config import Roots, load_sweep
from qsens.errors import UserError
from qsens.grid import Plan, make_plan
from qsens.identity import CheckpointIdentity, SamplesIdentity
from qsens.pipeline.plan import plan_json
from qsens.store import Store, publishing
from qsens.tools import prune as pruning
from qsens.tools.prune import Pruned, prune

REPO = Path(__file__).resolve().parents[2]
NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
ROOTS = Roots(root=REPO, results=REPO, configs=(REPO / "configs",))
CONFIG = load_sweep("demo-text", ["dataset.size=small"], roots=ROOTS).config


@dataclass(frozen=True)
class Place:
    """A results root with hand-made sweeps; real plans, and files where the store has them."""

    results: Path

    def sweep(self, days: float, version: str, *, previous: str | None = None) -> Plan:
        """Publish a sweep of three cells, made ``days`` ago; a version is one set of results."""
        plan = make_plan(
            CONFIG,
            Roots(root=REPO, results=self.results, configs=ROOTS.configs),
            checkpoint=CheckpointIdentity(
                path=REPO, digest="c", tokenizer_digest="t", architecture="A", weight_bytes=1
            ),
            samples={
                CONFIG.dataset[0].name: {
                    "small": SamplesIdentity(path=REPO, digest="s", available=16)
                }
            },
            versions={"qsens": "1", "torch": version, "transformers": "1"},
            now=NOW - timedelta(days=days),
        )
        store = Store(plan)
        for cell in plan.cells:
            self.result(store.manifest(cell), days)
            directory = store.cell_dir(cell)
            directory.mkdir(parents=True, exist_ok=True)
            (directory / ".sweep").write_text(plan.sweep_id)
            (directory / "per-layer-sensitivity.md").write_text(plan.sweep_id)
        self.result(store.calibration(plan.cells[0].calibration), days)
        store.sweep_dir().mkdir(parents=True)
        (store.sweep_dir() / "plan.json").write_text(plan_json(plan))
        summary = {"sweep_id": plan.sweep_id, "previous": previous}
        (store.sweep_dir() / "summary.json").write_text(json.dumps(summary))
        return plan

    def result(self, path: Path, days: float) -> None:
        """Write a file of that age, unless there is one: results are never overwritten."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(path.name)
            self.age(path, days)

    def age(self, path: Path, days: float) -> None:
        stamp = (NOW - timedelta(days=days)).timestamp()
        os.utime(path, (stamp, stamp))

    def prune(self, keep_sweeps: int, keep_days: int, *, dry_run: bool = False) -> Pruned:
        return prune(
            self.results, keep_sweeps=keep_sweeps, keep_days=keep_days, dry_run=dry_run, now=NOW
        )

    def sweeps(self) -> set[str]:
        return {path.name for path in self.results.glob("models/*/layer-analysis/sweeps/2*")}

    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.results)): path.read_bytes()
            for path in sorted(self.results.rglob("*"))
            if path.is_file() and path.suffix != ".lock"
        }

    def holds(self, plan: Plan) -> bool:
        """Return whether everything that a plan's reports are made from is there."""
        store = Store(plan)
        digest = plan.cells[0].calibration
        manifests = [store.manifest(cell) for cell in plan.cells]
        return all(path.is_file() for path in (store.calibration(digest), *manifests))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_old_sweeps_go_with_what_only_they_refer_to(place: Place) -> None:
    old = place.sweep(100, "a")
    compared = place.sweep(60, "b", previous=old.sweep_id)
    kept = place.sweep(2, "c", previous=compared.sweep_id)
    pruned = place.prune(1, 30)
    assert pruned.sweeps == [old.sweep_id]
    # The sweep before a kept one is what that one's reports compare it with.
    assert place.sweeps() == {compared.sweep_id, kept.sweep_id}
    assert [place.holds(plan) for plan in (old, compared, kept)] == [False, True, True]
    assert sorted(pruned.results) == sorted(cell.digest for cell in old.cells)
    # The newest result of each pair is shown, and it is not the one that has gone.
    assert pruned.cells == []
    index = place.results / "models/tiny_qwen3_vl/layer-analysis/index.html"
    assert old.sweep_id not in index.read_text()
    assert place.prune(1, 30) == Pruned()


def test_a_pair_that_only_an_old_sweep_has_goes_with_it(place: Place) -> None:
    old = place.sweep(100, "a")
    shown = [Store(old).cell_dir(cell) for cell in old.cells]
    foreign = shown[0].parent / "somebody-elses-run"
    foreign.mkdir()
    (foreign / "x_quant_manifest.json").write_text("{}")
    for days in (3, 2):
        place.sweep(days, "b")
    # The two new ones have replaced what those directories show: put the old ones back.
    for directory in shown:
        (directory / ".sweep").write_text(old.sweep_id)
    pruned = place.prune(1, 30)
    assert len(pruned.cells) == len(shown) == 3
    assert not any(directory.exists() for directory in shown)
    assert (foreign / "x_quant_manifest.json").is_file()


def test_a_result_that_a_kept_sweep_shares_with_an_old_one_stays(place: Place) -> None:
    old, kept = place.sweep(100, "a"), place.sweep(50, "a")
    pruned = place.prune(1, 30)
    assert pruned.sweeps == [old.sweep_id]
    assert pruned.results == pruned.files == []
    assert place.holds(kept)


def test_what_is_young_or_locked_stays_though_no_sweep_names_it(place: Place) -> None:
    place.sweep(40, "kept")
    for name, days in (("a", 1), ("b", 40), ("c", 40)):
        place.result(place.results / ".cells" / (name * 64) / "manifest.json", days)
        place.result(place.results / ".cells" / f"{name * 64}.failed.json", days)
        place.result(place.results / ".calibrations" / f"{name * 64}.safetensors", days)
    with (
        FileLock(place.results / ".cells" / f"{'c' * 64}.lock"),
        FileLock(place.results / ".calibrations" / f"{'c' * 64}.lock"),
    ):
        pruned = place.prune(1, 30)
    assert pruned.results == ["b" * 64]
    assert sorted(Path(path).name for path in pruned.files) == sorted(
        ["b" * 64 + ".failed.json", "c" * 64 + ".failed.json", "b" * 64 + ".safetensors"]
    )


def test_planning_with_an_old_result_keeps_it(
    place: Place, demo_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qsens.pipeline.plan import plan_sweep

    monkeypatch.setenv("QSENS_RESULTS", str(place.results))
    monkeypatch.setenv("QSENS_ROOT", str(REPO))
    words = [f"model.path={demo_checkpoint.directory}", "dataset.size=small"]
    plan = plan_sweep("demo-text", words)
    manifest = Store(plan).manifest(plan.cells[0])
    place.result(manifest, 400)
    plan_sweep("demo-text", words)
    assert datetime.now(UTC).timestamp() - manifest.stat().st_mtime < 60


def test_while_somebody_publishes_nothing_of_the_model_goes(place: Place) -> None:
    old = place.sweep(100, "a")
    place.sweep(2, "b")
    with publishing(Store(old)):
        pruned = place.prune(1, 30)
    assert pruned.sweeps == []
    assert place.holds(old)
    assert "is being published to" in pruned.notes[0]


def test_a_plan_that_cannot_be_read_keeps_every_result(place: Place) -> None:
    old, broken = place.sweep(100, "a"), place.sweep(2, "b")
    (Store(broken).sweep_dir() / "plan.json").write_text("{}")
    pruned = place.prune(1, 30)
    assert pruned.sweeps == [old.sweep_id]
    assert pruned.results == []
    assert place.holds(old)
    assert "every result is kept" in pruned.notes[0]


def test_the_tmp_layout_is_pruned_a_model_at_a_time(place: Place) -> None:
    for days, model in ((100, "one"), (90, "one"), (80, "two")):
        stamp = (NOW - timedelta(days=days)).strftime("%Y%m%dT%H%M%S000Z")
        directory = place.results / "tmp" / f"{stamp}-0123abcd"
        directory.mkdir(parents=True)
        plan = {"config": {"model": {"name": model}}}
        (directory / "plan.json").write_text(json.dumps(plan))
    (place.results / "tmp" / "notes").mkdir()
    pruned = place.prune(1, 30)
    assert [name[:8] for name in pruned.sweeps] == ["20260221"]
    assert (place.results / "tmp" / "notes").is_dir()
    assert len(list((place.results / "tmp").iterdir())) == 3


def test_plans_of_runs_go_with_their_sweep(place: Place) -> None:
    kept = place.sweep(100, "a")
    for name, sweep_id, days in (
        ("kept", kept.sweep_id, 100), ("gone", "20260101T000000000Z-0123abcd", 100),
        ("running", "20260531T000000000Z-0123abcd", 1),
    ):  # fmt: skip
        path = place.results / ".plans" / name / "plan.json"
        place.result(path, days)
        path.write_text(json.dumps({"sweep_id": sweep_id}))
        place.age(path, days)
    place.prune(1, 30)
    left = sorted(path.name for path in (place.results / ".plans").iterdir())
    assert left == ["kept", "running"]


def test_half_written_files_go_after_a_day(place: Place) -> None:
    for days in (0.5, 40):
        place.result(place.results / ".cells" / f".{days}.tmp", days)
    place.prune(1, 30)
    assert [path.name for path in (place.results / ".cells").iterdir()] == [".0.5.tmp"]


def test_a_dry_run_says_the_same_and_removes_nothing(place: Place) -> None:
    for days, version in ((100, "a"), (80, "b"), (2, "c")):
        place.sweep(days, version)
    before = place.files()
    said = place.prune(1, 30, dry_run=True)
    assert place.files() == before
    done = place.prune(1, 30)
    assert said == done
    size = sum(len(content) for content in before.values())
    left = {name: content for name, content in place.files().items() if name in before}
    assert done.bytes == size - sum(map(len, left.values()))


@pytest.mark.parametrize("given", [{"keep_sweeps": 0}, {"keep_days": 0}])
def test_to_keep_nothing_is_refused(given: dict[str, int], place: Place) -> None:
    with pytest.raises(UserError, match="is 0"):
        prune(place.results, **({"keep_sweeps": 1, "keep_days": 1} | given))


GRAPHS = st.lists(
    st.tuples(
        st.integers(0, 60),  # age in days
        st.sampled_from("abcd"),  # which results it refers to
        st.booleans(),  # whether it compares itself with the one before
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda sweep: sweep[0],
)


@contextmanager
def built(graph: list[tuple[int, str, bool]]) -> Iterator[tuple[Place, dict[int, Plan]]]:
    with tempfile.TemporaryDirectory() as directory:
        place, plans, previous = Place(Path(directory)), {}, None
        for days, version, compares in sorted(graph, reverse=True):
            plan = place.sweep(days, version, previous=previous if compares else None)
            plans[days], previous = plan, plan.sweep_id
        yield place, plans


@settings(max_examples=25, deadline=None)
@given(graph=GRAPHS, keep_sweeps=st.integers(1, 4), keep_days=st.integers(1, 40))
def test_no_kept_sweep_ever_loses_what_it_refers_to(
    graph: list[tuple[int, str, bool]], keep_sweeps: int, keep_days: int
) -> None:
    base = set(sorted(age for age, _, _ in graph)[:keep_sweeps])
    base |= {age for age, _, _ in graph if age <= keep_days}
    with built(graph) as (place, plans):
        ages = sorted(plans)
        compared = {
            ages[ages.index(age) + 1]
            for age, _, compares in graph
            if compares and age in base and age != ages[-1]
        }
        kept = base | compared
        place.prune(keep_sweeps, keep_days)
        assert place.sweeps() == {plans[age].sweep_id for age in kept}
        assert all(place.holds(plans[age]) for age in kept)
        # A result is as old as the first sweep that has it.
        for version in {version for _, version, _ in graph}:
            having = [age for age, name, _ in graph if name == version]
            stays = bool(set(having) & kept) or max(having) <= keep_days
            assert place.holds(plans[having[0]]) is stays


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code sees it as an error."""


@settings(max_examples=20, deadline=None)
@given(graph=GRAPHS, steps=st.integers(0, 12))
def test_wherever_it_is_killed_the_next_run_ends_the_same(
    graph: list[tuple[int, str, bool]], steps: int
) -> None:
    with built(graph) as (place, plans):
        copy = place.results.parent / f"{place.results.name}-copy"
        shutil.copytree(place.results, copy)
        try:
            for directory in [place.results, *place.results.rglob("*")]:
                stat = directory.stat()
                os.utime(
                    copy / directory.relative_to(place.results), (stat.st_atime, stat.st_mtime)
                )
            kept = [plan for age, plan in plans.items() if age <= 10]
            left = steps
            delete = pruning._delete

            def mortal(path: Path) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                delete(path)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pruning, "_delete", mortal)
                try:
                    place.prune(1, 10)
                except Killed:
                    assert all(map(place.holds, kept))
            place.prune(1, 10)
            other = Place(copy)
            other.prune(1, 10)
            assert set(place.files()) == set(other.files())
        finally:
            shutil.rmtree(copy)


def test_the_reports_of_a_kept_sweep_are_made_again_byte_for_byte(tmp_path: Path) -> None:
    from qsens.pipeline.publish import publish
    from tests.pipeline import results as by_hand

    plans = []
    for day, checkpoint in ((1, "a"), (2, "b"), (3, "d"), (4, "e")):
        made = by_hand.plan(tmp_path, day=day, checkpoint=checkpoint)
        for cell in made.cells:
            # The last one differs from the one before it, which its reports say.
            factors = {by_hand.LAYERS[3]: 3.0} if day == 4 else None
            by_hand.result(made, cell, seed=day, factors=factors)
        publish(made)
        plans.append(made)
    first, second, compared, kept = plans

    def published() -> dict[str, bytes]:
        model = Store(kept).model_dir()
        # That of the sweep before, which is no report of this one, has lost its own comparison.
        files = [*Store(kept).sweep_dir().rglob("*"), *model.glob("weight-*/**/*")]
        return {str(path): path.read_bytes() for path in files if path.is_file()}

    before = published()
    summary = json.loads((Store(kept).sweep_dir() / "summary.json").read_text())
    assert summary["previous"] == compared.sweep_id
    assert summary["drift"]["moved"]
    now = datetime(2030, 1, 20, tzinfo=UTC)
    pruned = prune(tmp_path, keep_sweeps=1, keep_days=1, now=now)
    assert pruned.sweeps == [first.sweep_id, second.sweep_id]
    assert len(pruned.results) == 4
    publish(kept)
    assert published() == before
