"""Packed checkpoints of a recipe, through compressed-tensors, and what their numbers stand for."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file

from qsens.recipes.formats import llm_compressor
from qsens.schema.recipe import Recipe

WEIGHTS = "model.safetensors"


def pack(recipe: Recipe, checkpoint: Path, directory: Path) -> Path:
    """Write the checkpoint with the modules of a recipe packed; all integers, symmetric."""
    shutil.copytree(checkpoint, directory)
    tensors = load_file(checkpoint / WEIGHTS)
    groups: dict[str, Any] = {}
    for name, members, given in _groups(recipe):
        scheme = {**given, "targets": members, "format": _format(given)}
        groups[name] = scheme
        compressor = BaseCompressor.get_value_from_registry(scheme["format"])
        for module in members:
            weight = tensors.pop(f"{module}.weight").float()
            state = compressor.compress(
                {"weight": weight, "weight_scale": _scale(weight, given["weights"])},
                QuantizationScheme.model_validate(scheme),
            )
            tensors |= {f"{module}.{part}": value for part, value in state.items()}
    settings = json.loads((checkpoint / "config.json").read_text())
    formats = {group["format"] for group in groups.values()}
    settings["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": [m for choice in recipe.choices if choice.format is None for m in choice.members],
    }
    (directory / "config.json").write_text(json.dumps(settings))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


@torch.no_grad()
def emulated(recipe: Recipe, model: Any) -> Any:
    """Return a copy of a model that computes what the packed checkpoint says, in float32."""
    changed = copy.deepcopy(model)
    for _, members, given in _groups(recipe):
        for name in members:
            module = changed.get_submodule(name)
            scale = _scale(module.weight, given["weights"])
            spread = scale.repeat_interleave(module.weight.shape[1] // scale.shape[1], 1)
            most = 2 ** (given["weights"]["num_bits"] - 1) - 1
            codes = (module.weight / spread).round().clamp(-most - 1, most)
            module.weight.copy_(codes * spread)
            if given.get("input_activations"):
                assert given["input_activations"]["dynamic"]
                module.register_forward_pre_hook(_of_each_token)
    return changed


def _of_each_token(module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    scale = inputs[0].abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return ((inputs[0] / scale).round() * scale,)


def _groups(recipe: Recipe) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """Yield the modules of each format with its scheme, as llm-compressor would be given it."""
    for index, (name, pair) in enumerate(recipe.formats.items()):
        members = [m for choice in recipe.choices if choice.format == name for m in choice.members]
        yield f"group_{index}", members, llm_compressor.scheme(pair)


def _format(scheme: dict[str, Any]) -> str:
    return "int-quantized" if scheme.get("input_activations") else "pack-quantized"


def _scale(weight: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    """Return ``(rows, columns or groups)``: the largest magnitude over the largest code."""
    assert (given["type"], given["symmetric"]) == ("int", True)
    size = given.get("group_size") or weight.shape[1]
    highest = weight.unflatten(1, (-1, size)).abs().amax(2)
    return (highest / (2 ** (given["num_bits"] - 1) - 1)).float()
