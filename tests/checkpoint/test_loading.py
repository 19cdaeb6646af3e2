"""Loading: the files that are read are those that count, and what of them a model does not take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qsens.checkpoint.files import find_weights, identify
from qsens.checkpoint.loading import has_tied_head, load_model
from qsens.checkpoint.structure import Structure, structure_of
from qsens.config import ModelConfig
from qsens.errors import UserError
from tests.checkpoint.tiny_families import configuration, save

Tensors = dict[str, torch.Tensor]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(configuration("Llama", tied=False), tmp_path_factory.mktemp("llama"))


def copied(source: Path, target: Path) -> Path:
    """Copy a checkpoint without its weights."""
    target.mkdir()
    for file in source.iterdir():
        if file.name != WEIGHTS:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def write(tensors: Tensors, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)


def write_shards(path: Path, tensors: Tensors, names: tuple[str, str] = SHARDS) -> dict[str, str]:
    """Put every other tensor into the first file, with an index; return its weight map."""
    held = sorted(tensors)
    for at, name in enumerate(names):
        write({key: tensors[key] for key in held[at::2]}, path / name)
    places = {key: names[at % 2] for at, key in enumerate(held)}
    write_index(path, places)
    return places


def write_index(path: Path, places: dict[str, str]) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def load(path: Path, **settings: object) -> torch.nn.Module:
    return load_model(ModelConfig(path=path, dtype="float32", **settings), torch.device("cpu"))  # type: ignore[arg-type]


# Which files are read: each case writes the right weights, and others beside them.


def single(path: Path, right: Tensors, wrong: Tensors) -> None:
    write(right, path / WEIGHTS)
    write(wrong, path / "model.fp16.safetensors")
    write(wrong, path / "consolidated.safetensors")
    torch.save(wrong, path / "pytorch_model.bin")


def shards(path: Path, right: Tensors, wrong: Tensors) -> None:
    write_shards(path, right)
    write(wrong, path / "consolidated.safetensors")
    write(wrong, path / "model-00003-of-00003.safetensors")
    write(wrong, path / "MODEL.SAFETENSORS")


def shards_below(path: Path, right: Tensors, wrong: Tensors) -> None:
    write_shards(path, right, ("a/model.safetensors", "b/model.safetensors"))
    write(wrong, path / "b/model-2.safetensors")


def part_of_an_index(path: Path, right: Tensors, wrong: Tensors) -> None:
    places = write_shards(path, right)
    first = {places[name]: name for name in sorted(places, reverse=True)}
    write_index(path, {name: file for file, name in first.items()})


def links(path: Path, right: Tensors, wrong: Tensors) -> None:
    write(right, path.parent / "blobs" / "0123")
    (path / WEIGHTS).symlink_to(Path("..") / "blobs" / "0123")


def named_by_config(path: Path, right: Tensors, wrong: Tensors) -> None:
    write(right, path / "consolidated.safetensors")
    write(wrong, path / WEIGHTS)
    edit_config(path, transformers_weights="consolidated.safetensors")


CASES = [single, shards, shards_below, part_of_an_index, links, named_by_config]


@pytest.mark.parametrize("lay", CASES)
def test_the_files_that_count_are_those_that_are_loaded(
    lay: Callable[[Path, Tensors, Tensors], None], llama: Path, tmp_path: Path
) -> None:
    """By transformers left alone as well: the rule is its own."""
    right = load_file(llama / WEIGHTS)
    path = copied(llama, tmp_path / "copy")
    lay(path, right, {name: tensor + 1 for name, tensor in right.items()})
    found = find_weights(path)
    held: Tensors = {}
    for file in found.files:
        held |= load_file(file)
    assert held.keys() == right.keys() == found.tensors.keys()
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    for model in (load(path), theirs):
        loaded = model.state_dict()
        assert all(torch.equal(loaded[name], held[name]) for name in right)
    assert all(torch.equal(held[name], right[name]) for name in right)


def test_of_an_index_beside_one_file_transformers_reads_the_file(
    llama: Path, tmp_path: Path
) -> None:
    """Why the two together are refused: whoever hashes what the index names hashes others."""
    right = load_file(llama / WEIGHTS)
    path = copied(llama, tmp_path / "copy")
    write_shards(path, right)
    wrong = {name: tensor + 1 for name, tensor in right.items()}
    write(wrong, path / WEIGHTS)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    assert torch.equal(theirs["lm_head.weight"], wrong["lm_head.weight"])
    with pytest.raises(UserError, match="which names other files"):
        load(path)


# Heads


TIED = {
    "gemma3": True,
    "gemma3_text": True,
    "llama": False,
    "qwen2_5_vl": False,
    "qwen3": False,
    "qwen3_moe": False,
    "qwen3_vl": False,
    "qwen3_vl_moe": False,
}
FAMILIES = ["Llama", "Qwen3-VL", "Gemma 3", "Gemma 3, text alone", "Qwen2.5-VL"]


@pytest.fixture(scope="module", params=FAMILIES)
def tied_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.param.replace(" ", "_")
    return save(configuration(request.param, tied=True), tmp_path_factory.mktemp(name))


@pytest.mark.parametrize("said", ["tied", "untied", "silent", "inner", "inner alone"])
def test_a_tied_head_is_planned_as_it_is_loaded(
    tied_family: Path, said: str, tmp_path: Path
) -> None:
    """Whatever the files hold: one weight, two that are equal, two that differ.

    What transformers cannot load, for lack of a weight, is refused.
    """
    tensors = load_file(tied_family / WEIGHTS)
    (embedding,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    rest = {name: value for name, value in tensors.items() if name != embedding}
    weight = tensors[embedding]
    holdings = {
        "embedding": {embedding: weight},
        "head": {"lm_head.weight": weight},
        "equal": {embedding: weight, "lm_head.weight": weight.clone()},
        "others": {embedding: weight, "lm_head.weight": 1.5 * weight},
    }
    loaded: dict[str, bool] = {}
    refused: dict[str, str] = {}
    for holding, two in holdings.items():
        path = copied(tied_family, tmp_path / holding)
        write(rest | two, path / WEIGHTS)
        config = json.loads((path / "config.json").read_text())
        for section in (config, config.get("text_config", {})):
            section.pop("tie_word_embeddings", None)
        if said in ("tied", "untied", "inner"):
            config["tie_word_embeddings"] = said == "tied"
        if said.startswith("inner"):
            config.setdefault("text_config", {})["tie_word_embeddings"] = True
        if "text_config" not in json.loads((tied_family / "config.json").read_text()):
            config.pop("text_config", None)
        (path / "config.json").write_text(json.dumps(config))
        try:
            loaded[holding] = has_tied_head(load(path))
        except UserError as error:
            refused[holding] = error.what
        else:
            assert identify(path).tied_head is loaded[holding]
    kind = json.loads((tied_family / "config.json").read_text())["model_type"]
    ties = said == "tied" or (said in ("silent", "inner alone") and TIED[kind])
    assert all("1 weights are missing" in what for what in refused.values())
    assert loaded == (
        {"embedding": True, "head": True, "equal": True, "others": False}
        if ties
        else {"equal": False, "others": False}
    )


def test_heads_are_compared_as_they_are_loaded(tmp_path: Path) -> None:
    """In fewer bits, two that differ in the files may be one; of two data types as well."""
    path = save(configuration("Llama", tied=True), tmp_path / "c")
    tensors = load_file(path / WEIGHTS)
    embedding = tensors["model.embed_tokens.weight"]
    heads = {
        "bfloat16": embedding.bfloat16(),
        "float16": embedding.half().float(),
        "float32": embedding.double(),
    }
    for near, head in heads.items():
        save_file(tensors | {"lm_head.weight": head}, path / WEIGHTS)
        for dtype in heads:
            model = load_model(ModelConfig(path=path, dtype=dtype), torch.device("cpu"))  # type: ignore[arg-type]
            tied = has_tied_head(model)
            assert tied is (dtype == near or near == "float32")
            assert identify(path, dtype=dtype).tied_head is tied


def test_defaults_of_tied_heads_are_those_of_transformers() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for kind, tied in TIED.items():
        known = structure_of(kind)
        assert isinstance(known, Structure)
        assert CONFIG_MAPPING[kind].tie_word_embeddings is tied is known.tied
