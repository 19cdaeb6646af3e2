"""Weights of the files that a model does not take: how many, and the first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsens.checkpoint.loading import load_model
from qsens.checkpoint.quantized import shapes
from qsens.checkpoint.unused import unused_notices
from qsens.config import ModelConfig
from tests.checkpoint.tiny_families import configuration, save

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Any], None]
WEIGHTS = "model.safetensors"


def notices(
    path: Path, *, config: Edit = lambda config: None, weights: Edit = lambda tensors: None
) -> list[str]:
    """Return what is said of a checkpoint after its files were changed."""
    described = json.loads((path / "config.json").read_text())
    config(described)
    (path / "config.json").write_text(json.dumps(described))
    tensors = load_file(path / WEIGHTS)
    weights(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path / WEIGHTS)
    model = load_model(ModelConfig(path=path, dtype="float32"), torch.device("cpu"))
    return unused_notices(model, shapes(path))


def fewer(config: dict[str, Any]) -> None:
    text = config.get("text_config", config)
    text["num_hidden_layers"] = 1
    for key in ("layer_types", "mlp_only_layers"):
        if text.get(key):
            text[key] = text[key][:1]


@pytest.mark.parametrize(
    "family",
    ["Llama", "Qwen3", "Qwen3-MoE", "Qwen3-VL", "Qwen3-VL-MoE", "Qwen2.5-VL", "Gemma 3"],
)
def test_layers_that_config_leaves_out_are_counted(family: str, tmp_path: Path) -> None:
    """As they stand in the files, whatever becomes of them in the model: experts one by one."""
    path = save(configuration(family, tied=True), tmp_path / "c")
    whole = load_file(path / WEIGHTS)
    assert notices(path) == []
    held = [name for name in whole if "layers.1." in name and "vision" not in name]
    assert len(held) >= 9
    (said,) = notices(path, config=fewer)
    first = min(held)
    assert said.startswith(f"{len(held)} of {len(whole)} weights in the files are not used, ")
    assert f"the first is {first}: " in said


def test_experts_are_counted_one_by_one(tmp_path: Path) -> None:
    """Where files hold each alone, and the model all of a layer in one."""
    path = save(configuration("Qwen3-MoE", tied=True), tmp_path / "c")

    def apart(tensors: Tensors) -> None:
        for layer in range(2):
            stem = f"model.layers.{layer}.mlp.experts"
            if f"{stem}.gate_up_proj" not in tensors:
                continue
            both, down = tensors.pop(f"{stem}.gate_up_proj"), tensors.pop(f"{stem}.down_proj")
            for expert in range(len(both)):
                gate, up = both[expert].chunk(2)
                tensors[f"{stem}.{expert}.gate_proj.weight"] = gate
                tensors[f"{stem}.{expert}.up_proj.weight"] = up
                tensors[f"{stem}.{expert}.down_proj.weight"] = down[expert]

    assert notices(path, weights=apart) == []
    total = len(load_file(path / WEIGHTS))
    # Six experts of three matrices; four projections, two norms of heads, two norms, the router.
    (said,) = notices(path, config=fewer)
    assert said.startswith(f"{6 * 3 + 4 + 2 + 2 + 1} of {total} weights")


def test_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    path = save(configuration("Llama", tied=True), tmp_path / "c")

    def more(tensors: Tensors) -> None:
        for layer in (10, 9, 100):
            tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = torch.ones(2, 2)

    (said,) = notices(path, weights=more)
    assert said.startswith("3 of 23 weights")
    assert "the first is model.layers.9.mlp" in said


def test_what_transformers_leaves_out_on_purpose_is_said_apart(tmp_path: Path) -> None:
    """Tables that the model makes itself are not worth a word."""
    path = save(configuration("Llama", tied=True), tmp_path / "c")

    def tables(tensors: Tensors) -> None:
        for layer in range(2):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    assert notices(path, weights=tables) == []
    tensors = shapes(path)
    model = load_model(ModelConfig(path=path, dtype="float32"), torch.device("cpu"))
    matrix = tensors["model.embed_tokens.weight"]
    further = {f"mtp.layers.0.{name}.weight": matrix for name in "ab"}
    # As classes of models with such layers say it.
    model._keys_to_ignore_on_load_unexpected = {r"^mtp.*"}
    (said,) = unused_notices(model, {**tensors, **further})
    assert said.startswith("2 matrices in the files are left out by transformers on purpose")
    assert "the first is mtp.layers.0.a.weight" in said
    model._keys_to_ignore_on_load_unexpected = set()
    (said,) = unused_notices(model, {**tensors, **further})
    assert said.startswith(f"2 of {len(tensors) + 2} weights in the files are not used")
