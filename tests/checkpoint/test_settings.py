"""Configurations that transformers can build no model of, told when a sweep is planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qsens.checkpoint.settings import HEADS_DIVIDE, ROPE_TYPES, check_settings
from qsens.config import ModelConfig
from qsens.errors import UserError
from qsens.identity import PATTERNS
from tests.checkpoint.test_headers import HEADER, write

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}


def check(path: Path, config: dict[str, Any], **settings: Any) -> None:
    write(path, HEADER)
    (path / "config.json").write_text(json.dumps(config))
    check_settings(ModelConfig(path=path, **settings))


def of_text(**changes: Any) -> dict[str, Any]:
    return {"model_type": "qwen3_vl", "text_config": changes}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LLAMA | {"rope_scaling": {"type": "su"}}, "rope_scaling is of type su"),
        (LLAMA | {"rope_parameters": {"rope_type": "new"}}, "rope_parameters is of type new"),
        (LLAMA | {"rope_scaling": {"rope_type": ["yarn"]}}, "rope_scaling is of type ['yarn']"),
        (of_text(rope_scaling={"type": "su"}), "text_config.rope_scaling is of type su"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"full": {"rope_type": "su"}}},
            "rope_parameters is of type su",
        ),
        (LLAMA | {"num_attention_heads": 3}, "64 is no multiple of num_attention_heads 3"),
        (LLAMA | {"num_attention_heads": 0}, "num_attention_heads is 0"),
        (LLAMA | {"num_attention_heads": -4}, "num_attention_heads is -4"),
        (LLAMA | {"hidden_size": "64"}, "hidden_size is 64"),
        (LLAMA | {"hidden_size": 64.0}, "hidden_size is 64.0"),
        (LLAMA | {"vocab_size": 10**4000}, "vocab_size is 1000"),
        (LLAMA | {"vocab_size": None}, "vocab_size is None"),
        (LLAMA | {"num_hidden_layers": 10**9}, "more than the 4 tensors of the files"),
        (of_text(num_hidden_layers=[2]), "text_config.num_hidden_layers is [2]"),
    ],
)
def test_what_no_model_can_be_built_of_is_refused(
    config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        check(tmp_path, config)
    assert said in caught.value.what
    assert caught.value.where == str(tmp_path / "config.json")
    assert len(caught.value.what) < 400
    check(tmp_path, config, trust_remote_code=True)  # which may know it
    check(tmp_path, config | {"model_type": "another"})


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        {"model_type": "llama"},
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}},
        LLAMA | {"rope_scaling": None},
        {"model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 3, "head_dim": 32},
        {"model_type": "qwen2_5_vl", "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}},
    ],
)
def test_what_can_be_built_is_taken(config: dict[str, Any], tmp_path: Path) -> None:
    check(tmp_path, config)


def test_tables_are_those_of_transformers() -> None:
    """Held equal here, since nothing that plans imports it."""
    assert ROPE_TYPES - {"default", "mrope"} == set(ROPE_INIT_FUNCTIONS)
    refused = set()
    for kind in PATTERNS:
        try:
            AutoConfig.for_model(kind, hidden_size=64, num_attention_heads=3)
        except Exception:
            refused.add(kind)
    assert refused == HEADS_DIVIDE
