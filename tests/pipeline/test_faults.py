"""Faults: whatever is killed, doubled or full, the numbers end up those of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from plotly.offline import get_plotlyjs
from safetensors import safe_open
from safetensors.numpy import load_file

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult

REPO = Path(__file__).resolve().parents[2]
PAIRS = ("wfp8_afp8", "wint8_afp16", "wint8_aint8")
# Enough work to be hit in the middle of it. The budget is set: what is free changes under a test.
WORDS = (
    "dataset.size=small,large",
    "autoquant.score_size=512",
    "autoquant.memory_gb=0.1",
)


# Runs a step, and looks at what it has imported.
STEP = """
import sys
from qsens.cli import main
sys.argv = ["qsens", sys.argv[1], "--json", "--plan", sys.argv[2], "--cell", "wfp8_afp8-small"]
try:
    main()
except SystemExit as end:
    assert not end.code
slow = {"torch", "transformers", "modelopt", "scipy", "plotly", "tokenizers", "httpx", "pulp"}
assert not slow & set(sys.modules)
"""


class Place:
    """A results root of its own, and the command line."""

    def __init__(self, results: Path, checkpoint: Path) -> None:
        self.results = results
        self.checkpoint = checkpoint
        self.environment = os.environ | {
            "QSENS_ROOT": str(REPO),
            "QSENS_RESULTS": str(results),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "qsens", *words],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def json(self, *words: str, code: int = 0) -> Any:
        return answer(self.start(*words, "--json"), code)

    def sweep_words(self, *pairs: str) -> list[str]:
        model = [f"model.path={self.checkpoint}", "model.name=demo", "model.short_name=demo"]
        return ["demo-text", *model, *WORDS, f"quant_pair={','.join(pairs or PAIRS)}"]

    def plan(self) -> str:
        path = self.results / "plan.json"
        self.json("plan", *self.sweep_words(), "--out", str(path))
        return str(path)

    def numbers(self) -> dict[str, Any]:
        """Return all that was measured, by cell."""
        found = {}
        for path in (self.results / ".cells").glob("*/manifest.json"):
            manifest = json.loads(path.read_text(encoding="utf-8"))
            kept = ("layer_sensitivity", "sensitivity_ranking", "autoquant_state", "dataset")
            tensors = load_file(path.parent / "state.safetensors")
            found[manifest["cell"]] = (
                {key: manifest[key] for key in kept},
                {name: tensor.tolist() for name, tensor in tensors.items()},
            )
        return found

    def published(self) -> dict[str, Any]:
        """Return the rows of the per-layer reports, by their path below the results."""
        paths = self.results.glob("models/**/per-layer-sensitivity.json")
        return {
            str(path.relative_to(self.results)): json.loads(path.read_text())["rows"]
            for path in paths
        }


def answer(process: subprocess.Popen[str], code: int = 0) -> Any:
    out, log = process.communicate(timeout=300)
    assert process.returncode == code, log
    assert "Traceback" not in log
    return json.loads(out)


@pytest.fixture(scope="module")
def undisturbed(demo_checkpoint: DemoResult, tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("undisturbed"), demo_checkpoint.directory)
    assert place.json("sweep", *place.sweep_words())["complete"] is True
    assert len(place.numbers()) == 6
    return place


@pytest.fixture
def place(demo_checkpoint: DemoResult, tmp_path: Path) -> Place:
    return Place(tmp_path / "results", demo_checkpoint.directory)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_score_that_is_killed_leaves_nothing_that_counts_as_a_result(
    undisturbed: Place, place: Place, number: signal.Signals
) -> None:
    plan = place.plan()
    process = place.start("score", "--plan", plan, "--cell", "wfp8_afp8-small", "--json")
    assert process.stderr is not None
    for line in process.stderr:
        if " score " in line:
            break
    process.send_signal(number)
    process.communicate()
    assert process.returncode == -number
    listed = place.json("plan", *place.sweep_words())
    assert not any(cell["done"] for cell in listed["cells"])
    assert place.json("score", "--plan", plan, "--cell", "wfp8_afp8-small")["computed"] is True
    assert place.json("publish", "--plan", plan)["complete"] is True
    assert place.numbers() == undisturbed.numbers()
    assert place.published() == undisturbed.published()


def test_two_sweeps_of_the_same_plan_at_once_compute_it_once(
    undisturbed: Place, place: Place
) -> None:
    both = [place.start("sweep", *place.sweep_words(), "--json") for _ in range(2)]
    assert [answer(process)["complete"] for process in both] == [True, True]
    assert place.numbers() == undisturbed.numbers()
    assert place.published() == undisturbed.published()


def test_a_step_of_a_lane_that_is_computed_elsewhere_does_not_wait(
    undisturbed: Place, place: Place
) -> None:
    plan = place.plan()
    first = place.start("score", "--plan", plan, "--cell", "wfp8_afp8-small", "--json")
    assert first.stderr is not None
    for line in first.stderr:
        if " load " in line:
            break
    error = place.json("score", "--plan", plan, "--cell", "wint8_aint8-large", code=75)
    assert first.poll() is None
    assert error["what"] == "is being computed by another process"
    assert answer(first)["computed"] is True
    again = place.json("score", "--plan", plan, "--cell", "wint8_aint8-large")
    assert again["computed"] is False
    assert place.numbers() == undisturbed.numbers()


def test_two_plans_that_share_cells_at_once(undisturbed: Place, place: Place) -> None:
    pairs = (PAIRS[:2], PAIRS[1:])
    both = [place.start("sweep", *place.sweep_words(*some), "--json") for some in pairs]
    assert [answer(process)["complete"] for process in both] == [True, True]
    ours, theirs = place.numbers(), undisturbed.numbers()
    assert set(ours) == set(theirs)
    # Under a budget, other grids go through in other waves: sums may round differently.
    for cell, (_, tensors) in ours.items():
        for name, values in tensors.items():
            expected = numpy.array(theirs[cell][1][name])
            numpy.testing.assert_allclose(numpy.array(values), expected, rtol=1e-9, atol=1e-24)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("no right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_while_publishing_is_said_and_the_next_run_completes(
    undisturbed: Place, demo_checkpoint: DemoResult, small_disk: Path
) -> None:
    place = Place(small_disk, demo_checkpoint.directory)
    plan = place.plan()
    for cell in json.loads(Path(plan).read_text())["cells"]:
        place.json("score", "--plan", plan, "--cell", cell["cell"])
    expected = undisturbed.published()
    ballast = small_disk / "ballast"
    seen = set()
    # A disk with room for a part of what is published: less, and then more than the shared script.
    script = len(get_plotlyjs().encode())
    for room in (16 * 1024, script + 400 * 1024):
        _fill(ballast, room)
        error = place.json("publish", "--plan", plan, code=75)
        assert error["error"] == "DiskFull"
        assert error["what"] == "no space left on the disk; nothing was written"
        assert error["where"].startswith(str(small_disk))
        assert error["remedy"].startswith("Free some space")
        written = place.published()
        assert written == {path: expected[path] for path in written}
        seen.add(len(written))
        assert not list(small_disk.rglob("*.tmp"))
        ballast.unlink()
    assert 0 < max(seen) < len(expected)
    assert place.json("publish", "--plan", plan)["complete"] is True
    assert place.published() == expected
    assert place.numbers() == undisturbed.numbers()


def _fill(ballast: Path, room: int) -> None:
    """Fill the disk of ``ballast`` but for ``room`` bytes."""
    disk = os.statvfs(ballast.parent)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - room)


@pytest.mark.parametrize("verb", ["calibrate", "score"])
def test_a_step_whose_result_is_there_imports_nothing_slow(undisturbed: Place, verb: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STEP, verb, undisturbed.plan()],
        env=undisturbed.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["computed"] is False


def test_half_the_memory_gives_the_same_calibration(undisturbed: Place, place: Place) -> None:
    place.environment["QSENS_MEMORY_SHARE"] = "0.5"
    done = place.json("calibrate", "--plan", place.plan(), "--cell", "wfp8_afp8-large")
    assert done["computed"] is True
    found = {}
    for path in place.results.glob(".calibrations/*.safetensors"):
        with safe_open(path, "numpy") as file:
            found[file.metadata()["samples"]] = load_file(path)
    for samples, cell in (("16", "wfp8_afp8-small"), ("512", "wfp8_afp8-large")):
        expected = {
            name.removeprefix("amax.input."): value
            for name, value in undisturbed.numbers()[cell][1].items()
            if name.startswith("amax.input.")
        }
        assert found[samples].keys() == expected.keys()
        for name, value in found[samples].items():
            # A batch of another shape rounds its products another way.
            numpy.testing.assert_allclose(value, expected[name], rtol=1e-5)
