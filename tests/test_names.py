"""What a module is, from its name: the words of several families."""

from __future__ import annotations

import pytest

from qsens.names import kind_of


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", "qkv"),
        ("transformer.h.0.attn.c_attn", "qkv"),
        ("transformer.h.0.self_attention.query_key_value", "qkv"),
        ("model.layers.0.self_attn.kv_b_proj", "qkv"),
        ("model.layers.0.linear_attn.in_proj_qkv", "qkv"),
        ("model.layers.3.self_attn.o_proj", "o"),
        ("transformer.h.0.attn.c_proj", "o"),
        ("transformer.h.0.mlp.c_proj", "down"),
        ("transformer.h.0.mlp.c_fc", "gate_up"),
        ("model.decoder.layers.0.fc2", "down"),
        ("model.layers.0.mlp.experts", "experts"),
        ("lm_head", "head"),
        ("model.visual.blocks.0.attn.qkv", "vision"),
        ("backbone.layers.0.mixer.x_proj", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind
