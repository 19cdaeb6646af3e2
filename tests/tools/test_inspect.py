"""Checkpoints of types that the package does not know: inspected once, planned without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qsens.checkpoint import structure
from qsens.checkpoint.components import find_structure, resolve_components
from qsens.checkpoint.structure import Structure, Traits
from qsens.config import ModelConfig
from qsens.errors import UserError
from qsens.tools.inspect import inspect
from tests.checkpoint.tiny_families import configuration, save

# A language model of one linear layer, in the checkpoint's own code.
OWN_CODE = """
import torch
from torch import nn
from transformers import PreTrainedModel, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput

class TinyConfig(PretrainedConfig):
    model_type = "own_tiny"
    def __init__(self, hidden_size=64, vocab_size=96, num_hidden_layers=2, factor=1.0, **more):
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.num_hidden_layers, self.factor = num_hidden_layers, factor
        super().__init__(**more)

class Layer(GradientCheckpointingLayer):
    def __init__(self, size):
        super().__init__()
        self.mix = nn.Linear(size, size)
        self.fade = nn.Conv1d(size, size, 2, groups=size, padding=1)
    def forward(self, x):
        seen = self.fade(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return x + torch.tanh(self.mix(seen))

class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [Layer(config.hidden_size) for _ in range(config.num_hidden_layers)]
        self.steps = nn.ModuleList(layers)
        self.out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
    def get_input_embeddings(self): return self.table
    def get_output_embeddings(self): return self.out
    def forward(self, input_ids, **kwargs):
        x = self.table(input_ids)
        for step in self.steps:
            x = step(x)
        return CausalLMOutput(logits=self.out(x) * self.config.factor)
"""


def own(path: Path) -> Path:
    path.mkdir()
    (path / "own.py").write_text(OWN_CODE)
    described = {
        "model_type": "own_tiny",
        "architectures": ["TinyModel"],
        "auto_map": {"AutoConfig": "own.TinyConfig", "AutoModelForCausalLM": "own.TinyModel"},
        "hidden_size": 256,
        "num_hidden_layers": 9,
    }
    (path / "config.json").write_text(json.dumps(described))
    save_file({"table.weight": torch.zeros(96, 256)}, path / "model.safetensors")
    return path


def test_own_code_is_inspected_and_planned_with(tmp_path: Path) -> None:
    checkpoint, results = own(tmp_path / "own"), tmp_path / "results"
    config = ModelConfig(path=checkpoint, trust_remote_code=True)
    with pytest.raises(UserError, match="'own_tiny' is not among"):
        resolve_components(config, results)
    found, file = inspect(config, results)
    assert found == Structure(("steps.*",), (), ("out",), Traits(head="out"))
    assert file.parent == results / ".inspections"
    assert find_structure(config, results) == found
    resolved = resolve_components(config, results)
    assert (resolved.language_patterns, resolved.head_patterns) == (("steps.*",), ("out",))
    # Another file, and other code: another model.
    before = (checkpoint / "own.py").read_text()
    (checkpoint / "own.py").write_text(before + "\n")
    with pytest.raises(UserError, match="'own_tiny' is not among"):
        resolve_components(config, results)
    (checkpoint / "own.py").write_text(before)
    assert find_structure(config, results) == found


def test_what_cannot_be_scored_is_kept_too(tmp_path: Path) -> None:
    checkpoint, results = own(tmp_path / "own"), tmp_path / "results"
    code = (checkpoint / "own.py").read_text()
    (checkpoint / "own.py").write_text(code.replace("* self.config.factor", ".cumsum(-1)"))
    config = ModelConfig(path=checkpoint, trust_remote_code=True)
    with pytest.raises(UserError, match="neither scaled nor capped outputs of its head"):
        inspect(config, results)
    with pytest.raises(UserError, match="'own_tiny' cannot be scored: its logits are neither"):
        resolve_components(config, results)


def test_code_that_is_not_trusted_does_not_run(tmp_path: Path) -> None:
    checkpoint = own(tmp_path / "own")
    with pytest.raises(UserError, match="builds no small model") as caught:
        inspect(ModelConfig(path=checkpoint), tmp_path / "results")
    assert "model.trust_remote_code=true" in caught.value.remedy


def test_a_family_is_found_as_the_package_has_it(tmp_path: Path) -> None:
    for family in ("Qwen3-VL", "Gemma 3", "Qwen3-MoE"):
        checkpoint = save(configuration(family, tied=False), tmp_path / family.replace(" ", "_"))
        kind = json.loads((checkpoint / "config.json").read_text())["model_type"]
        found, _ = inspect(ModelConfig(path=checkpoint), tmp_path / "results")
        shipped = structure.structure_of(kind)
        assert isinstance(shipped, Structure)
        assert (found.language, found.vision, found.head) == (
            shipped.language,
            shipped.vision,
            shipped.head,
        )
        assert found.traits == shipped.traits


def test_the_verb(tmp_path: Path) -> None:
    checkpoint = save(configuration("Llama", tied=True), tmp_path / "checkpoint")
    done = subprocess.run(
        [sys.executable, "-m", "qsens", "inspect", str(checkpoint), "--json"],
        env={**os.environ, "QSENS_RESULTS": str(tmp_path / "results")},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert answer["language"] == ["model.layers.*"]
    assert answer["tied"] is True
    assert Path(answer["file"]).is_file()
