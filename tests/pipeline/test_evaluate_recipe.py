"""What a recipe costs on pictures that the sweep did not use, against a calculation by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from qsens.checkpoint.loading import load_model, resolve_device
from qsens.config import load_sweep
from qsens.errors import UserError
from qsens.grid import Plan
from qsens.pipeline.evaluate_recipe import held_out
from qsens.pipeline.recipe import write_recipe
from qsens.store import Store
from tests.engine import pictures
from tests.pipeline import seeing
from tests.pipeline.seeing import Place

USED = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("check"))


@pytest.fixture(scope="module")
def swept(place: Place) -> Plan:
    sizes = {"small": USED, "medium": 6, "large": len(place.rows)}
    data = place.data(place.rows, sizes, name="split")
    plan = place.plan(
        "coverage=all_layers",
        "dataset.size=small",
        "autoquant.method=fisher",
        "quant_pair=wint8_afp16,wfp8_afp8",
        data=data,
        sizes=sizes,
        preset="single",
    )
    place.run(plan)
    return plan


def test_pictures_that_were_used_are_not_measured_on(place: Place, swept: Plan) -> None:
    (left,) = held_out(swept, "image_text").values()
    assert [(record.image, record.caption) for record in left] == place.rows[USED:]
    seeing.write_jsonl(place.root / "used.jsonl", place.rows[:USED])
    with pytest.raises(UserError, match="no picture that the sweep did not use"):
        held_out(swept, "image_text", place.root / "used.jsonl")


def _divergence(place: Place, quantized: Any, model: Any, used: list[tuple[str, str]]) -> float:
    """Return the divergence over the positions that predict a caption, nats each."""
    tokenizer = AutoTokenizer.from_pretrained(place.checkpoint)
    total = count = 0.0
    for inputs, labels in _chats(place, tokenizer, used):
        with torch.no_grad():
            p, q = (
                each(**inputs).logits[0].double().log_softmax(-1) for each in (model, quantized)
            )
        where = slice(-labels - 1, -1)
        total += float((p.exp() * (p - q))[where].sum())
        count += labels
    return total / count


def _chats(place: Place, tokenizer: Any, used: list[tuple[str, str]]) -> Any:
    """Yield what the model is called with, and how many tokens of it are labels."""
    from qsens.data.chat import load_processor

    processor = load_processor(place.plan().config.model, tokenizer).image_processor
    processor.size["longest_edge"] = seeing.MAX_PIXELS
    for image, caption in used:
        picture = Image.open(place.root / "images" / image)
        made = processor(images=[np.array(picture)], return_tensors="pt")
        shown = math.prod(made["image_grid_thw"][0].tolist()) // 4
        words = ["user", "<|vision_start|>", *["<|image_pad|>"] * shown, "<|vision_end|>"]
        words += ["Describe", "this", "image", ".", "assistant", *caption.split()]
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(words)])
        yield (
            {
                "input_ids": ids,
                "pixel_values": made["pixel_values"],
                "image_grid_thw": made["image_grid_thw"],
                "mm_token_type_ids": (ids == pictures.IMAGE).long(),
            },
            len(caption.split()),
        )


def test_a_recipe_is_measured_on_pictures(place: Place, swept: Plan, tmp_path: Path) -> None:
    new = place.rows[USED : USED + 4]
    seeing.write_jsonl(tmp_path / "new.jsonl", [*place.rows[:USED], *new])
    found = write_recipe(
        str(Store(swept).sweep_dir()),
        bits=9,
        target="json",
        check=True,
        captions=tmp_path / "new.jsonl",
        roots=place.roots,
    )
    checked = found["check"]
    assert (checked["captions"], checked["scored"]) == (4, USED)
    ours, integers, floats, theirs = checked["measured"]
    assert [entry["name"] for entry in checked["measured"]] == [
        "recipe",
        "wint8_afp16",
        "wfp8_afp8",
        "ModelOpt",
    ]
    assert 0 < integers["divergence"] < floats["divergence"]
    assert ours["divergence"] > 0
    assert ours["bits"] <= 9
    assert theirs["bits"] <= 9
    # Weights alone: 8 bits everywhere need no calibration and no batch.
    model = load_model(swept.config.model, resolve_device("cpu"))
    quantized = load_model(swept.config.model, resolve_device("cpu"))
    (pair,) = load_sweep("single", ["quant_pair=wint8_afp16"]).config.quant_pair
    # A preset's patterns match the embeddings, which are in no group and in no recipe.
    tables = ("model.language_model.embed_tokens", "model.visual.pos_embed")
    off = [{"quantizer_name": f"{table}.*", "enable": False} for table in tables]
    mtq.quantize(quantized, {**pair.modelopt(), "quant_cfg": [*pair.quant_cfg(), *off]}, None)
    for measured, used in ((integers["divergence"], new), (integers["scored"], place.rows[:USED])):
        assert measured == pytest.approx(_divergence(place, quantized, model, used), rel=1e-4)
    assert "model.visual.patch_embed.proj" in found["recipe"]
