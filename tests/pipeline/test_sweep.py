"""Whole sweeps on the demo checkpoint, through the command line, as people run them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult

REPO = Path(__file__).resolve().parents[2]
PAIRS = "wfp8_afp8,wint8_afp16,wint8_aint8"


class Place:
    """A results root, and the command line run from somewhere else."""

    def __init__(self, root: Path, checkpoint: Path) -> None:
        self.root = root
        self.checkpoint = checkpoint
        self.elsewhere = root / "elsewhere"
        self.elsewhere.mkdir(parents=True)
        self.extra: dict[str, str] = {}

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "QSENS_ROOT": str(REPO),
            "QSENS_RESULTS": str(self.root / "results"),
            "OMP_NUM_THREADS": "1",
            **self.extra,
        }
        return subprocess.run(
            [sys.executable, "-m", "qsens", *words],
            cwd=self.elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=540,
        )

    def json(self, *words: str, code: int = 0) -> Any:
        done = self.run(*words, "--json")
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)

    def model(self) -> str:
        return f"model.path={self.checkpoint}"

    @property
    def analysis(self) -> Path:
        return self.root / "results/models" / self.checkpoint.name / "layer-analysis"


@pytest.fixture(scope="module")
def place(demo_checkpoint: DemoResult, tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("sweep")
    checkpoint = root / "my-model"
    shutil.copytree(demo_checkpoint.directory, checkpoint)
    return Place(root, checkpoint)


@pytest.fixture(scope="module")
def first_night(place: Place) -> Any:
    return place.json("sweep", "demo-text", place.model(), f"quant_pair={PAIRS}")


def test_every_cell_is_published_where_people_look(place: Place, first_night: Any) -> None:
    assert first_night["complete"] is True
    assert first_night["missing"] == []
    assert len(first_night["cells"]) == 6
    expected = {
        "weight-fp8-act-fp8/my-model_autoquant_wfp8_afp8_lm_small/wfp8_afp8_autoquant_lm",
        "weight-fp8-act-fp8/my-model_autoquant_wfp8_afp8_lm_medium/wfp8_afp8_autoquant_lm",
        "weight-int8-act-fp16/my-model_autoquant_wint8_afp16_lm_small/wint8_afp16_autoquant_lm",
        "weight-int8-act-int8/my-model_autoquant_int8_lm_medium/int8_autoquant_lm_default",
    }
    for stem in expected:
        manifest = place.analysis / f"{stem}_quant_manifest.json"
        assert manifest.is_file()
        assert (place.analysis / f"{stem}_autoquant_state.safetensors").is_file()
        for suffix in ("md", "json", "html"):
            assert (manifest.parent / f"per-layer-sensitivity.{suffix}").is_file()
    assert Path(first_night["index"]).is_file()
    assert (place.analysis / "index.html").is_file()


def test_manifest_says_what_was_measured(place: Place, first_night: Any) -> None:
    path = next(c["manifest"] for c in first_night["cells"] if c["cell"] == "wfp8_afp8-medium")
    manifest = json.loads(Path(path).read_text())
    captions = (REPO / "configs/dataset/demo/captions_medium.txt").read_text().splitlines()
    assert manifest["dataset"]["samples_used"] == manifest["dataset"]["samples_scored"] == 128
    assert manifest["dataset"]["tokens"] - manifest["dataset"]["label_tokens"] == len(captions)
    assert manifest["partial"] == []
    assert manifest["engine"] == "fused"
    assert manifest["versions"]["device"]
    rows = manifest["layer_sensitivity"]
    scored = {name: row for name, row in rows.items() if row["status"] == "scored"}
    assert len(scored) == 4 * 4 + 1  # four layers of qkv, o, gate_up, down; and the head
    assert all(row["status"] == "disabled" for name, row in rows.items() if "visual" in name)
    ranking = [entry["importance"] for entry in manifest["sensitivity_ranking"]]
    assert ranking == sorted(ranking)
    most = max(scored.values(), key=lambda row: row["sensitivity"])
    assert most["rank"] == len(rows)
    # All covered weights at 8 bits meet the target of 8 exactly.
    assert manifest["autoquant_state"]["constraints"] == {"effective_bits": 8.0}
    assert manifest["autoquant_state"]["is_satisfied"] is True
    assert manifest["autoquant_state"]["score"] == pytest.approx(
        sum(row["sensitivity"] for row in scored.values())
    )


def test_results_that_are_there_are_not_computed_again(place: Place, first_night: Any) -> None:
    plan = place.root / "plan.json"
    listed = place.json(
        "plan", "demo-text", place.model(), f"quant_pair={PAIRS}", "--out", str(plan)
    )
    assert all(cell["done"] for cell in listed["cells"])
    code = (
        "import sys; from qsens.cli import app; "
        f"app(['score', '--plan', {str(plan)!r}, '--cell', 'wfp8_afp8-small'], "
        "standalone_mode=False); "
        "assert not {'torch', 'transformers', 'modelopt'} & set(sys.modules), 'torch'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    again = place.json("score", "--plan", str(plan), "--cell", "wint8_aint8-medium")
    assert again["computed"] is False
    assert again["status"] == "done"


def test_two_nights_with_a_changed_checkpoint(place: Place, first_night: Any) -> None:
    """Both sweeps stay whole, and the first can be reported again, byte for byte."""
    first = Path(first_night["index"]).parent
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    weights = place.checkpoint / "model.safetensors"
    original = weights.read_bytes()
    changed = bytearray(original)
    changed[-4:] = b"\x00\x00\x00\x00"  # the last weight of the file is now 0
    weights.write_bytes(changed)
    try:
        second = place.json("sweep", "demo-text", place.model(), f"quant_pair={PAIRS}")
    finally:
        weights.write_bytes(original)
    assert second["sweep_id"] != first_night["sweep_id"]
    assert second["complete"] is True
    sweeps = sorted(path.name for path in (place.analysis / "sweeps").iterdir())
    assert sweeps == sorted([first_night["sweep_id"], second["sweep_id"]])
    summary = json.loads((Path(second["index"]).parent / "summary.json").read_text())
    assert summary["previous"] == first_night["sweep_id"]

    shown = Path(second["cells"][0]["manifest"])
    newest = shown.read_bytes()
    for path in first.iterdir():
        if path.name != "plan.json":
            path.unlink()
    place.json("publish", "--plan", str(first / "plan.json"), "--report-only")
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    # The cell directories still show the newest night.
    assert shown.read_bytes() == newest


def test_a_cell_that_cannot_be_computed_fails_alone(
    place: Place, first_night: Any, tmp_path: Path
) -> None:
    """A format that neither the numerics nor ModelOpt know: the rest is published, PARTIAL."""
    pairs = tmp_path / "quant_pair"
    pairs.mkdir()
    (pairs / "wbroken_afp16.yaml").write_text(
        "weight: broken\nactivation: fp16\nformat: BROKEN\neffective_bits: 8\n"
        "weight_quantizer: {num_bits: [7, 7], axis: null}\n"
    )
    place.extra = {"QSENS_CONFIG_DIR": str(tmp_path)}
    try:
        done = place.run(
            "sweep", "demo-text", place.model(), "quant_pair=wbroken_afp16,wfp8_afp8", "--json"
        )
    finally:
        place.extra = {}
    assert done.returncode == 2, done.stderr
    published = json.loads(done.stdout)
    assert published["complete"] is False
    assert {entry["cell"] for entry in published["missing"]} == {
        "wbroken_afp16-small",
        "wbroken_afp16-medium",
    }
    assert all(entry["reason"] for entry in published["missing"])
    folder = Path(published["index"]).parent
    for name in ("summary.md", "index.html"):
        text = (folder / name).read_text()
        assert "PARTIAL" in text
        assert "wbroken_afp16-small" in text


def test_single_goes_to_tmp_and_output_dir_wins(
    place: Place, first_night: Any, tmp_path: Path
) -> None:
    published = place.json("sweep", "single", place.model())
    folder = place.root / "results/tmp" / published["sweep_id"]
    assert (folder / "wfp8_afp8-small/wfp8_afp8_autoquant_lm_quant_manifest.json").is_file()
    one = tmp_path / "one"
    place.json("sweep", "single", place.model(), f"runner.output_dir={one}")
    assert (one / "wfp8_afp8_autoquant_lm_quant_manifest.json").is_file()
    two = tmp_path / "two"
    place.json(
        "sweep",
        "single",
        place.model(),
        f"quant_pair={PAIRS}",
        f"runner.output_dir={two}",
    )
    assert (two / "wint8_aint8-small/int8_autoquant_lm_default_quant_manifest.json").is_file()


def test_report_only_computes_nothing(place: Place, first_night: Any) -> None:
    published = place.json(
        "sweep", "demo-text", place.model(), "quant_pair=wfp8_afp16", "runner.report_only=true"
    )
    assert published["complete"] is False
    assert {entry["reason"] for entry in published["missing"]} == {"not computed"}


def test_report_of_a_directory(place: Place, first_night: Any) -> None:
    directory = Path(first_night["cells"][0]["manifest"]).parent
    before = (directory / "per-layer-sensitivity.md").read_bytes()
    (directory / "per-layer-sensitivity.md").unlink()
    written = place.json("report", str(directory))
    assert str(directory / "per-layer-sensitivity.md") in written["reports"]
    assert (directory / "per-layer-sensitivity.md").read_bytes() == before


def test_errors_are_json_too(place: Place) -> None:
    error = place.json("plan", "demo-text", "model.path=nowhere", code=2)
    assert error["error"] == "UserError"
    assert "nowhere" in error["where"]
    assert "demo-model" in error["remedy"]
    done = place.run("plan", "demo-text", "colour=red")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 2


def test_a_demo_model_that_is_there_costs_no_torch(place: Place) -> None:
    code = (
        "import sys; from qsens.cli import app; "
        f"app(['demo-model', {str(place.checkpoint)!r}], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_doctor_lists_versions(place: Place) -> None:
    found = place.json("doctor")
    assert found["versions"]["torch"].startswith("2.")
    assert found["transformers_has_qwen3_vl"] is True
    assert found["presets"]["nightly"] != "ready"


def test_a_forced_run_computes_again(place: Place, first_night: Any) -> None:
    listed = place.json(
        "plan", "demo-text", place.model(), f"quant_pair={PAIRS}", "runner.force=true"
    )
    assert not any(cell["done"] for cell in listed["cells"])
