"""Mixtures of experts from a checkpoint's files to reports and recipes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from qsens.checkpoint.groups import find_groups
from qsens.checkpoint.loading import load_model
from qsens.config import Roots, choices, load_sweep
from qsens.engine.candidates import Request, distinct
from qsens.engine.memory import GIB, plan_budget, weight_bytes
from qsens.grid import Plan
from qsens.pipeline.plan import plan_sweep
from qsens.pipeline.preflight import check_formats, covered_shapes
from qsens.pipeline.recipe import write_recipe
from qsens.pipeline.sweep import run_sweep
from qsens.pipeline.verify import verify
from qsens.results import read_manifest
from qsens.schema.manifest import Manifest
from tests.engine import mixtures, pictures
from tests.pipeline import seeing

REPO = Path(__file__).resolve().parents[2]
LAYERS = [f"model.layers.{depth}.mlp.experts" for depth in range(2)]
PAIRS = ("wint8_aint8", "wfp8_afp16", "wfp4_afp16")


@dataclass
class Sweep:
    """A sweep that was run."""

    plan: Plan
    roots: Roots
    directory: Path
    manifests: dict[str, Manifest]


def roots_of(directory: Path) -> Roots:
    return Roots(root=REPO, results=directory / "results", configs=(REPO / "configs",))


def run(plan: Plan, roots: Roots) -> Sweep:
    published, errors = run_sweep(plan)
    assert errors == []
    manifests = {
        entry["cell"]: read_manifest(Path(entry["manifest"])) for entry in published["cells"]
    }
    return Sweep(plan, roots, Path(published["index"]).parent, manifests)


def swept(directory: Path, *more: str) -> Sweep:
    """Sweep all pairs at two sizes over captions, of which four and six are scored."""
    checkpoint = directory / "tiny"
    mixtures.model().save_pretrained(checkpoint)
    inner = Tokenizer(models.WordLevel({f"w{at}": at for at in range(48)}, "w47"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(checkpoint)
    lines = [" ".join(f"w{at}" for at in ids) for ids in mixtures.samples().ids]
    for size, count in (("small", 4), ("medium", 6), ("large", 6)):
        others = ["w1 w2 w3", "w4 w5 w6 w7"] if size == "large" else []
        text = "".join(f"{line}\n" for line in [*lines[:count], *others])
        (directory / f"captions_{size}.txt").write_text(text)
    roots = roots_of(directory)
    plan = plan_sweep(
        "single",
        [
            f"model.path={checkpoint}",
            "model.dtype=float32",
            f"dataset.directory={directory}",
            "dataset.size=small,medium",
            "dataset.sizes.small=4",
            "dataset.sizes.medium=6",
            "dataset.sizes.large=8",
            f"quant_pair={','.join(PAIRS)}",
            "output_layout=publish",
            "autoquant.device=cpu",
            *more,
        ],
        roots=roots,
    )
    return run(plan, roots)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return swept(tmp_path_factory.mktemp("mixture"))


def test_the_plan_sees_matrices_of_experts(sweep: Sweep) -> None:
    # 96, the inner width, and 64 divide into blocks of 32 of MXFP4: no notice says otherwise.
    assert not any("blocks" in notice for notice in sweep.plan.notices)


def test_manifests_name_experts_without_tokens(sweep: Sweep) -> None:
    samples = mixtures.samples()
    for cell, manifest in sweep.manifests.items():
        scored = 4 if cell.endswith("small") else 6
        experts = {
            name.removesuffix(".quant_recipe"): row
            for name, row in manifest.layer_sensitivity.items()
            if row.kind == "experts"
        }
        assert list(experts) == LAYERS
        for (name, row), idle in zip(experts.items(), mixtures.IDLE, strict=True):
            assert row.status == "scored"
            assert row.size_cost == 6 * 3 * 96 * 64 * row.num_bits / 16
            assert row.experts is not None
            assert sum(row.experts.tokens) == 2 * samples.tokens(scored)
            assert row.experts.tokens[idle] == 0
            assert idle in row.experts.without_tokens
            for tokens, score in zip(row.experts.tokens, row.experts.sensitivity, strict=True):
                assert (score is None) == (tokens == 0)
                assert score is None or score > 0
            assert manifest.layers[name].module_type == "QuantQwen3MoeExperts"
        assert any("got no token of the samples scored" in said for said in manifest.notices)
        others = [row for row in manifest.layer_sensitivity.values() if row.kind != "experts"]
        assert all(row.experts is None for row in others)


def test_reports_list_experts(sweep: Sweep) -> None:
    manifest = sweep.manifests["wfp4_afp16-medium"]
    row = manifest.layer_sensitivity[f"{LAYERS[0]}.quant_recipe"]
    assert row.experts is not None
    known = [
        (score, number) for number, score in enumerate(row.experts.sensitivity) if score is not None
    ]
    worst = max(known)[1]
    (folder,) = sweep.roots.results.glob("models/*/layer-analysis/weight-fp4-act-fp16/*medium")
    data = json.loads((folder / "per-layer-sensitivity.json").read_text())
    assert [mixture["layer"] for mixture in data["mixtures"]] == LAYERS
    assert data["mixtures"][0]["first"][0]["expert"] == worst
    assert data["mixtures"][0]["without_tokens"] == row.experts.without_tokens
    shown = f"{worst} ({max(known)[0]:.3e}, {row.experts.tokens[worst]} tokens)"
    for suffix in ("md", "html"):
        assert shown in (folder / f"per-layer-sensitivity.{suffix}").read_text()


def test_audits_measure_experts(tmp_path: Path) -> None:
    """By ``fisher``, whose estimates are of the very divergence that an audit measures."""
    found = swept(
        tmp_path,
        "autoquant.method=fisher",
        "autoquant.draws=32",
        "autoquant.audit=full",
        "quant_pair=wint8_aint8",
        "dataset.size=small",
    )
    summary = json.loads((found.directory / "summary.json").read_text())
    (audit,) = summary["audit"]
    points = {point["layer"]: point for point in audit["points"]}
    rows = found.manifests["wint8_aint8-small"].layer_sensitivity
    for name in LAYERS:
        assert 0.7 < points[name]["estimate"] / points[name]["truth"] < 1.4
        row = rows[f"{name}.quant_recipe"]
        assert row.experts is not None
        assert any(row.experts.sensitivity)


def test_both_engines_agree(sweep: Sweep) -> None:
    result = verify(sweep.plan, "wint8_aint8-small")
    assert result["agrees"], result


def test_a_recipe_is_what_modelopt_quantizes(sweep: Sweep, tmp_path: Path) -> None:
    import modelopt.torch.quantization as mtq

    out = tmp_path / "recipe.yaml"
    found = write_recipe(
        str(sweep.directory),
        bits=12.5,
        target="modelopt",
        keep=[LAYERS[1]],
        out=out,
        check=True,
    )
    config = yaml.safe_load(out.read_text())
    model: Any = load_model(sweep.plan.config.model, torch.device("cpu"))
    mtq.quantize(model, config, lambda quantized: quantized(input_ids=torch.arange(40)[None]))
    used = total = 0.0
    for module in model.modules():
        if hasattr(module, "gate_up_proj_weight_quantizers"):
            for part in ("gate_up_proj", "down_proj"):
                each = getattr(module, f"{part}_weight_quantizers")
                assert len(each) == mixtures.EXPERTS
                assert len({quantizer.is_enabled for quantizer in each}) == 1
                count = getattr(module, part).numel()
                total += count
                used += count * (each[0]._effective_bits if each[0].is_enabled else 16.0)
        elif hasattr(module, "weight_quantizer") and isinstance(module, torch.nn.Linear):
            quantizer = module.weight_quantizer
            total += module.weight.numel()
            bits = quantizer._effective_bits if quantizer.is_enabled else 16.0
            used += module.weight.numel() * bits
    first, second = (model.get_submodule(name) for name in LAYERS)
    assert first.down_proj_weight_quantizers[0].is_enabled
    assert not second.down_proj_weight_quantizers[0].is_enabled
    assert used / total == pytest.approx(found["bits"], rel=1e-12)
    # The check quantizes the whole model by the same recipe.
    assert found["check"]["measured"][0]["bits"] == pytest.approx(found["bits"], rel=1e-12)


def test_a_recipe_for_llm_compressor_names_each_expert(sweep: Sweep) -> None:
    compressed = pytest.importorskip("compressed_tensors.quantization")
    found = write_recipe(str(sweep.directory), bits=12.5, target="llm-compressor", keep=[LAYERS[1]])
    ((_, stage),) = yaml.safe_load(found["recipe"]).items()
    (modifier,) = stage["quantization_modifiers"].values()

    # The layers as llm-compressor takes them apart: three linear modules an expert.
    model: Any = load_model(sweep.plan.config.model, torch.device("cpu"))
    for name in LAYERS:
        experts = [
            torch.nn.ModuleDict(
                {
                    "gate_proj": torch.nn.Linear(64, 96),
                    "up_proj": torch.nn.Linear(64, 96),
                    "down_proj": torch.nn.Linear(96, 64),
                }
            )
            for _ in range(mixtures.EXPERTS)
        ]
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, torch.nn.ModuleList(experts))
    compressed.apply_quantization_config(
        model, compressed.QuantizationConfig.model_validate(modifier)
    )
    schemes = {
        name
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    assert {name for name in schemes if "experts" in name} == {
        f"{LAYERS[0]}.{expert}.{part}_proj"
        for expert in range(mixtures.EXPERTS)
        for part in ("gate", "up", "down")
    }
    assert not any(name.endswith("mlp.gate") for name in schemes)


def test_all_layers_of_a_mixture_that_sees(tmp_path: Path) -> None:
    checkpoint = seeing.save_checkpoint(tmp_path / "tiny")
    dense = pictures.model().config
    text = dense.text_config.to_dict() | {
        "model_type": "qwen3_vl_moe_text",
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
    }
    vision = dense.vision_config.to_dict() | {"model_type": "qwen3_vl_moe_vision"}
    ids = {
        name: getattr(dense, name)
        for name in (
            "image_token_id",
            "video_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
        )
    }
    torch.manual_seed(2)
    config = Qwen3VLMoeConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **ids
    )
    Qwen3VLMoeForConditionalGeneration(config).save_pretrained(checkpoint)
    seeing.write_jsonl(tmp_path / "small.jsonl", seeing.samples(tmp_path / "images", 6))
    roots = roots_of(tmp_path)
    plan = plan_sweep(
        "single",
        [
            f"model.path={checkpoint}",
            "model.dtype=float32",
            "coverage=all_layers",
            f"dataset.directory={tmp_path}",
            f"dataset.images={tmp_path / 'images'}",
            "dataset.files.small=small.jsonl",
            "dataset.sizes.small=6",
            "dataset.max_pixels=2304",
            "quant_pair=wint8_aint8,wfp8_afp16",
            "autoquant.device=cpu",
        ],
        roots=roots,
    )
    found = run(plan, roots)
    manifest = found.manifests["wint8_aint8-all_layers-small"]
    rows = {
        name.removesuffix(".quant_recipe"): row for name, row in manifest.layer_sensitivity.items()
    }
    assert all(row.status == "scored" for row in rows.values())
    assert all((row.sensitivity or 0) > 0 for row in rows.values())
    assert sum(row.kind == "vision" for row in rows.values()) == 1 + 3 * 4 + 2 + 2 * 2
    assert [name for name, row in rows.items() if row.kind == "experts"] == [
        f"model.language_model.layers.{depth}.mlp.experts" for depth in range(3)
    ]
    assert manifest.dataset is not None
    for row in rows.values():
        if row.experts is not None:
            assert sum(row.experts.tokens) == 2 * manifest.dataset.tokens
    result = verify(plan, "wint8_aint8-all_layers-small")
    assert result["agrees"], result


def test_the_shapes_of_30b_a3b() -> None:
    """On no device, with the sizes of its configuration: groups, formats, and memory."""
    text = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20]},
    }
    vision = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "out_hidden_size": 2048,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    with torch.device("meta"):
        model = Qwen3VLMoeForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    tower = ("model.visual.*",)
    groups = [group for group in find_groups(model, tower) if group.covered]
    # In each layer q/k/v, o and experts; then the head.
    assert len(groups) == 48 * 3 + 1
    per_layer = (4096 + 2 * 512) * 2048 + 4096 * 2048 + 128 * 3 * 768 * 2048
    assert sum(group.weights for group in groups) == 48 * per_layer + 151936 * 2048

    pairs = load_sweep("single", [f"quant_pair={','.join(choices('quant_pair'))}"]).config
    shapes = {
        # The files hold every expert transposed.
        name: (shape[0], shape[2], shape[1]) if "experts" in name else tuple(shape)
        for name, shape in ((name, weight.shape) for name, weight in model.named_parameters())
    }
    assert shapes["model.language_model.layers.0.mlp.experts.down_proj"] == (128, 768, 2048)
    assert check_formats(pairs, covered_shapes(shapes, tower)) == []

    candidates = distinct(
        [
            Request(pair.name, pair.weight_cfg(), None, 128, 128)
            for pair in pairs.quant_pair
            if pair.name.endswith("afp16")
        ]
    )
    held = weight_bytes(model)
    budget = plan_budget(model, groups, candidates, memory_gb=12 + held / GIB)
    assert budget.max_tokens >= 8192
    assert budget.predicted <= 12 << 30
