"""Sweeps of Qwen2.5-VL over pictures: windows of attention, sides that are multiples of 28."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qsens.checkpoint.loading import load_tokenizer
from qsens.data.chat import chat_samples, load_processor
from qsens.data.images import PictureReader
from qsens.errors import UserError
from qsens.grid import Plan
from qsens.pipeline.cell import calibrate, score
from qsens.pipeline.verify import verify
from qsens.results import read_manifest
from qsens.schema.manifest import Manifest
from tests.engine import pictures
from tests.pipeline.seeing import SIZES, Place, rows, scores

TOWER = pictures.TOWER["Qwen2.5-VL"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("windows"), "Qwen2.5-VL")


@pytest.fixture(scope="module")
def three_phases(place: Place) -> tuple[Plan, dict[str, Manifest]]:
    plan = place.plan()
    return plan, place.run(plan)


def test_the_preset_publishes_the_tower_at_three_sizes(
    place: Place, three_phases: tuple[Plan, dict[str, Manifest]]
) -> None:
    directory = place.analysis() / "weight-int8-act-int8"
    assert {path.name for path in directory.iterdir()} == {
        f"qwen2_5_vl_3b_autoquant_{kind}_{size}"
        for kind in ("all_layers_int8", "int8_lm")
        for size in SIZES
    }
    _, found = three_phases
    for size in SIZES:
        whole, language = found[f"wint8_aint8-all_layers-{size}"], found[f"wint8_aint8-{size}"]
        tower = rows(whole, True)
        assert len(tower) == TOWER
        assert all(row.status == "scored" and row.sensitivity > 0 for row in tower.values())
        assert {row.kind for row in tower.values()} == {"vision"}
        assert {row.status for row in rows(language, True).values()} == {"disabled"}
        # Of no multiple of the window: 56 pixels, 16 patches.
        assert whole.dataset.patches is not None
        assert whole.dataset.patches > 16 * SIZES[size]
    assert "QuantConv3d" in {entry.module_type for entry in whole.layers.values()}


def test_samples_are_what_the_processor_and_the_template_make(place: Place) -> None:
    plan = place.plan("coverage=all_layers")
    reader = PictureReader.of(plan, plan.config.dataset[0])
    processor = Qwen2VLImageProcessorPil.from_pretrained(place.checkpoint)
    processor.size["longest_edge"] = place.max_pixels
    tokenizer = load_tokenizer(plan.config.model)
    shapes = set()
    for image, caption in place.rows:
        pixels = reader.read(image)
        assert pixels is not None
        shapes.add(pixels.shape[:2])
        assert all(side % 28 == 0 for side in pixels.shape[:2])
        theirs = processor(images=[Image.open(place.root / "images" / image)], return_tensors="pt")
        samples = chat_samples(
            [pixels],
            [caption],
            load_processor(plan.config.model, tokenizer),
            AutoConfig.from_pretrained(place.checkpoint),
            resize=False,
            prompt="Describe this image .",
            longest=512,
            dtype=torch.float32,
        )
        (made,) = samples.pictures
        assert made.tensors["image_grid_thw"].equal(theirs["image_grid_thw"])
        # Ours is rounded to whole colours once, as a picture in a file is.
        torch.testing.assert_close(
            made.tensors["pixel_values"], theirs["pixel_values"], rtol=0, atol=0.03
        )
        shown = pixels.shape[0] * pixels.shape[1] // 28**2
        assert tokenizer.convert_ids_to_tokens(samples.ids[0]) == [
            *["assistant", ".", "user", "<|vision_start|>"],
            *["<|image_pad|>"] * shown,
            *["<|vision_end|>", "Describe", "this", "image", ".", "assistant"],
            *caption.split(),
        ]
        assert samples.labels() == [5]
    assert len(shapes) > 3
    assert any(side % 56 for shape in shapes for side in shape)


def test_both_engines_agree(place: Place) -> None:
    plan = place.plan("coverage=all_layers", "quant_pair=wint8_aint8,wfp4_afp8")
    for pair in ("wint8_aint8", "wfp4_afp8"):
        result = verify(plan, f"{pair}-all_layers-medium")
        assert result["agrees"], result
        assert result["largest"] < 1e-3


def test_a_step_by_step_run_gives_the_same(
    place: Place, three_phases: tuple[Plan, dict[str, Manifest]]
) -> None:
    plan = place.plan("runner.force=true", "dataset.size=small,medium", "coverage=all_layers")
    for cell in plan.cells:
        calibrate(plan, cell.cell)
        manifest = read_manifest(Path(score(plan, cell.cell)["manifest"]))
        for tower in (True, False):
            expected = scores(three_phases[1][cell.cell], tower)
            assert scores(manifest, tower) == pytest.approx(expected, rel=1e-5)


def test_fisher_comes_near_the_true_divergence_of_the_tower(place: Place) -> None:
    given = ("coverage=all_layers", "dataset.size=medium", "quant_pair=wint8_afp16")
    (estimate,) = place.run(
        place.plan(*given, "autoquant.method=fisher", "autoquant.draws=64")
    ).values()
    (truth,) = place.run(place.plan(*given, "autoquant.method=kl_div")).values()
    for tower in (True, False):
        true = scores(truth, tower)
        ratios = [value / true[name] for name, value in scores(estimate, tower).items()]
        assert 0.8 < float(np.median(ratios)) < 1.25
    assert len(rows(truth, True)) == TOWER


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"template": ""}, "is broken: it has no text 'chat_template'"),
        (None, "has no chat template, and the sweep reads pictures"),
    ],
)
def test_a_template_that_is_nowhere_is_refused_at_plan(
    place: Place, tmp_path: Path, held: dict[str, str] | None, said: str
) -> None:
    copy = tmp_path / "mute"
    shutil.copytree(place.checkpoint, copy)
    (copy / "chat_template.json").unlink()
    if held is not None:
        (copy / "chat_template.json").write_text(json.dumps(held))
    with pytest.raises(UserError, match=said):
        place.plan(f"model.path={copy}", "coverage=all_layers", "dataset.size=small")
    assert place.plan(f"model.path={copy}", "coverage=lm_only", "dataset.size=small").cells


def test_a_processor_that_fails_is_said(place: Place, tmp_path: Path) -> None:
    copy = tmp_path / "astray"
    shutil.copytree(place.checkpoint, copy)
    file = copy / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"patch_size": 16}))
    with pytest.raises(UserError, match=r"has patch_size 16, and its config\.json patch_size 14"):
        place.plan(f"model.path={copy}", "coverage=all_layers", "dataset.size=small")
    file.write_text(json.dumps(settings | {"image_mean": [0.5]}))
    plan = place.plan(f"model.path={copy}", "coverage=all_layers", "dataset.size=small")
    with pytest.raises(UserError, match="its image processor fails: mean must have 3 elements"):
        score(plan, "wint8_aint8-all_layers-small")
