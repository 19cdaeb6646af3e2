"""Recipes for llm-compressor know the shapes of modules, from the headers of the checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from qsens.config import PairConfig
from qsens.errors import UserError
from qsens.pipeline.packing import pack
from qsens.pipeline.recipe import write_recipe
from qsens.pipeline.shapes import module_shapes
from qsens.schema.summary import Row
from tests.pipeline.seeing import Place
from tests.pipeline.test_weight_names import before, renamed


def row(layer: str, weights: int, kind: str = "down", *members: str, status: str = "scored") -> Row:
    return Row(
        layer=layer,
        members=members or (layer,),
        kind=kind,
        depth=0,
        status=status,
        num_bits=8.0,
        sensitivity=1.0,
        sensitivity_per_token=1.0,
        size_cost=weights / 2,
        position=1,
        share=1.0,
    )


def saved(directory: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("tower", "decoder"),
    [
        ("model.visual", "model.language_model"),
        ("visual", "model"),
        ("visual", "language_model.model"),
    ],
)
def test_files_may_name_weights_as_modules_were_once_named(
    tmp_path: Path, tower: str, decoder: str
) -> None:
    checkpoint = saved(
        tmp_path / "one",
        {
            f"{tower}.patch_embed.proj.weight": (8, 3, 2, 4, 4),
            f"{tower}.blocks.0.mlp.linear_fc2.weight": (6, 10),
            f"{decoder}.embed_tokens.weight": (50, 12),
            f"{decoder}.layers.0.self_attn.q_proj.weight": (4, 12),
            f"{decoder}.layers.0.self_attn.q_proj.bias": (4,),
            f"{decoder}.layers.0.self_attn.k_proj.weight": (2, 12),
        },
    )
    q, k = (f"model.language_model.layers.0.self_attn.{leaf}_proj" for leaf in "qk")
    rows = [
        row("model.visual.patch_embed.proj", 8 * 3 * 2 * 16, "vision"),
        row("model.visual.blocks.0.mlp.linear_fc2", 60, "vision"),
        row(q, 72, "qkv", q, k),
        row("lm_head", 600, "head"),
    ]
    assert module_shapes(checkpoint, rows) == {
        "model.visual.patch_embed.proj": {f"{tower}.patch_embed.proj.weight": (8, 3, 2, 4, 4)},
        "model.visual.blocks.0.mlp.linear_fc2": {
            f"{tower}.blocks.0.mlp.linear_fc2.weight": (6, 10)
        },
        q: {f"{decoder}.layers.0.self_attn.q_proj.weight": (4, 12)},
        k: {f"{decoder}.layers.0.self_attn.k_proj.weight": (2, 12)},
        # Tied: it has no weight of its own in the files.
        "lm_head": {f"{decoder}.embed_tokens.weight": (50, 12)},
    }


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_matrices_however_they_lie(tmp_path: Path, transposed: bool) -> None:
    first, second = (3, 8, 6), (3, 6, 4)  # gate and up, 2 x 4 channels of 6; down, 6 of 4
    if transposed:
        first, second = (3, 6, 8), (3, 4, 6)
    stem = "model.layers.0.mlp"
    fused = {f"{stem}.experts.gate_up_proj": first, f"{stem}.experts.down_proj": second}
    apart = {
        f"{stem}.experts.{at}.{leaf}_proj.weight": (6, 4) if leaf == "down" else (4, 6)
        for at in range(3)
        for leaf in ("gate", "up", "down")
    }
    experts = row(f"{stem}.experts", 3 * (48 + 24), "experts")
    (found,) = module_shapes(saved(tmp_path / "fused", fused), [experts]).values()
    assert found == {f"{stem}.experts.gate_up_proj": (8, 6), f"{stem}.experts.down_proj": (6, 4)}
    (found,) = module_shapes(saved(tmp_path / "apart", apart), [experts]).values()
    assert set(found.values()) == {(6, 4), (4, 6)}
    assert len(found) == 9


PAIR = PairConfig(
    name="wblocks_afp16",
    weight="blocks",
    activation="fp16",
    format="BLOCKS",
    weight_quantizer={"num_bits": 4, "block_sizes": {"-1": 32, "type": "static"}},
    effective_bits=8.0,
)


def test_a_format_is_no_option_for_groups_with_a_member_that_it_does_not_fit(
    tmp_path: Path,
) -> None:
    names = {"fits": (6, 64), "narrow": (6, 48), "beside": (2, 64), "conv": (4, 2, 3, 3)}
    stored = {f"model.layers.0.{name}.weight": shape for name, shape in names.items()}
    stored["model.layers.0.outside.weight"] = (6, 48)
    fits, narrow, beside, conv, outside = (f"model.layers.0.{n}" for n in (*names, "outside"))
    rows = [
        row(fits, 384),
        row(narrow, 288 + 128, "gate_up", narrow, beside),
        row(conv, 72, "vision"),
        row(outside, 288, status="disabled"),
    ]
    found = pack({"blocks": rows}, {"blocks": PAIR}, saved(tmp_path / "one", stored), packs=True)
    assert found.refused == {"blocks": {narrow}}
    (entry,) = found.left_out
    assert entry.words == f"blocks: 48 columns do not divide into blocks of 32: {narrow}"
    # What the tool leaves as it is, is outside like what the coverage leaves out.
    assert [each.status for each in found.rows["blocks"]] == [
        *["scored", "scored"],
        *["disabled", "disabled"],
    ]
    (notice,) = found.notices
    assert notice.endswith(f"no bits count them: {conv}")


def test_what_cannot_be_checked_is_said_and_refuses_nothing(tmp_path: Path) -> None:
    rows = {"blocks": [row("model.layers.0.a", 288)]}
    pairs = {"blocks": PAIR}
    gone = pack(rows, pairs, tmp_path / "gone", packs=True)
    other = pack(
        rows, pairs, saved(tmp_path / "other", {"model.layers.0.a.weight": (6, 40)}), packs=True
    )
    for found in (gone, other):
        assert (found.refused, found.left_out) == ({}, ())
        assert found.rows == {"blocks": tuple(rows["blocks"])}
        (notice,) = found.notices
        assert "was not checked" in notice
    assert str(tmp_path / "gone") in gone.notices[0]
    assert "first model.layers.0.a" in other.notices[0]


@pytest.fixture(scope="module", params=["today", "before"])
def place(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A sweep of a model that sees, in whose text MLPs 96 columns do not divide by 64."""
    made = Place(tmp_path_factory.mktemp("packing"))
    if request.param == "before":
        older = renamed(made.checkpoint, made.root / "before", before)
        shutil.rmtree(made.checkpoint)
        made.checkpoint = older
    made.run(
        made.plan(
            "quant_pair=wint8_afp16,wint8_afp8",
            "quant_granularity=default,w_group64",
            "coverage=all_layers",
            "dataset.size=small",
        )
    )
    return made


def recipe_of(made: Place, **given: Any) -> dict[str, Any]:
    (summary,) = made.analysis().glob("sweeps/*/summary.json")
    return write_recipe(str(summary.parent), **{"bits": 10.0, "target": "llm-compressor"} | given)


def test_a_sweep_gives_a_recipe_that_the_tool_takes(place: Place) -> None:
    compressed = pytest.importorskip("compressed_tensors.quantization")
    from transformers import AutoModelForImageTextToText

    found = recipe_of(place)
    model = AutoModelForImageTextToText.from_pretrained(place.checkpoint)
    narrow = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.in_features % 64
    }
    assert any(name.endswith("mlp.down_proj") for name in narrow)
    left_out = {
        name
        for each in found["left_out"]
        if each["format"] == "wint8_afp16-w_group64"
        for name in each["modules"]
    }
    assert left_out == narrow
    (stage,) = yaml.safe_load(found["recipe"]).values()
    groups = stage["quantization_modifiers"]["QuantizationModifier"]["config_groups"]
    for group in groups.values():
        if group["weights"]["strategy"] == "group":
            assert not set(group["targets"]) & narrow
    # The head of its comment says so too, and what stays outside.
    assert "columns do not divide into blocks of 64" in found["recipe"]
    assert any("model.visual.patch_embed.proj" in notice for notice in found["notices"])
    # Of what servers read wrongly, nothing is chosen.
    wrong = [each for each in found["left_out"] if each["format"].startswith("wint8_afp8")]
    assert len(wrong) == 2
    assert all("bits, not types" in each["reason"] for each in wrong)
    config = stage["quantization_modifiers"]["QuantizationModifier"]
    compressed.apply_quantization_config(
        model, compressed.QuantizationConfig.model_validate(config)
    )
    chosen = {name for group in groups.values() for name in group["targets"]}
    applied = {
        name
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    assert applied == chosen


def test_the_other_targets_take_every_shape(place: Place) -> None:
    for target in ("modelopt", "json"):
        found = recipe_of(place, target=target)
        assert found["left_out"] == []
        assert not any("columns" in notice for notice in found["notices"])


def test_pairs_that_are_served_wrongly_alone_are_refused(place: Place) -> None:
    with pytest.raises(UserError, match="bits, not types"):
        recipe_of(place, pairs=["wint8_afp8"])


def test_a_checkpoint_that_is_gone_breaks_no_recipe(place: Place) -> None:
    hidden = place.checkpoint.with_name("hidden")
    place.checkpoint.rename(hidden)
    try:
        found = recipe_of(place)
    finally:
        hidden.rename(place.checkpoint)
    assert any(str(place.checkpoint) in notice for notice in found["notices"])
    assert json.dumps(found)
