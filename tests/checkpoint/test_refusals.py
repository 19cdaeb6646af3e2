"""Checkpoints that transformers refuses, each in its own way: one message, for the user to mend."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qsens.checkpoint.loading import load_model, load_tokenizer
from qsens.checkpoint.refusals import refusals
from qsens.config import ModelConfig
from qsens.data.chat import load_processor
from qsens.data.samples import Samples, refuse_unknown_tokens, tokenize
from qsens.errors import TryAgain, UserError
from tests.checkpoint.tiny_families import configuration, save

CPU = torch.device("cpu")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(configuration("Llama", tied=False), tmp_path / "llama")


def edit(file: Path, **changes: Any) -> None:
    held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(held | changes), encoding="utf-8")


def refused(work: Callable[[], object], said: str) -> UserError:
    with pytest.raises(UserError) as caught:
        work()
    error = caught.value
    assert error.exit_code == 2
    assert said in error.what
    assert error.what.isprintable()
    assert len(error.what) < 500
    assert error.where
    assert error.remedy
    return error


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_parameters": {"rope_type": "su"}}, "cannot load it: KeyError: 'su'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "cannot load model type 'llama': "),
        ({"num_attention_heads": 3}, "is not a multiple of the number of attention heads (3)"),
        ({"num_attention_heads": 0}, "cannot load model type 'llama': "),
        ({"num_hidden_layers": "two"}, "cannot load model type 'llama': "),
        ({"hidden_act": "\u001b[2J"}, "cannot load it: KeyError: "),
        ({"hidden_act": None}, "'hidden_act' expected str, got NoneType"),
        ({"vocab_size": -1}, "cannot load it: "),
        ({"model_type": ["llama"]}, "cannot load model type '['llama']': "),
        ({"torch_dtype": "float7", "dtype": "float7"}, "cannot load "),
    ],
)
def test_a_configuration_is_refused_in_one_message(
    changes: dict[str, Any], said: str, llama: Path
) -> None:
    edit(llama / "config.json", **changes)
    refused(lambda: load_model(ModelConfig(path=llama, dtype="float32"), CPU), said)


@pytest.mark.parametrize(
    "asked",
    ["flash_attention_2", "flash_attention_3", "flex_attention", "nobody/knows", "sdpa", "eager"],
)
@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_attention_is_what_is_there(asked: str, key: str, llama: Path) -> None:
    edit(llama / "config.json", **{key: asked})
    model: Any = load_model(ModelConfig(path=llama, dtype="float32"), CPU)
    assert model.config._attn_implementation in ("eager", "sdpa")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert bool(logits.isfinite().all())


def test_eager_attention_stays(llama: Path) -> None:
    """Whoever asks for it gets other roundings: numbers that are stored are of them."""
    edit(llama / "config.json", _attn_implementation="eager")
    model: Any = load_model(ModelConfig(path=llama, dtype="float32"), CPU)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Unknown"}}'),
        ("tokenizer.json", '{"model": ' + "[" * 5000 + "]" * 5000 + "}"),
        ("tokenizer_config.json", '{"tokenizer_class": 7}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
    ],
)
def test_a_broken_tokenizer_is_refused(name: str, content: str, llama: Path) -> None:
    (llama / name).write_text(content)
    refused(lambda: load_tokenizer(ModelConfig(path=llama)), "its tokenizer cannot be loaded: ")


def test_what_is_wrong_with_the_configuration_is_not_said_of_the_tokenizer(llama: Path) -> None:
    edit(llama / "config.json", num_attention_heads=3)
    refused(lambda: load_tokenizer(ModelConfig(path=llama)), "cannot load model type 'llama'")


def test_a_tokenizer_without_a_word_for_what_it_does_not_know(llama: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=llama))
    tokenizer.backend_tokenizer.model.unk_token = "gone"
    refused(lambda: tokenize(["nobody knows"], tokenizer, longest=9), "its tokenizer fails: ")


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"size": 5, "patch_size": 1}', '{"resample": "x", "size": [1]}']
)
def test_a_broken_processor_is_refused(content: str, tmp_path: Path) -> None:
    path = save(configuration("Qwen3-VL", tied=True), tmp_path / "seeing")
    (path / "preprocessor_config.json").write_text(content)
    config = ModelConfig(path=path)
    tokenizer = load_tokenizer(config)
    refused(lambda: load_processor(config, tokenizer), "processor cannot be loaded: ")


@pytest.mark.parametrize(("ids", "strange"), [((0, 9, 10), 10), ((1 << 40, 2), 1 << 40)])
def test_a_token_beyond_the_embedding_is_named(ids: tuple[int, ...], strange: int) -> None:
    samples = Samples(((1, 2), ids), (False, False))
    refuse_unknown_tokens(samples, max(ids) + 1)
    refused(
        lambda: refuse_unknown_tokens(samples, 10),
        f"token {strange} of sample 2 is beyond the embedding, which has 10 rows",
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.EIO, "Input/output error"),
        TryAgain("later"),
        KeyboardInterrupt(),
    ],
)
def test_what_may_pass_stays_what_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, refusals("fails", where="here", remedy="mend it"):
        raise error
    assert caught.value is error
    assert not isinstance(error, UserError)
