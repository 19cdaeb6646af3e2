"""What a pass runs on is what the sweep was planned for, and what is not scored is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsens.errors import AnswerIsNo, UserError
from qsens.grid import Plan
from qsens.pipeline.cell import score
from qsens.pipeline.recipe import write_recipe
from qsens.pipeline.sweep import run_sweep
from qsens.results import read_manifest
from qsens.store import Store
from tests.checkpoint.hostile import plan_of, write_captions
from tests.checkpoint.tiny_families import CAPTIONS, configuration, save

WEIGHTS = "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def lines(tmp_path: Path) -> str:
    return write_captions(tmp_path / "lines", small=CAPTIONS)


def plan(checkpoint: Path, tmp_path: Path, lines: str, *overrides: str) -> Plan:
    files = "dataset.files.small=captions_small.txt"
    return plan_of(
        checkpoint, tmp_path / "results", lines, files, "model.dtype=float32", *overrides
    )


def edit(checkpoint: Path, **changes: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_text()) | changes
    (checkpoint / "config.json").write_text(json.dumps(config))


def replace(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    held = load_file(checkpoint / WEIGHTS) | tensors
    save_file(held, checkpoint / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(configuration("Llama", tied=True), tmp_path / "llama")


@pytest.mark.parametrize("change", ["weights", "config", "tokenizer", "added"])
def test_a_checkpoint_that_changed_since_the_plan_is_refused(
    change: str, llama: Path, tmp_path: Path, lines: str
) -> None:
    """Its scores would stand under the digest of another."""
    planned = plan(llama, tmp_path, lines)
    if change == "weights":
        replace(llama, {"model.norm.weight": torch.full((32,), 2.0)})
    elif change == "config":
        edit(llama, rms_norm_eps=1e-2)
    elif change == "tokenizer":
        file = llama / "tokenizer.json"
        file.write_text(file.read_text() + "\n")
    else:
        (llama / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="is not that of the plan") as caught:
        score(planned, "wint8_afp16-small")
    assert "Plan the sweep again" in caught.value.remedy
    assert not Store(planned).is_done(planned.cells[0])


def test_layers_that_are_left_out_are_said_in_manifest_and_report(
    llama: Path, tmp_path: Path, lines: str
) -> None:
    edit(llama, num_hidden_layers=1)
    planned = plan(llama, tmp_path, lines)
    _, errors = run_sweep(planned)
    assert errors == []
    # Seven projections and two norms of the second layer; of all, the embedding and the last norm.
    said = (
        "9 of 20 weights in the files are not used, the first is "
        "model.layers.1.input_layernorm.weight: "
    )
    published = Store(planned).published(planned.cells[0])["manifest"]
    assert any(notice.startswith(said) for notice in read_manifest(published).notices)
    for suffix in ("md", "json", "html"):
        page = published.with_name(f"per-layer-sensitivity.{suffix}")
        assert said in page.read_text(encoding="utf-8")


def test_files_beside_are_said_in_plan_and_manifest(
    llama: Path, tmp_path: Path, lines: str
) -> None:
    (llama / "consolidated.safetensors").write_bytes((llama / WEIGHTS).read_bytes())
    planned = plan(llama, tmp_path, lines)
    said = (
        "1 weight files beside those of the checkpoint are not read, the first is "
        "consolidated.safetensors"
    )
    assert said in planned.notices
    _, errors = run_sweep(planned)
    assert errors == []
    published = Store(planned).published(planned.cells[0])["manifest"]
    assert said in read_manifest(published).notices


@pytest.mark.parametrize("own", [True, False], ids=["another head", "the same head"])
def test_a_recipe_calls_a_head_tied_as_it_was_loaded(
    own: bool, llama: Path, tmp_path: Path, lines: str
) -> None:
    """The configuration ties it either way; at 8 bits, one that is tied must stay at 16."""
    embedding = load_file(llama / WEIGHTS)[EMBEDDING]
    replace(llama, {HEAD: embedding.flip(0) if own else embedding.clone()})
    planned = plan(llama, tmp_path, lines)
    assert planned.checkpoint.tied_head is not own
    said = [notice for notice in planned.notices if "hold another head" in notice]
    assert bool(said) is own
    published, errors = run_sweep(planned)
    assert errors == []
    directory = str(Path(published["index"]).parent)
    if not own:
        with pytest.raises(AnswerIsNo, match="the least is"):
            write_recipe(directory, bits=8, target="json")
        return
    recipe = json.loads(write_recipe(directory, bits=8, target="json")["recipe"])
    (head,) = (one for one in recipe["choices"] if one["members"] == ["lm_head"])
    assert head["format"] == "wint8_afp16"


def test_a_head_that_the_plan_got_wrong_is_refused(llama: Path, tmp_path: Path, lines: str) -> None:
    planned = plan(llama, tmp_path, lines)
    wrong = planned.checkpoint.model_copy(update={"tied_head": False})
    with pytest.raises(UserError, match="the head is tied to the embedding as it is loaded") as one:
        score(planned.model_copy(update={"checkpoint": wrong}), "wint8_afp16-small")
    assert '"tie_word_embeddings": true' in one.value.remedy


def test_a_quantized_checkpoint_is_refused_when_planned(
    llama: Path, tmp_path: Path, lines: str
) -> None:
    """Before a family or a format is looked at, and again where the plan is older."""
    planned = plan(llama, tmp_path, lines)
    name = "model.layers.0.mlp.down_proj.weight"
    codes = (load_file(llama / WEIGHTS)[name] * 100).to(torch.float8_e4m3fn)
    replace(llama, {name: codes, f"{name}_scale": torch.tensor(0.01)})
    with pytest.raises(UserError, match=f"quantized already: {name} is F8_E4M3"):
        plan(llama, tmp_path, lines)
    with pytest.raises(UserError, match=f"quantized already: {name} is F8_E4M3"):
        score(planned, "wint8_afp16-small")
