"""Which modules share a format: ModelOpt's rules, without ModelOpt."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.algorithms import AutoQuantizeGradientSearcher

from qsens.checkpoint.groups import shared_key

# What names of modules are made of, in families that ModelOpt has rules for and in others.
PARTS = [
    *("model", "language_model", "layers", "visual", "blocks", "0", "17", "self_attn", "attn"),
    *("mlp", "mixer", "experts", "local_experts", "shared_experts", "shared_expert", "linear_attn"),
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "qkv", "o_proj", "gate_proj", "up_proj"),
    *("down_proj", "gate_up_proj", "w1", "w2", "w3", "w1_linear", "w2_linear", "w3_linear"),
    *("linear_fc1", "linear_fc2", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b"),
    *("in_proj_qkvz", "in_proj_ba", "out_proj", "block_sparse_moe", "ffn", "lm_head"),
]


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map(".".join))
@example("model.layers.0.self_attn.q_proj")
@example("model.layers.3.mlp.experts.12.down_proj")
@example("model.layers.3.mlp.shared_experts.gate_proj")
@example("backbone.layers.1.mixer.experts.7.up_proj")
@example("decoder.layers.1.mlp.experts.local_experts.7.linear_fc1")
@example("model.layers.0.block_sparse_moe.experts.3.w2")
@example("transformer.blocks.0.ffn.experts.mlp.w1_linear.5")
@example("model.layers.2.linear_attn.in_proj_qkv")
@example("model.layers.2.linear_attn.in_proj_b")
@example("q_proj")
def test_modules_share_a_format_as_modelopt_says(name: str) -> None:
    searcher = AutoQuantizeGradientSearcher()
    searcher.model = None
    keys = (searcher._apply_quant_group_rule(name, rule) for rule in searcher.quant_grouping_rules)
    assert shared_key(name) == next((key for key in keys if key is not None), name)


@pytest.mark.parametrize(
    ("fused", "apart"),
    [
        (("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), "self_attn.kv_b_proj"),
        (("feed_forward.w1", "feed_forward.w3"), "feed_forward.w2"),
        (("attention.self.query", "attention.self.key", "attention.self.value"), "output.dense"),
    ],
)
def test_what_engines_fuse_shares_a_format_too(fused: tuple[str, ...], apart: str) -> None:
    keys = {shared_key(f"model.layers.3.{name}") for name in fused}
    assert len(keys) == 1
    others = [f"model.layers.4.{fused[0]}", f"model.layers.3.{apart}"]
    assert not keys & {shared_key(name) for name in others}


def test_keys_and_values_of_rwkv_are_apart() -> None:
    names = [
        f"rwkv.blocks.1.{part}.{name}"
        for part in ("attention", "feed_forward")
        for name in ("key", "value", "receptance")
    ]
    assert len({shared_key(name) for name in names}) == len(names)


def test_a_pass_imports_no_modelopt() -> None:
    words = "import sys, qsens.pipeline.compute, qsens.pipeline.audit, qsens.pipeline.publish"
    check = "sys.exit('modelopt' in sys.modules)"
    subprocess.run([sys.executable, "-c", f"{words}; {check}"], check=True)
