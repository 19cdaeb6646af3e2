"""Recipes for a runtime honour what its file says, by rules that are written here once more."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qsens.config.runtime import load_runtime
from qsens.names import Kind, kind_of
from qsens.pipeline.packing import pack
from qsens.recipes.formats.evidence import choose
from qsens.recipes.runtime import Deployment
from qsens.schema.recipe import Recipe
from qsens.schema.summary import Row
from tests.recipes.every_format import at_all_granularities
from tests.recipes.formats.conftest import PAIRS

EVERY = at_all_granularities(PAIRS)
# A format's group of columns (of weights or inputs), and its block of rows; all that Hopper runs.
GROUPS = {
    "wint4_afp16-ct_group128": (128, None),
    "wint4_afp16-ct_group32": (32, None),
    "wint8_aint8-ct_token": (None, None),
    "wfp8_afp8-ct_block128": (128, 128),
    "wnvfp4_anvfp4-ct": (16, None),
    "wfp4_afp16-ct": (32, None),
}
REFUSED = ("wint8_afp8-default", "wfp4_afp8-default", "wnvfp4_afp8-default")
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
BY_COLUMNS = ("o_proj", "out_proj", "down_proj")
WHOLE = ("q_a_proj", "kv_a_proj_with_mqa", "gate", "shared_expert_gate")


def dense(hidden: int, kv: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


MIXTURE = {
    **{name: shape for name, shape in dense(256, 128, 0).items() if "mlp" not in name},
    "mlp.gate": (4, 256),
    "mlp.shared_expert_gate": (1, 256),
    "mlp.experts": (2, 256, 192),  # gate, up and down of two experts
}
LATENT = {
    "self_attn.q_a_proj": (96, 256),
    "self_attn.q_b_proj": (256, 96),
    "self_attn.kv_a_proj_with_mqa": (80, 256),
    "self_attn.kv_b_proj": (256, 64),
    "self_attn.o_proj": (256, 128),
    "mlp.down_proj": (256, 384),
}
GATED_DELTA = {
    "linear_attn.in_proj_qkv": (512, 256),
    "linear_attn.in_proj_z": (256, 256),
    "linear_attn.in_proj_b": (8, 256),
    "linear_attn.in_proj_a": (8, 256),
    "linear_attn.out_proj": (256, 256),
    "linear_attn.conv1d": (512, 1, 4),
    "mlp.gate_proj": (320, 256),
    "mlp.up_proj": (320, 256),
    "mlp.down_proj": (256, 320),
}
MODELS = {
    "dense": dense(256, 128, 512),
    "ragged": dense(288, 96, 352),
    "mixture": MIXTURE,
    "latent": LATENT,
    "gated delta": GATED_DELTA,
}


def stored(modules: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the weights in the files by name."""
    found: dict[str, tuple[int, ...]] = {}
    for layer, (name, shape) in itertools.product(range(2), modules.items()):
        path = f"model.layers.{layer}.{name}"
        if name != "mlp.experts":
            found[f"{path}.weight"] = shape
            continue
        count, hidden, inner = shape
        for at in range(count):
            found[f"{path}.{at}.gate_proj.weight"] = (inner, hidden)
            found[f"{path}.{at}.up_proj.weight"] = (inner, hidden)
            found[f"{path}.{at}.down_proj.weight"] = (hidden, inner)
    return found


def rows_of(weights: dict[str, tuple[int, ...]], seed: int) -> dict[str, list[Row]]:
    """Return rows in which every module is a group: what is fused is held apart."""
    draw = random.Random(seed)
    elements: dict[str, int] = {}
    for name, shape in weights.items():
        module = re.sub(r"(\.experts)\..*", r"\1", name.removesuffix(".weight"))
        size = 1
        for width in shape:
            size *= width
        elements[module] = elements.get(module, 0) + size
    found: dict[str, list[Row]] = {}
    for name in (*GROUPS, *REFUSED):
        bits = EVERY[name].effective_bits
        found[name] = [
            Row(
                layer=module,
                members=(module,),
                kind=kind_of(module),
                depth=0,
                status="scored",
                num_bits=bits,
                sensitivity=2**-bits * draw.uniform(0.1, 10),
                sensitivity_per_token=None,
                size_cost=count * bits / 16,
                position=None,
                share=None,
            )
            for module, count in elements.items()
        ]
    return found


def fits(name: str, path: str, shape: tuple[int, ...], gpus: int) -> bool:
    """Return whether widths divide: once more, and by other means than the code."""
    group, block = GROUPS[name]
    leaf = path.rpartition(".")[2]
    rows, columns = shape
    if leaf in BY_COLUMNS:
        if columns % gpus:
            return False
        columns //= gpus
    elif leaf not in WHOLE:
        if rows % gpus:
            return False
        rows //= gpus
    if group and columns % group:
        return False
    cut = gpus > 1 and leaf not in BY_COLUMNS + WHOLE
    inner = any(leaf in leaves[:-1] for leaves in FUSED)
    of_experts = ".experts." in path and leaf != "down_proj"
    return not (block and (cut or inner or of_experts) and rows % block)


def check(recipe: Recipe, weights: dict[str, tuple[int, ...]], gpus: int) -> set[str]:
    """Hold a recipe against the rules; returns the formats that it uses."""
    of_member = {m: choice.format for choice in recipe.choices for m in choice.members}
    parents = {name.rpartition(".")[0] for name in of_member}
    for parent, leaves in itertools.product(parents, FUSED):
        formats = {of_member[f"{parent}.{n}"] for n in leaves if f"{parent}.{n}" in of_member}
        assert len(formats) <= 1, (parent, leaves)
    for member, name in of_member.items():
        if member.endswith((".mlp.gate", "shared_expert_gate", "conv1d")):
            assert name is None, member
        if name is None:
            continue
        assert name not in REFUSED
        own = [path for path in weights if path == f"{member}.weight"]
        own += [path for path in weights if path.startswith(f"{member}.") and "experts" in member]
        assert own
        for path in own:
            assert fits(name, path.removesuffix(".weight"), weights[path], gpus), (name, path)
    return {name for name in of_member.values() if name is not None}


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_recipes_for_vllm_honour_its_rules(model: str, gpus: int, tmp_path: Path) -> None:
    weights = stored(MODELS[model])
    (tmp_path / "config.json").write_text("{}")
    tensors = {name: torch.zeros(shape) for name, shape in weights.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    vllm = Deployment(load_runtime("vllm"), "hopper", gpus)
    used: set[str] = set()
    broken = 0
    for seed, bits in enumerate((6.0, 8.5, 11.0)):
        rows = rows_of(weights, seed)
        pairs = {name: EVERY[name] for name in rows}
        taken = {name: each for name, each in rows.items() if name not in REFUSED}
        assert {n for n in rows if vllm.ruling(pairs[n]).refusal is not None} == set(REFUSED)
        packing = pack(taken, pairs, tmp_path, packs=False, deployment=vllm)
        said = {
            "sweep_id": "sweep",
            "model": model,
            "checkpoint_digest": "0" * 64,
            "size": "small",
            "method": "gradient",
        }
        recipe = choose(
            packing.rows,
            pairs,
            bits,
            together=packing.together,
            refused=packing.refused,
            left_out=packing.left_out,
            **said,  # type: ignore[arg-type]
        )
        used |= check(recipe, weights, gpus)
        assert all(entry.reason.startswith("vLLM 0.32") for entry in recipe.left_out)
        try:
            check(choose(taken, pairs, bits, **said), weights, gpus)  # type: ignore[arg-type]
        except AssertionError:
            broken += 1
    assert len(used) > 1
    # Without the rules, these would break one at each of the targets, nearly.
    assert broken >= (2 if model in ("ragged", "latent", "gated delta") else 0)


def test_what_is_fused_with_what_stays_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = stored({"self_attn.q_proj": (32, 32), "self_attn.k_proj": (32, 32)})
    save_file({name: torch.zeros(s) for name, s in weights.items()}, tmp_path / "m.safetensors")
    name = "wint8_aint8-ct_token"
    rows = {name: rows_of(weights, 0)[name]}
    q, k = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
    rows[name] = [
        row.model_copy(update={"status": "disabled", "sensitivity": None})
        if row.layer == k
        else row
        for row in rows[name]
    ]
    found = pack(rows, EVERY, tmp_path, packs=False, deployment=Deployment(load_runtime("vllm")))
    assert found.refused == {name: {q}}
    assert found.left_out[0].words == (
        f"{name}: vLLM 0.32 fuses it with {k}, which stays at 16 bits: {q}"
    )
    kinds: set[Kind] = {row.kind for row in rows[name]}
    assert kinds == {"qkv"}
