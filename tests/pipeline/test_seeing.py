"""Sweeps over pictures with captions, from files to what is published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qsens.data.chat import chat_samples, load_processor
from qsens.errors import QsensError, UserError
from qsens.grid import Plan
from qsens.pipeline.audit import audit
from qsens.pipeline.cell import calibrate, score
from qsens.pipeline.recipe import write_recipe
from qsens.pipeline.sweep import run_sweep
from qsens.pipeline.verify import verify
from qsens.results import read_manifest
from qsens.schema.manifest import Manifest
from qsens.store import Store
from qsens.tools.prune import prune
from tests.checkpoint import tiny_families
from tests.engine import pictures
from tests.pipeline import seeing
from tests.pipeline.seeing import MAX_PIXELS, SIZES, Place, rows, scores


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def three_phases(place: Place) -> tuple[Plan, dict[str, Manifest]]:
    plan = place.plan()
    return plan, place.run(plan)


def test_the_preset_publishes_its_six_directories(
    place: Place, three_phases: tuple[Plan, dict[str, Manifest]]
) -> None:
    directory = place.analysis() / "weight-int8-act-int8"
    assert {path.name for path in directory.iterdir()} == {
        f"qwen3_vl_4b_autoquant_{kind}_{size}"
        for kind in ("all_layers_int8", "int8_lm")
        for size in SIZES
    }
    plan, _ = three_phases
    assert {cell.cell for cell in plan.cells} == {
        f"wint8_aint8{coverage}-{size}" for coverage in ("", "-all_layers") for size in SIZES
    }


def test_fp8_all_layers_publishes_its_three_directories(tmp_path: Path) -> None:
    place = Place(tmp_path)
    plan = place.plan(preset="fp8-all-layers")
    found = place.run(plan)
    assert list(found) == [f"wfp8_afp8-all_layers-{size}" for size in SIZES]
    directory = place.analysis() / "weight-fp8-act-fp8"
    assert {path.name for path in directory.iterdir()} == {
        f"qwen3_vl_4b_autoquant_all_layers_fp8_{size}" for size in SIZES
    }
    for size in SIZES:
        run = directory / f"qwen3_vl_4b_autoquant_all_layers_fp8_{size}"
        assert (run / "fp8_autoquant_all_layers_quant_manifest.json").is_file()
        tower = scores(found[f"wfp8_afp8-all_layers-{size}"], True)
        assert len(tower) == pictures.TOWER["Qwen3-VL"]
        assert all(value > 0 for value in tower.values())


def test_all_layers_scores_the_tower_and_lm_only_does_not(
    three_phases: tuple[Plan, dict[str, Manifest]],
) -> None:
    _, found = three_phases
    whole, language = found["wint8_aint8-all_layers-large"], found["wint8_aint8-large"]
    tower = rows(whole, True)
    assert len(tower) == 1 + 3 * 4 + 2 + 2 * 2  # patches, three layers, merger, two for deepstack
    assert all(row.status == "scored" and row.sensitivity > 0 for row in tower.values())
    assert all(row.kind == "vision" for row in tower.values())
    assert whole.layers["model.visual.patch_embed.proj"].module_type == "QuantConv3d"
    assert {row.status for row in rows(language, True).values()} == {"disabled"}
    assert (whole.scheme.coverage_mode, language.scheme.coverage_mode) == ("all_layers", "lm_only")
    assert whole.scheme.coverage_fraction == language.scheme.coverage_fraction == 1.0
    assert whole.partial == language.partial == []


def test_rows_from_pictures_differ_from_those_of_text_and_reports_say_which(
    place: Place, three_phases: tuple[Plan, dict[str, Manifest]]
) -> None:
    plan, found = three_phases
    whole, language = found["wint8_aint8-all_layers-small"], found["wint8_aint8-small"]
    for name, value in scores(whole).items():
        assert value != pytest.approx(scores(language)[name], rel=1e-4)
    assert (whole.dataset.modality, language.dataset.modality) == ("image_text", "text")
    assert whole.dataset.label_tokens == SIZES["small"] * 5  # "a red square on green"
    assert language.dataset.label_tokens == SIZES["small"] * 4
    store = Store(plan)
    said = {
        cell.cell: (store.cell_dir(cell) / "per-layer-sensitivity.md").read_text("utf-8")
        for cell in plan.cells
    }
    assert "captions alone (text)" in said["wint8_aint8-small"].replace("\\", "")
    pictures_said = "pictures with their captions (image_text)"
    assert pictures_said in said["wint8_aint8-all_layers-small"].replace("\\", "")
    for name in ("summary.md", "index.html"):
        text = (store.sweep_dir() / name).read_text("utf-8").replace("\\", "")
        assert "lm_only: captions alone (text)" in text
        assert f"all_layers: {pictures_said}" in text
        assert "wint8_aint8 all_layers" in text


def test_both_engines_agree_on_pictures_from_files(place: Place) -> None:
    plan = place.plan("coverage=all_layers", "dataset.size=small,medium")
    result = verify(plan, "wint8_aint8-all_layers-medium")
    assert result["agrees"], result
    assert result["largest"] < 1e-3
    reference = place.run(
        place.plan("coverage=all_layers", "dataset.size=small", "autoquant.engine=modelopt")
    )["wint8_aint8-all_layers-small"]
    fused = place.run(place.plan("coverage=all_layers", "dataset.size=small"))
    for tower in (True, False):
        ours = scores(fused["wint8_aint8-all_layers-small"], tower)
        assert scores(reference, tower) == pytest.approx(ours, rel=1e-3)


def test_the_language_model_alone_can_read_pictures(
    place: Place, three_phases: tuple[Plan, dict[str, Manifest]]
) -> None:
    plan = place.plan("coverage=lm_only", "dataset.modality=image_text", "dataset.size=small")
    (cell,) = plan.cells
    assert cell.cell == "wint8_aint8-image_text-small"
    assert cell.run_dir == "qwen3_vl_4b_autoquant_int8_lm_image_text_small"
    alone = place.run(plan)[cell.cell]
    together = three_phases[1]["wint8_aint8-all_layers-small"]
    assert scores(alone) == pytest.approx(scores(together), rel=1e-5)
    assert {row.status for row in rows(alone, True).values()} == {"disabled"}
    # Side by side in one pass, its numbers are the same, and its files hold nothing of the tower.
    plan = place.plan("dataset.modality=image_text", "dataset.size=small", "runner.force=true")
    both = place.run(plan)
    assert scores(both[cell.cell]) == pytest.approx(scores(alone), rel=1e-5)
    from safetensors import safe_open

    with safe_open(Store(plan).state(plan.cell(cell.cell)), "numpy") as file:
        assert not any("visual" in name for name in file.keys())  # noqa: SIM118
        groups = file.metadata()["groups"].split("\n")
        assert file.get_tensor("per_sample").shape == (len(groups), SIZES["small"])
    assert not any("visual" in name for name in groups)


@pytest.mark.parametrize("allowed", [0.02, 0.3])
def test_skipped_pictures_leave_the_numbers_of_the_others(place: Place, allowed: float) -> None:
    named = [*place.rows]
    named[1] = ("gone.png", named[1][1])
    Image.new("RGB", (32, 7000)).save(place.root / "images/narrow.png")
    named[9] = ("narrow.png", named[9][1])
    data = place.data(named, SIZES, "some_bad")
    plan = place.plan("coverage=all_layers", f"dataset.max_skipped={allowed}", data=data)
    partial = allowed < 0.25
    sizes = {size: f"of size '{size}' are skipped" for size in SIZES}
    for size, words in sizes.items():
        (said,) = [notice for notice in plan.notices if words in notice]
        assert ("PARTIAL" in said) == partial
        assert "sample 2, 'gone.png' is missing" in said
        assert ("'narrow.png' is too narrow" in said) == (size == "large")
    found = place.run(plan)
    kept = [row for at, row in enumerate(place.rows) if at not in (1, 9)]
    counts = {"small": 3, "medium": 7, "large": 10}
    clean_data = place.data(kept, counts, "all_good")
    clean = place.run(place.plan("coverage=all_layers", data=clean_data, sizes=counts))
    for cell, manifest in found.items():
        size = cell.rpartition("-")[2]
        assert manifest.dataset.samples_used == counts[size]
        assert manifest.dataset.skipped == SIZES[size] - counts[size]
        assert bool(manifest.partial) == partial
        assert any("'gone.png' is missing" in notice for notice in manifest.notices)
        for tower in (True, False):
            expected = scores(clean[cell], tower)
            assert scores(manifest, tower) == pytest.approx(expected, rel=1e-5)


def test_digests_follow_what_the_model_sees(place: Place) -> None:
    images = place.root / "other_images"
    shutil.copytree(place.root / "images", images)

    def digests(*overrides: str) -> dict[str, str]:
        plan = place.plan(f"dataset.images={images}", *overrides)
        return {cell.cell: cell.digest for cell in plan.cells}

    before = digests()
    assert before == {cell.cell: cell.digest for cell in place.plan().cells}
    changed = digests("dataset.prompt=Describe.")
    pixels = digests("dataset.max_pixels=1024")
    with (images / place.rows[6][0]).open("ab") as file:
        file.write(b"more")
    bytes_changed = digests()
    for cell, digest in before.items():
        takes_images = "all_layers" in cell
        assert (changed[cell] != digest) == takes_images
        assert (pixels[cell] != digest) == takes_images
        # The seventh picture is none of the small size.
        assert (bytes_changed[cell] != digest) == (takes_images and not cell.endswith("small"))


def test_pictures_that_changed_since_the_plan_are_refused(place: Place) -> None:
    images = place.root / "late_images"
    shutil.copytree(place.root / "images", images)
    plan = place.plan(f"dataset.images={images}", "dataset.size=small", "runner.force=true")
    (images / place.rows[0][0]).unlink()
    with pytest.raises(UserError, match="are not those of the plan"):
        score(plan, "wint8_aint8-all_layers-small")


def test_a_modality_that_fails_leaves_the_other(place: Place) -> None:
    plan = place.plan(
        "dataset.size=small", "dataset.calib_seq_len=14", f"dataset.prompt={'this image . ' * 4}"
    )
    published, errors = run_sweep(plan)
    assert [entry["status"] for entry in published["cells"]] == ["missing", "done"]
    (error,) = errors
    assert isinstance(error, QsensError)
    assert "dataset.calib_seq_len = 14, dataset.max_pixels" in str(error)


def test_a_caption_that_shows_a_picture_of_its_own_is_refused(place: Place) -> None:
    named = [*place.rows[:3], (place.rows[3][0], "a red <|image_pad|> on green")]
    data = place.data(named, {"small": 4}, "shows")
    plan = place.plan("coverage=all_layers", "dataset.size=small", data=data)
    with pytest.raises(UserError, match="holds the token that stands for a picture") as caught:
        score(plan, "wint8_aint8-all_layers-small")
    assert "caption 4" in caught.value.where


def test_what_cannot_be_read_is_refused_before_any_work(place: Place) -> None:
    with pytest.raises(UserError, match=r"names none; choose a data set of \.jsonl"):
        place.plan("dataset.files.small=small.txt")
    with pytest.raises(UserError, match=r"a picture takes 9 tokens") as caught:
        place.plan("dataset.calib_seq_len=6")
    assert "dataset.calib_seq_len = 6, dataset.max_pixels = 2304" in str(caught.value)
    caption_file = place.root / "data/small.jsonl"
    with pytest.raises(UserError, match=r"small\.jsonl is a file, and results go below it"):
        place.plan(f"runner.output_dir={caption_file}/below")
    blind = place.root / "blind"
    shutil.copytree(place.checkpoint, blind)
    (blind / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="has no image processor"):
        place.plan(f"model.path={blind}")
    language = place.plan(f"model.path={blind}", "coverage=lm_only")
    assert language.cells[0].sets[0].samples.pictures is None


@pytest.mark.parametrize(
    "given", [("coverage=all_layers",), ("coverage=lm_only", "dataset.modality=image_text")]
)
def test_pictures_for_a_blind_model_are_refused_before_any_work(
    place: Place, tmp_path: Path, given: tuple[str, ...]
) -> None:
    blind = tiny_families.save(tiny_families.configuration("Llama", tied=True), tmp_path / "llama")
    with pytest.raises(UserError) as caught:
        place.plan(f"model.path={blind}", *given)
    assert "model type 'llama' cannot be given pictures: it has no vision tower" in (
        caught.value.what
    )
    assert "coverage=lm_only with dataset.modality=text" in caught.value.remedy
    assert place.plan(f"model.path={blind}", "coverage=lm_only").cells


def test_larger_sizes_begin_with_the_pictures_of_smaller_ones(place: Place) -> None:
    data = place.data(place.rows, SIZES, "not_nested")
    mixed = [place.rows[0], place.rows[2], place.rows[1], place.rows[3]]
    same_captions = [(image, place.rows[at][1]) for at, (image, _) in enumerate(mixed)]
    seeing.write_jsonl(data / "small.jsonl", same_captions)
    with pytest.raises(UserError, match=r"not the head of medium\.jsonl: picture 2 differs"):
        place.plan(data=data)
    assert place.plan("coverage=lm_only", data=data).cells


def test_the_older_data_sets_load(
    place: Place, three_phases: tuple[Plan, dict[str, Manifest]]
) -> None:
    data = place.root / "sqlite"
    data.mkdir()
    splits = {size: place.rows[:count] for size, count in SIZES.items()}
    seeing.write_sqlite(data / "samples.sqlite", splits)
    files = [f"dataset.files.{size}=samples.sqlite" for size in SIZES]
    plan = place.plan("coverage=all_layers", "dataset.size=small,medium", *files, data=data)
    found = place.run(plan)
    for cell, manifest in found.items():
        expected = three_phases[1][cell]
        assert scores(manifest, True) == pytest.approx(scores(expected, True), rel=1e-5)
        assert manifest.dataset.pictures_digest == expected.dataset.pictures_digest


def test_a_step_by_step_run_gives_the_same(
    place: Place, three_phases: tuple[Plan, dict[str, Manifest]]
) -> None:
    plan = place.plan("runner.force=true", "dataset.size=small,medium")
    for cell in plan.cells:
        calibrate(plan, cell.cell)
        done = score(plan, cell.cell)
        manifest = read_manifest(Path(done["manifest"]))
        for tower in (cell.coverage == "all_layers", False):
            expected = scores(three_phases[1][cell.cell], tower)
            assert scores(manifest, tower) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", ["fisher", "kl_div"])
def test_other_methods_count_the_tokens_of_captions(place: Place, method: str) -> None:
    plan = place.plan(f"autoquant.method={method}", "coverage=all_layers", "dataset.size=small")
    (manifest,) = place.run(plan).values()
    labels = SIZES["small"] * 5
    for row in manifest.layer_sensitivity.values():
        assert row.sensitivity_per_token == pytest.approx(row.sensitivity / labels, rel=1e-6)
    summary = json.loads((Store(plan).sweep_dir() / "summary.json").read_text("utf-8"))
    row = summary["cells"][0]["rows"][0]
    low, high = row["interval"]
    assert low <= row["sensitivity_per_token"] <= high


def test_an_audit_measures_the_tower_on_pictures(place: Place) -> None:
    plan = place.plan("autoquant.method=fisher", "autoquant.draws=64", "dataset.size=small")
    place.run(plan)
    found = {entry["cell"]: entry for entry in audit(plan, full=True)["audits"]}
    assert set(found) == {cell.cell for cell in plan.cells}
    points = found["wint8_aint8-all_layers-small"]["points"]
    assert sum("visual" in point["layer"] for point in points) == 1 + 3 * 4 + 2 + 2 * 2
    assert not any("visual" in p["layer"] for p in found["wint8_aint8-small"]["points"])
    truths = place.run(place.plan("autoquant.method=kl_div", "dataset.size=small"))
    for cell, entry in found.items():
        rows_of = truths[cell].layer_sensitivity
        for point in entry["points"]:
            truth = rows_of[f"{point['layer']}.quant_recipe"].sensitivity_per_token
            assert point["truth"] == pytest.approx(truth, rel=1e-3, abs=1e-12)


def test_recipes_take_the_widest_coverage(
    place: Place, three_phases: tuple[Plan, dict[str, Manifest]]
) -> None:
    where = str(Store(three_phases[0]).sweep_dir())
    wide = write_recipe(where, bits=12, target="json", roots=place.roots)
    assert any("all_layers are used" in notice for notice in wide["notices"])
    found = json.loads(wide["recipe"])
    members = {name for choice in found["choices"] for name in choice["members"]}
    assert "model.visual.patch_embed.proj" in members
    narrow = write_recipe(where, bits=12, target="json", coverage="lm_only", roots=place.roots)
    found = json.loads(narrow["recipe"])
    assert "model.visual.patch_embed.proj" in found["outside"]
    made = write_recipe(where, bits=8, target="modelopt", roots=place.roots)
    assert "model.visual.patch_embed.proj.weight_quantizer" in made["recipe"]
    # ModelOpt's presets leave these at 16 bits: the recipe quantizes them, and says so.
    assert [notice for notice in made["notices"] if "presets leave at 16 bits" in notice] == [
        "1 quantized module matches *lm_head*, which ModelOpt's presets leave at 16 bits: check "
        "that your runtime loads it, or say --keep '*lm_head*'",
        "19 quantized modules match *visual*, which ModelOpt's presets leave at 16 bits: check "
        "that your runtime loads them, or say --keep '*visual*'",
    ]
    import modelopt.torch.quantization as mtq
    import yaml

    model = pictures.model()
    ids = torch.arange(8)[None, :]
    mtq.quantize(model, yaml.safe_load(made["recipe"]), lambda model: model(input_ids=ids))
    enabled = {
        name: module.weight_quantizer.is_enabled
        for name, module in model.named_modules()
        if hasattr(module, "weight_quantizer") and "embed_tokens" not in name
    }
    # All but the embedding of positions, which is no linear module.
    assert {name for name, on in enabled.items() if not on} <= {"model.visual.pos_embed"}
    assert sum(enabled.values()) == 3 * 7 + 1 + 19
    kept = write_recipe(
        where, bits=13, target="modelopt", keep=["*visual*", "*lm_head*"], roots=place.roots
    )
    assert "visual" not in yaml.safe_dump(yaml.safe_load(kept["recipe"]))
    assert not any("presets leave at 16 bits" in notice for notice in kept["notices"])


def test_samples_are_what_the_processor_and_the_template_make(place: Place) -> None:
    config = place.plan().config
    image, caption = place.rows[2]
    picture = Image.open(place.root / "images" / image)
    processor = Qwen2VLImageProcessorPil.from_pretrained(place.checkpoint)
    processor.size["longest_edge"] = MAX_PIXELS
    theirs = processor(images=[picture], return_tensors="pt")
    from qsens.data.images import PictureReader

    plan = place.plan()
    pixels = PictureReader.of(plan, plan.config.dataset[0]).read(image)
    assert pixels is not None
    tokenizer = AutoTokenizer.from_pretrained(place.checkpoint)
    samples = chat_samples(
        [pixels],
        [caption],
        load_processor(config.model, tokenizer),
        AutoConfig.from_pretrained(place.checkpoint),
        resize=False,
        prompt="Describe this image .",
        longest=64,
        dtype=torch.float32,
    )
    (made,) = samples.pictures
    assert made.tensors["image_grid_thw"].equal(theirs["image_grid_thw"])
    torch.testing.assert_close(
        made.tensors["pixel_values"], theirs["pixel_values"], rtol=0, atol=0.02
    )
    shown = made.patches // 4
    words = tokenizer.convert_ids_to_tokens(samples.ids[0])
    assert words == [
        "user",
        "<|vision_start|>",
        *["<|image_pad|>"] * shown,
        "<|vision_end|>",
        *["Describe", "this", "image", "."],
        "assistant",
        *caption.split(),
    ]
    ((span,),) = samples.spans
    assert words[slice(*span)] == caption.split()
    assert samples.labels() == [5]


def test_old_decoded_pictures_are_pruned_and_made_again(tmp_path: Path) -> None:
    import os

    place = Place(tmp_path)
    plan = place.plan("coverage=all_layers", "dataset.size=small")
    cache = place.root / "results/.pictures"
    kept = sorted(cache.iterdir())
    assert len(kept) == SIZES["small"]
    for path in kept[1:]:
        os.utime(path, (0, 0))
    pruned = prune(place.root / "results", keep_sweeps=1, keep_days=1)
    assert pruned.files == [str(path) for path in kept[1:]]
    assert sorted(cache.iterdir()) == kept[:1]
    assert place.run(plan)
    assert sorted(cache.iterdir()) == kept
