"""Families that see, through their own processors: every group's score from pictures.

Those whose processor needs a package that is not installed are skipped.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qsens.config import Roots
from qsens.data.samples import Samples, make_batch, padded_batches
from qsens.engine.candidates import distinct
from qsens.engine.gradient import fisher, scorer
from qsens.engine.kl.measure import diverge
from qsens.engine.memory import Budget
from qsens.engine.scores import silent
from qsens.grid import Plan
from qsens.pipeline.compute import both_engines
from qsens.pipeline.loading import groups_of, load_whole, request_of
from qsens.pipeline.plan import plan_sweep
from qsens.pipeline.sweep import run_sweep
from qsens.results import read_manifest
from qsens.store import Store
from tests.data.seeing_families import FAMILIES, Family, save
from tests.pipeline import seeing
from tests.zoo.reference import Format, Reference

PAIRS = ("wfp8_afp8", "wint8_aint8", "wfp4_afp16")
COUNT = 4
# Whose tower's last layer is not looked at, and gets no gradient.
UNSEEN = {"llava": ("vision_tower.encoder.layers.1.",)}


def plan(family: Family, root: Path, *overrides: str) -> Plan:
    """Plan over pictures of several sizes and shapes."""
    missing = [name for name in family.needs if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"its processor needs {', '.join(missing)}")
    checkpoint = save(family, root / "tiny")
    rows = seeing.samples(root / "images", COUNT, 2)
    (root / "data").mkdir()
    seeing.write_jsonl(root / "data" / "small.jsonl", rows)
    given = {
        "model.path": checkpoint,
        "model.dtype": "float32",
        "dataset.directory": root / "data",
        "dataset.images": root / "images",
        "dataset.files.small": "small.jsonl",
        "dataset.sizes.small": COUNT,
        "dataset.max_pixels": 40_000,
        "coverage": "all_layers",
        "autoquant.batch_size": 2,
        "autoquant.device": "cpu",
    }
    given |= dict(override.split("=", 1) for override in overrides)
    roots = Roots(root=seeing.REPO, results=root / "results", configs=(seeing.REPO / "configs",))
    return plan_sweep("single", [f"{key}={value}" for key, value in given.items()], roots=roots)


@pytest.mark.parametrize("at", range(len(FAMILIES)), ids=[one.model_type for one in FAMILIES])
def test_every_group_equals_modelopt(at: int, tmp_path: Path) -> None:
    """Another pair for each family; all of them would take three times as long."""
    family = FAMILIES[at]
    planned = plan(family, tmp_path, f"quant_pair={PAIRS[at % 3]}")
    (cell,) = planned.cells
    ours, theirs, _ = both_engines(Store(planned), cell, silent)
    if family.model_type == "llama4":  # ModelOpt gives its tower no score: see below
        ours = {name: ours[name] for name in theirs}
        assert ours == pytest.approx(theirs, rel=1e-3, abs=0)
        return
    assert ours.keys() == theirs.keys()
    assert ours == pytest.approx(theirs, rel=1e-3, abs=0)
    unseen = UNSEEN.get(family.model_type, ())
    assert all(score > 0 for name, score in ours.items() if not any(one in name for one in unseen))
    assert any("vision" in name or "visual" in name for name in ours)


def test_llama_4s_tower_equals_plain_autograd(tmp_path: Path) -> None:
    family = next(one for one in FAMILIES if one.model_type == "llama4")
    planned = plan(family, tmp_path, "quant_pair=wint8_aint8")
    (cell,) = planned.cells
    loaded = load_whole(planned, cell, silent)
    model, samples, groups = loaded.model, loaded.samples, groups_of(planned, cell, loaded.model)
    request = request_of(cell)
    candidates = distinct([request])
    for index in range(COUNT):
        single = alone(samples, index)
        batch = make_batch(single, [0])
        inputs = batch.inputs()
        reference = Reference(
            model,
            inputs.pop("input_ids"),
            [group.members for group in groups],
            inputs,
            single.spans[0][0][0],
        )
        amax = {COUNT: {name: value.float() for name, value in reference.amax.items()}}
        expected = reference.gradient(Format(request.weight, request.input))[:, 0]
        found = scorer.score(model, single, groups, candidates, amax).per_sample[:, 0, 0]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
        tower = [at for at, group in enumerate(groups) if group.kind == "vision"]
        assert len(tower) == 12
        assert all(expected[at] > 0 for at in tower)


def alone(samples: Samples, index: int) -> Samples:
    part = slice(index, index + 1)
    return replace(
        samples,
        ids=samples.ids[part],
        truncated=samples.truncated[part],
        spans=samples.spans[part],
        pictures=samples.pictures[part],
    )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_sample_scores_what_it_scores_alone(family: Family, tmp_path: Path) -> None:
    """Rows of a tower go to the sample of their picture, whichever share a batch.

    Inputs stay in 16 bits: one that lies between two integers may be rounded to either.
    """
    planned = plan(family, tmp_path, "quant_pair=wint8_afp16")
    (cell,) = planned.cells
    loaded = load_whole(planned, cell, silent)
    model, samples, groups = loaded.model, loaded.samples, groups_of(planned, cell, loaded.model)
    candidates = distinct([request_of(cell)])
    together = scorer.score(model, samples, groups, candidates, {})
    assert not together.failures.refused
    assert not together.failures.broken
    measured = diverge(model, samples, groups, candidates, {}, boundaries=[]).per_sample
    for index in range(COUNT):
        single = alone(samples, index)
        found = scorer.score(model, single, groups, candidates, {}).per_sample
        expected = together.per_sample[..., index]
        torch.testing.assert_close(found[..., 0], expected, rtol=1e-3, atol=1e-12)
        found = diverge(model, single, groups, candidates, {}, boundaries=[]).per_sample
        torch.testing.assert_close(found[..., 0], measured[..., index], rtol=5e-3, atol=1e-9)
    given = (model, samples, groups, candidates, {})
    budget = Budget(limit=0, max_tokens=1, predicted=0)
    drawn = fisher.estimate(*given, draws=4, seed=0).per_sample
    split = fisher.estimate(*given, draws=4, seed=0, budget=budget).per_sample
    torch.testing.assert_close(split, drawn, rtol=1e-3, atol=1e-12)


def test_pictures_that_share_no_batch_go_apart(tmp_path: Path) -> None:
    """Tiles of LLaVA-OneVision lie in one tensor a picture: so many share a batch, or none do."""
    family = next(one for one in FAMILIES if one.model_type == "llava_onevision")
    planned = plan(family, tmp_path)
    samples = load_whole(planned, planned.cells[0], silent).samples
    tiles = [picture.tensors["pixel_values"].shape[1] for picture in samples.pictures]
    assert len(set(tiles)) > 1
    batches = padded_batches(samples, COUNT, boundaries=[])
    assert sorted(index for batch in batches for index in batch.samples) == list(range(COUNT))
    for batch in batches:
        assert len({tiles[index] for index in batch.samples}) == 1
        pixels = batch.pictures["pixel_values"]
        assert pixels.shape[:2] == (len(batch.samples), tiles[batch.samples[0]])
        patches = [tiles[index] * 16 for index in batch.samples]  # 56 pixels in patches of 14
        assert list(batch.patches) == patches


def test_a_sweep_over_pictures_publishes(tmp_path: Path) -> None:
    family = next(one for one in FAMILIES if one.model_type == "internvl")
    planned = plan(family, tmp_path, "quant_pair=wfp8_afp8,wint8_afp16")
    published, errors = run_sweep(planned)
    assert errors == []
    for entry in published["cells"]:
        manifest = read_manifest(Path(entry["manifest"]))
        assert manifest.dataset is not None
        assert manifest.dataset.modality == "image_text"
        assert manifest.dataset.patches is not None
        assert manifest.dataset.patches % 16 == 0
        statuses = {row.status for row in manifest.layer_sensitivity.values()}
        assert statuses == {"scored"}
