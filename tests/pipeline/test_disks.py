"""Disks that are read-only, full, or without locks: one message, nothing lost, reading works."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qsens.config import Roots
from qsens.errors import DiskFull, UserError
from qsens.grid import Plan, read_plan
from qsens.locks import held, lock_at
from qsens.pipeline.audit import audit
from qsens.pipeline.cell import calibrate, score
from qsens.pipeline.compare import compare
from qsens.pipeline.plan import plan_sweep
from qsens.pipeline.publish import publish, report
from qsens.pipeline.recipe import write_recipe
from qsens.pipeline.sweep import run_sweep
from qsens.store import Store
from qsens.tools.doctor import examine
from qsens.tools.prune import prune
from qsens.writing import write_bytes
from tests import disks
from tests.pipeline import fuzz, results


def files(root: Path) -> dict[str, bytes]:
    """Return all files below a directory, but for locks."""
    return {
        str(path): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def published(root: Path) -> tuple[Plan, Plan]:
    """Return a plan whose sweep is published below ``root``, and one that has no results."""
    made = results.whole(results.plan(root, day=1), seed=1)
    publish(made)
    return made, results.plan(root, day=2, checkpoint="b")


def plan_of_files(root: Path) -> Plan:
    """Plan a sweep of a checkpoint beside ``root``."""
    checkpoint = root.with_name("checkpoint")
    fuzz.write_checkpoint(checkpoint)
    words = ["dataset=demo", "quant_pair=wint8_afp16", f"model.path={checkpoint}"]
    roots = Roots(root=root, results=root, configs=Roots.from_environment().configs)
    return plan_sweep("single", words, roots=roots)


VERBS: dict[str, Callable[[Plan, Plan], Any]] = {
    "plan": lambda made, _: plan_of_files(made.results),
    "plan --out": lambda made, _: write_bytes(made.results / "plan.json", b"{}"),
    "calibrate": lambda _, other: calibrate(
        other.model_copy(update={"config": of_inputs(other)}), other.cells[0].cell
    ),
    "score": lambda _, other: score(other, other.cells[0].cell),
    "sweep": lambda _, other: run_sweep(other),
    "publish": lambda made, _: publish(made),
    "report": lambda made, _: report(Store(made).cell_dir(made.cells[0])),
    "report of a sweep": lambda made, _: report(Store(made).sweep_dir()),
    "prune": lambda made, _: prune(made.results, keep_sweeps=1, keep_days=1),
    "recipe --out": lambda made, _: recipe(made, made.results / "recipe.yaml"),
    "fetch-model": lambda made, _: locked(made.results / "models" / ".fetched.lock"),
}


def of_inputs(plan: Plan) -> Any:
    """Return the configuration of a plan, its inputs quantized by what calibration finds."""
    pair = plan.config.quant_pair[0]
    static = {"num_bits": 8, "axis": None}
    changed = pair.model_copy(update={"input_quantizer": type(pair.weight_quantizer)(**static)})
    return plan.config.model_copy(update={"quant_pair": (changed,)})


def recipe(made: Plan, out: Path | None) -> Any:
    """Write a recipe of a published sweep."""
    sweep = str(Store(made).sweep_dir())
    return write_recipe(sweep, bits=12.0, target="modelopt", out=out)


def locked(path: Path) -> None:
    """Take a lock."""
    with held(lock_at(path), where="x", wait=False):
        pass


def published_to(made: Plan, directory: Path) -> Plan:
    """Return a plan that is published somewhere else."""
    runner = made.config.runner.model_copy(update={"output_dir": directory})
    return made.model_copy(update={"config": made.config.model_copy(update={"runner": runner})})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Plan]:
    return published(tmp_path_factory.mktemp("published") / "results")


@pytest.mark.parametrize("verb", VERBS)
def test_what_writes_to_read_only_results_says_so(verb: str, place: tuple[Plan, Plan]) -> None:
    before = files(place[0].results)
    with disks.read_only(place[0].results), pytest.raises(UserError) as caught:
        VERBS[verb](*place)
    assert caught.value.exit_code == 2
    assert caught.value.what.startswith("cannot be written to: ")
    assert caught.value.where.startswith(f"directory {place[0].results}")
    assert "mend its rights" in caught.value.remedy
    assert files(place[0].results) == before


def test_what_reads_read_only_results_works(place: tuple[Plan, Plan], tmp_path: Path) -> None:
    made, _ = place
    cell = made.cells[0].cell
    runner = made.config.runner.model_copy(update={"output_dir": tmp_path / "elsewhere"})
    elsewhere = made.model_copy(
        update={"config": made.config.model_copy(update={"runner": runner})}
    )
    with disks.read_only(made.results):
        assert recipe(made, None)["bits"] <= 12.0
        assert recipe(made, tmp_path / "recipe.yaml")["path"] == str(tmp_path / "recipe.yaml")
        assert not score(made, cell)["computed"]
        assert calibrate(made, cell)["status"] == "done"
        assert prune(made.results, keep_sweeps=1, keep_days=1, dry_run=True).sweeps == []
        assert publish(elsewhere)["complete"]
    assert len(list((tmp_path / "elsewhere").glob("*/*_quant_manifest.json"))) == len(made.cells)


def test_doctor_says_what_is_wrong_with_results(
    place: tuple[Plan, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results_root = place[0].results
    monkeypatch.setenv("QSENS_RESULTS", str(results_root))
    with disks.read_only(results_root):
        assert any("cannot be written to: " in problem for problem in examine()["problems"])
    assert not any("cannot be written to" in problem for problem in examine()["problems"])
    above = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setenv("QSENS_RESULTS", str(tmp_path / "nothing" / "there"))
    assert examine()["results_used_gib"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == above


LOCKING = ("calibrate", "score", "sweep", "publish", "prune", "fetch-model")


@pytest.mark.parametrize("answer", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
@pytest.mark.parametrize("verb", LOCKING)
def test_a_file_system_without_locks_is_said(
    verb: str, answer: int, place: tuple[Plan, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(answer, os.strerror(answer))

    before = files(place[0].results)
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError) as caught:
        VERBS[verb](*place)
    assert caught.value.what == f"its file system has no locks (flock): {os.strerror(answer)}"
    assert caught.value.where.startswith(f"directory {place[0].results}")
    assert "QSENS_RESULTS" in caught.value.remedy
    assert files(place[0].results) == before


def test_a_full_disk_is_said_and_nothing_is_half_written(tmp_path: Path) -> None:
    made = results.whole(results.plan(tmp_path / "results", day=1), seed=1)
    disk = tmp_path / "disk"
    with disks.small(disk, "96k"):
        there = published_to(made, disk / "out")
        with pytest.raises(DiskFull, match="no space left") as caught:
            publish(there)
        assert caught.value.exit_code == 75
        assert "is kept" in caught.value.remedy
        assert not list(disk.rglob("*.tmp"))
        before = files(disk)

        def fill() -> None:
            for seed in range(100):
                results.whole(results.plan(disk, day=1, captions=chr(97 + seed)), seed)

        with pytest.raises(DiskFull):
            fill()
        assert before.items() <= files(disk).items()
        assert not list(disk.rglob(".*.tmp"))
        # What is there is whole.
        for manifest in disk.glob(".cells/*/manifest.json"):
            assert (manifest.parent / "state.safetensors").is_file()


def test_results_that_nobody_may_read_are_said(place: tuple[Plan, Plan]) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read anything")
    made, _ = place
    cells = made.results / ".cells"
    cells.chmod(0)
    try:
        with pytest.raises(UserError, match="Permission denied"):
            score(made, made.cells[0].cell)
        reasons = {entry["reason"] for entry in publish(made)["missing"]}
        assert all("cannot be read: Permission denied" in reason for reason in reasons)
        assert audit(made)["missing"]
    finally:
        cells.chmod(0o755)


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "pipe"])
def test_names_that_nothing_can_have_are_one_message(
    name: str, place: tuple[Plan, Plan], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    where = tmp_path / name
    roots = Roots(root=tmp_path, results=place[0].results, configs=())
    for work in (
        lambda: report(where),
        lambda: write_recipe(str(where), bits=12.0, target="modelopt", roots=roots),
        lambda: compare(str(where), str(where), roots=roots),
        lambda: read_plan(where),
    ):
        with pytest.raises(UserError) as caught:
            work()
        assert caught.value.remedy
