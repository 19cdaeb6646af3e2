"""Checkpoints and caption files that are not as they should be, and sweeps over them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForImageTextToText,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from qsens.config import Roots
from qsens.errors import QsensError
from qsens.grid import Plan
from qsens.names import GROUP_SUFFIX
from qsens.pipeline.plan import plan_sweep
from qsens.pipeline.sweep import run_sweep
from qsens.results import read_manifest
from qsens.schema.manifest import GroupSensitivity, Manifest
from qsens.store import Store

Tensors = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Found:
    """What a sweep gave.

    Attributes:
        published: What ``run_sweep`` returns.
        errors: The errors of the cells that failed.
        manifests: By cell id.
        states: The tensors beside each manifest, by cell id.
    """

    published: Mapping[str, Any]
    errors: list[QsensError]
    manifests: dict[str, Manifest] = field(default_factory=dict)
    states: dict[str, Tensors] = field(default_factory=dict)

    def only(self) -> Manifest:
        """Return the manifest of the one cell, which has not failed."""
        assert self.errors == []
        (manifest,) = self.manifests.values()
        return manifest

    def text(self) -> str:
        """Return the sweep's report."""
        return (Path(self.published["index"]).parent / "summary.md").read_text(encoding="utf-8")


def plan_of(checkpoint: Path, results: Path, *overrides: str) -> Plan:
    """Plan a sweep of one pair over small sizes, on the CPU."""
    roots = Roots.from_environment()
    given = {
        "model.path": str(checkpoint),
        "quant_pair": "wint8_afp16",
        "dataset.sizes.small": "4",
        "autoquant.device": "cpu",
    }
    given |= dict(override.split("=", 1) for override in overrides)
    return plan_sweep(
        "single",
        [f"{key}={value}" for key, value in given.items()],
        roots=Roots(root=roots.root, results=results, configs=roots.configs),
    )


def sweep(checkpoint: Path, results: Path, *overrides: str) -> Found:
    """Run a sweep; an error of a cell is in the result, one of the plan is raised."""
    plan = plan_of(checkpoint, results, *overrides)
    published, errors = run_sweep(plan)
    found = Found(published, errors)
    store = Store(plan)
    for cell in plan.cells:
        if store.is_done(cell):
            found.manifests[cell.cell] = read_manifest(store.published(cell)["manifest"])
            found.states[cell.cell] = load_file(store.published(cell)["state"])
    return found


def rows(manifest: Manifest) -> dict[str, GroupSensitivity]:
    """Return the rows of the groups that are not disabled, by the name that ModelOpt gives."""
    return {
        name.removesuffix(GROUP_SUFFIX): row
        for name, row in manifest.layer_sensitivity.items()
        if row.status != "disabled"
    }


def scores(manifest: Manifest) -> dict[str, float]:
    """Return the sensitivities of all groups that are not disabled; each must have been scored."""
    found = {}
    for name, row in rows(manifest).items():
        assert row.status == "scored", f"{name}: {row.status}, {row.reason}"
        assert row.sensitivity is not None
        found[name] = row.sensitivity
    return found


def changed(
    source: Path,
    target: Path,
    *,
    config: Callable[[dict[str, Any]], None] | None = None,
    tokenizer: Callable[[dict[str, Any]], None] | None = None,
    weights: Callable[[Tensors], None] | None = None,
) -> Path:
    """Copy a checkpoint, with the functions given applied to its files' contents."""
    shutil.copytree(source, target)
    for name, edit in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        if edit is not None:
            content = json.loads((target / name).read_text(encoding="utf-8"))
            edit(content)
            (target / name).write_text(json.dumps(content), encoding="utf-8")
    if weights is not None:
        tensors = load_file(target / WEIGHTS)
        edit_weights(tensors, weights)
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    return target


def edit_weights(tensors: Tensors, edit: Callable[[Tensors], None]) -> None:
    """Apply ``edit`` and make every tensor own its memory, as the file format wants."""
    edit(tensors)
    for name, tensor in tensors.items():
        tensors[name] = tensor.contiguous()


def token_ids(checkpoint: Path, captions: Sequence[str]) -> list[list[int]]:
    """Return what the tokenizer's file alone makes of ``captions``."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return [tokenizer.encode(caption).ids for caption in captions]


def by_hand(checkpoint: Path, ids: Sequence[Sequence[int]], batch_size: int) -> dict[str, float]:
    """Return the sensitivities to INT8 weights with a scale a row, from the definition.

    One sample at a time, so that there is no padding; ``dY`` is that of the weight's change, and
    the weight is rounded here.
    """
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.requires_grad_(False)
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "visual" not in name
    }
    changes = {}
    for name, module in modules.items():
        amax = module.weight.abs().amax(dim=1, keepdim=True)
        # As ModelOpt's kernels have it: a division by amax / 127 would round other ties.
        scale = torch.where(amax == 0, 1.0, 127 / amax)
        changes[name] = (module.weight * scale).round() / scale - module.weight
    moved: Tensors = {}
    outputs: Tensors = {}

    def keep(name: str, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        output.retain_grad()
        moved[name], outputs[name] = F.linear(args[0].detach(), changes[name]), output

    for name, module in modules.items():
        module.register_forward_hook(
            lambda _, args, output, name=name: keep(name, args, output)  # type: ignore[misc]
        )
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: out.requires_grad_())
    labels = [max(0, len(row) - 1) for row in ids]
    found: dict[str, float] = {}
    for index, row in enumerate(ids):
        if len(row) < 2:
            continue
        first = index - index % batch_size
        tokens = torch.tensor([row])
        logits = model(input_ids=tokens, use_cache=False).logits
        F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum").backward()
        for name, output in outputs.items():
            slope = output.grad
            assert slope is not None
            score = float((slope.double() * moved[name].double()).square().sum())
            group = re.sub(r"[kv]_proj$", "q_proj", name).replace("up_proj", "gate_proj")
            weight = sum(labels[first : first + batch_size]) ** 2
            found[group] = found.get(group, 0.0) + score / weight
    return found


def write_captions(directory: Path, **files: Iterable[str] | bytes) -> str:
    """Write the caption file of each size; return the override that chooses the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for size, content in files.items():
        data = content if isinstance(content, bytes) else "\n".join(content).encode() + b"\n"
        (directory / f"captions_{size}.txt").write_bytes(data)
    return f"dataset.directory={directory}"


def tiny_model(directory: Path, tokenizer_of: Path, **text: int) -> Path:
    """Save a random model of one layer, with the tokenizer of another checkpoint.

    Args:
        directory: Where it goes.
        tokenizer_of: The other checkpoint; its ids of special tokens are taken as well.
        text: Sizes of the language model, in place of small ones.
    """
    torch.manual_seed(7)
    ids = json.loads((tokenizer_of / "config.json").read_text(encoding="utf-8"))
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": ids["text_config"]["vocab_size"],
        **text,
    }
    config = Qwen3VLConfig(
        text_config={
            **sizes,
            "rope_parameters": {"rope_type": "default", "mrope_section": [6, 5, 5]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": sizes["hidden_size"],
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **{key: value for key, value in ids.items() if key.endswith("_token_id")},
    )
    model = Qwen3VLForConditionalGeneration(config)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_of / name, directory / name)
    return directory
