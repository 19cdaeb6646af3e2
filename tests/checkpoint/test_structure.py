"""Every family, tiny: where its parts are, and that the fused engine gives ModelOpt's numbers."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qsens.checkpoint import structure
from qsens.checkpoint.components import find_head, resolve_components
from qsens.checkpoint.loading import load_model
from qsens.checkpoint.modules import is_quantizable
from qsens.checkpoint.quantized import shapes
from qsens.checkpoint.structure import Structure, Traits, head_of, remember_traits
from qsens.config import ModelConfig, Roots
from qsens.engine.scores import silent
from qsens.errors import UserError
from qsens.grid import Plan
from qsens.pipeline.compute import both_engines
from qsens.pipeline.plan import plan_sweep
from qsens.store import Store
from tests.checkpoint.tiny_families import CAPTIONS, configuration, save

LLAMA = Structure(("model.layers.*",), (), ("lm_head",))
PAIRS = ("wint8_aint8", "wfp8_afp16")
NAMES = [
    "Qwen3-VL",
    "Qwen2.5-VL",
    "Qwen3-VL-MoE",
    "Qwen3",
    "Qwen3-MoE",
    "Llama",
    "Gemma 3",
    "Gemma 3, text alone",
]
SEEING = ["Qwen3-VL", "Qwen3-VL-MoE", "Qwen2.5-VL", "Gemma 3"]
MIXED = ["Qwen3-VL-MoE", "Qwen3-MoE"]


def plan_of(checkpoint: Path, tmp_path: Path, *overrides: str) -> Plan:
    """Plan both pairs over four captions, on the CPU."""
    samples = tmp_path / "samples"
    samples.mkdir(exist_ok=True)
    (samples / "captions_small.txt").write_text("\n".join(CAPTIONS) + "\n")
    roots = Roots.from_environment()
    return plan_sweep(
        "single",
        [
            f"model.path={checkpoint}",
            "model.dtype=float32",
            f"dataset.directory={samples}",
            "dataset.sizes.small=4",
            f"quant_pair={','.join(PAIRS)}",
            "autoquant.device=cpu",
            *overrides,
        ],
        roots=Roots(root=roots.root, results=tmp_path / "results", configs=roots.configs),
    )


def scored(plan: Plan, mixed: bool = False) -> dict[str, dict[str, float]]:
    """Return the fused engine's scores by pair and group; they must be ModelOpt's."""
    found = {}
    for cell in plan.cells:
        ours, theirs, _ = both_engines(Store(plan), cell, silent)
        # In each of two layers: q/k/v, o, and either gate/up, down or experts; and the head.
        assert len(ours) == 2 * (3 if mixed else 4) + 1
        assert ours == pytest.approx(theirs, rel=1e-3, abs=0)
        assert all(score > 0 for score in ours.values())
        found[cell.pair] = ours
    return found


@pytest.mark.parametrize(
    ("name", "tied"),
    [*((name, False) for name in NAMES), ("Llama", True), ("Qwen3-VL", True), ("Gemma 3", True)],
)
def test_fused_equals_modelopt(name: str, tied: bool, tmp_path: Path) -> None:
    checkpoint = save(configuration(name, tied=tied), tmp_path / "checkpoint")
    found = scored(plan_of(checkpoint, tmp_path), mixed=name in MIXED)
    assert list(found) == list(PAIRS)
    assert found[PAIRS[0]] != found[PAIRS[1]]


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_where_the_table_says(name: str, tmp_path: Path) -> None:
    checkpoint = save(configuration(name, tied=True), tmp_path / "checkpoint")
    config = resolve_components(ModelConfig(path=checkpoint, dtype="float32"))
    model = load_model(config, torch.device("cpu"))
    modules = {n: m for n, m in model.named_modules() if is_quantizable(m)}
    assert find_head(modules, config) == "lm_head"
    assert head_of(model) is model.get_output_embeddings()
    # The tower's and the language model's own modules say which is which.
    decoder = model.model.language_model if name in SEEING else model.model
    ours = {id(m) for m in decoder.modules()} | {id(model.lm_head)}
    # Two layers: q, k, v, o, and either gate, up, down or experts; then the head.
    each = 5 if name in MIXED else 7
    assert sum(id(module) in ours for module in modules.values()) == 2 * each + 1
    vision = {n for n, module in modules.items() if id(module) not in ours}
    assert vision == {
        n for n in modules if any(fnmatch.fnmatchcase(n, p) for p in config.vision_patterns)
    }
    assert bool(vision) == (name in SEEING)


@pytest.mark.parametrize("name", NAMES)
def test_the_tower_is_found_in_the_files_too(name: str, tmp_path: Path) -> None:
    """Planning sees weights only: those of the tower must not count as covered."""
    checkpoint = save(configuration(name, tied=False), tmp_path / "checkpoint")
    patterns = resolve_components(ModelConfig(path=checkpoint)).vision_patterns
    tower = [
        key
        for key in shapes(checkpoint)
        if any(fnmatch.fnmatchcase(key.removesuffix(".weight"), pattern) for pattern in patterns)
    ]
    expected = ("visual", "vision_tower", "multi_modal_projector")
    assert tower == [key for key in shapes(checkpoint) if any(part in key for part in expected)]
    assert bool(tower) == (name in SEEING)


def test_old_and_new_weight_names_give_the_same_numbers(tmp_path: Path) -> None:
    """Qwen2.5-VL's files say ``visual.*`` and ``model.layers.*``; later ones like the modules."""
    new = save(configuration("Qwen2.5-VL", tied=False), tmp_path / "new")
    old_names = load_file(new / "model.safetensors")
    assert any(key.startswith("visual.") for key in old_names)
    weights = {
        f"model.{key}"
        if key.startswith("visual.")
        else key
        if key == "lm_head.weight"
        else f"model.language_model.{key.removeprefix('model.')}": value
        for key, value in old_names.items()
    }
    found = []
    for label, held in (("today", weights), ("before", old_names)):
        copy = tmp_path / label
        copy.mkdir()
        for file in new.iterdir():
            if file.name != "model.safetensors":
                (copy / file.name).write_bytes(file.read_bytes())
        save_file(held, copy / "model.safetensors", metadata={"format": "pt"})
        found.append(scored(plan_of(copy, tmp_path)))
    assert found[0] == found[1]


def as_mistral(checkpoint: Path) -> Path:
    """Give a Llama the name of a family outside the table, which transformers loads alike."""
    file = checkpoint / "config.json"
    described = json.loads(file.read_text())
    described |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    file.write_text(json.dumps(described))
    return checkpoint


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that knows llama alone."""
    monkeypatch.setattr(structure, "_known", lambda: {"types": {"llama": LLAMA.as_dict()}})


def test_outside_the_table_patterns_do(unknown: None, tmp_path: Path) -> None:
    checkpoint = as_mistral(save(configuration("Llama", tied=False), tmp_path / "checkpoint"))
    with pytest.raises(UserError) as caught:
        plan_of(checkpoint, tmp_path)
    assert "model type 'mistral' is not among the 1 types that qsens knows" in caught.value.what
    assert f"Run `qsens inspect {checkpoint}` where torch is" in caught.value.remedy
    for shown in ("language_patterns:", "vision_patterns:", "head_patterns:"):
        assert shown in caught.value.remedy
    assert "Here there are: lm_head, model.embed_tokens, model.layers.*." in caught.value.remedy
    given = ("model.language_patterns=[model.layers.*]", "model.head_patterns=[lm_head]")
    own = scored(plan_of(checkpoint, tmp_path, *given))
    llama = save(configuration("Llama", tied=False), tmp_path / "llama")
    assert own == scored(plan_of(llama, tmp_path))


@pytest.mark.parametrize(
    ("language", "head", "said"),
    [
        ("model.layers.0.*", "lm_head", "7 modules are in no part of the model, the first is"),
        ("*", "lm_head", "1 modules are in several parts (language, head) of the model"),
        ("model.layers.*,lm_head", "nothing", "model.head_patterns = nothing match no module"),
        (
            "model.layers.0.*",
            "model.layers.1.*,lm_head",
            "match model.layers.1.self_attn.q_proj, model.layers.1.self_attn.k_proj",
        ),
    ],
)
def test_patterns_that_leave_something_out_are_refused(
    language: str, head: str, said: str, tmp_path: Path
) -> None:
    checkpoint = save(configuration("Llama", tied=False), tmp_path / "checkpoint")
    config = ModelConfig(
        path=checkpoint,
        dtype="float32",
        language_patterns=tuple(language.split(",")),
        head_patterns=tuple(head.split(",")),
    )
    with pytest.raises(UserError) as caught:
        load_model(config, torch.device("cpu"))
    assert said in caught.value.what
    assert "language_patterns:" in caught.value.remedy


def test_unknown_mixtures_of_experts_are_refused_at_plan(unknown: None, tmp_path: Path) -> None:
    checkpoint = save(configuration("Qwen3-MoE", tied=False), tmp_path / "checkpoint")
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "olmoe"}))
    said = "model type 'olmoe' is a mixture of 6 experts, and is not among the 1 types that qsens"
    with pytest.raises(UserError, match=said):
        plan_of(checkpoint, tmp_path)
    given = ("model.language_patterns=[model.layers.*]", "model.head_patterns=[lm_head]")
    with pytest.raises(UserError, match=said):
        plan_of(checkpoint, tmp_path, *given)


def test_a_type_that_cannot_be_scored_says_why_at_plan(tmp_path: Path) -> None:
    checkpoint = save(configuration("Llama", tied=False), tmp_path / "checkpoint")
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "jetmoe"}))
    given = ("model.language_patterns=[model.layers.*]", "model.head_patterns=[lm_head]")
    for patterns in ((), given):
        with pytest.raises(UserError) as caught:
            plan_of(checkpoint, tmp_path, *patterns)
        assert "model type 'jetmoe' cannot be scored: " in caught.value.what
        assert "a layout of their own: JetMoeParallelExperts" in caught.value.what


def test_the_head_that_was_found_is_used(tmp_path: Path) -> None:
    """A model that does not say where its head is works by the pattern."""

    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj_out = nn.Linear(2, 2)

        def get_output_embeddings(self) -> Any:
            raise NotImplementedError

    model = Silent()
    remember_traits(model, Traits(head="proj_out"))
    assert head_of(model) is model.proj_out
