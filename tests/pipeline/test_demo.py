"""The demo checkpoint with its drawings, swept from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qsens.results import read_manifest
from qsens.schema.manifest import Manifest

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult

SIZES = {"small": 16, "medium": 128, "large": 512}
Cells = dict[str, tuple[Path, Manifest]]


@pytest.fixture(scope="module")
def three_phases(demo_checkpoint: DemoResult, tmp_path_factory: pytest.TempPathFactory) -> Cells:
    """Directory and manifest of each cell that ``int8-3phase`` publishes."""
    root = tmp_path_factory.mktemp("demo")
    words = [
        "model=tiny_qwen3_vl",
        f"model.path={demo_checkpoint.directory}",
        "model.name=tiny_qwen3_vl",
        "dataset=demo_drawings",
        "autoquant.device=cpu",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "qsens", "sweep", "int8-3phase", *words, "--json"],
        cwd=root,
        env=os.environ | {"QSENS_RESULTS": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    published: dict[str, Any] = json.loads(done.stdout)
    assert published["complete"], published
    paths = {cell["cell"]: Path(cell["manifest"]) for cell in published["cells"]}
    return {cell: (path.parent, read_manifest(path)) for cell, path in paths.items()}


def scores(manifest: Manifest) -> dict[str, float]:
    """Return the sensitivity of each group that is scored."""
    return {
        name: row.sensitivity
        for name, row in manifest.layer_sensitivity.items()
        if row.status == "scored" and row.sensitivity is not None
    }


def test_three_phases_publish_six_directories(three_phases: Cells) -> None:
    assert {cell: path.name for cell, (path, _) in three_phases.items()} == {
        f"wint8_aint8{kind}-{size}": f"tiny_qwen3_vl_autoquant_{name}_{size}"
        for kind, name in (("", "int8_lm"), ("-all_layers", "all_layers_int8"))
        for size in SIZES
    }
    (above,) = {path.parent for path, _ in three_phases.values()}
    assert above.parts[-4:] == (
        "models",
        "tiny_qwen3_vl",
        "layer-analysis",
        "weight-int8-act-int8",
    )
    for cell, (_, manifest) in three_phases.items():
        assert manifest.partial == []
        assert manifest.dataset.samples_used == SIZES[cell.rpartition("-")[2]]
        assert manifest.dataset.skipped == 0


@pytest.mark.parametrize("size", SIZES)
def test_rows_say_what_they_were_read_from(three_phases: Cells, size: str) -> None:
    text, seen = three_phases[f"wint8_aint8-{size}"], three_phases[f"wint8_aint8-all_layers-{size}"]
    language = scores(text[1])
    assert len(language) == 4 * 4 + 1
    whole = scores(seen[1])
    tower = {name for name in whole if "visual" in name}
    assert whole.keys() - tower == language.keys()
    assert len(tower) == 1 + 2 * 4 + 2 * 2
    assert all(abs(whole[name] / language[name] - 1) > 1e-3 for name in language)
    said = "pictures with their captions (image_text)"
    for (path, manifest), modality, words in (
        (text, "text", "captions alone (text)"),
        (seen, "image_text", said),
    ):
        assert manifest.dataset.modality == modality
        assert words in (path / "per-layer-sensitivity.md").read_text(encoding="utf-8")
        assert words in (path / "per-layer-sensitivity.html").read_text(encoding="utf-8")


def test_the_trained_tower_matters(three_phases: Cells) -> None:
    """Random weights would leave the answer, and so every score, to the language model."""
    whole = scores(three_phases["wint8_aint8-all_layers-large"][1])
    share = sum(score for name, score in whole.items() if "visual" in name) / sum(whole.values())
    assert 0.05 < share < 0.95
