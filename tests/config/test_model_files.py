"""The shipped model files: each loads, and says where its checkpoint comes from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qsens.config import Roots, choices, load_sweep
from qsens.errors import UserError

REPO = Path(__file__).resolve().parents[2]
ROOTS = Roots(root=REPO, results=REPO, configs=(REPO / "configs",))
REPOSITORIES = {
    "qwen3_vl_2b_instruct": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3_vl_4b_instruct": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3_vl_8b_instruct": "Qwen/Qwen3-VL-8B-Instruct",
    "qwen3_vl_32b_instruct": "Qwen/Qwen3-VL-32B-Instruct",
    "qwen3_vl_30b_a3b_instruct": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "qwen2_5_vl_3b_instruct": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2_5_vl_7b_instruct": "Qwen/Qwen2.5-VL-7B-Instruct",
    "smollm2_135m": "HuggingFaceTB/SmolLM2-135M",
    "tiny_qwen3_vl": None,
}


def test_these_are_all_model_files() -> None:
    assert set(choices("model", ROOTS)) == set(REPOSITORIES)


@pytest.mark.parametrize("name", REPOSITORIES)
def test_model_file_loads(name: str) -> None:
    model = load_sweep("single", [f"model={name}"], roots=ROOTS).config.model
    repository = REPOSITORIES[name]
    assert model.name == name
    assert model.short_name == name.removesuffix("_instruct")
    assert model.hub.repository == repository
    assert model.path.parent == REPO / "models" / name / "checkpoints"
    if repository is None:
        assert model.dtype == "float32"
        return
    assert model.path.name == repository.split("/")[1]
    assert re.fullmatch(r"[0-9a-f]{40}", model.hub.revision), "a branch may move"
    assert model.dtype == "bfloat16"
    assert model.trust_remote_code is False


def test_every_checkpoint_has_results_and_a_commit_of_its_own() -> None:
    models = [
        load_sweep("single", [f"model={name}"], roots=ROOTS).config.model for name in REPOSITORIES
    ]
    assert len({model.name for model in models}) == len(models)
    assert len({model.short_name for model in models}) == len(models)
    assert len({model.path for model in models}) == len(models)
    assert len({(model.hub.repository, model.hub.revision) for model in models}) == len(models)
    assert len({model.hub.revision for model in models}) == len(models)


@pytest.mark.parametrize("repository", ["Qwen", "a/b/c", "../x", "a/..", "a b/c"])
def test_what_is_no_repository_is_refused(repository: str) -> None:
    with pytest.raises(UserError) as caught:
        load_sweep("single", [f"model.hub.repository={repository}"], roots=ROOTS)
    assert "model.hub.repository" in caught.value.where
