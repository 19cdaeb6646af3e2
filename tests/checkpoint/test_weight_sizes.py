"""What the headers of a checkpoint say of the size of its weights and layers."""

from __future__ import annotations

from qsens.checkpoint.weight_sizes import WeightSizes

SHAPES = {
    "model.embed_tokens.weight": (100, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.experts.0.up_proj.weight": (16, 8),
    "model.layers.0.mlp.experts.1.up_proj.weight": (16, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "model.layers.2.self_attn.q_proj.weight": (8, 8),
    "model.visual.blocks.0.attn.qkv.weight": (24, 8),
    "lm_head.weight": (100, 8),
}


def test_bytes_of_all_of_layers_and_of_what_a_device_holds() -> None:
    sizes = WeightSizes.of(SHAPES, "bfloat16")
    # Layers: 64 + 2 * 128, 64, 64, and 192 in the tower; outside: 2 * 800 and a vector of 8.
    assert sizes == WeightSizes(total=2 * (640 + 1608), layers=2 * 640, largest=2 * 320)
    assert sizes.streamed == 2 * (1608 + 2 * 320)
    assert WeightSizes.of(SHAPES, "float32").total == 2 * sizes.total


def test_without_layers_nothing_is_streamed() -> None:
    sizes = WeightSizes.of({"lm_head.weight": (4, 4)}, "float32")
    assert (sizes.total, sizes.layers, sizes.streamed) == (64, 0, 64)


def test_the_words_name_the_limit_that_is_too_small() -> None:
    sizes = WeightSizes(total=64 << 30, layers=60 << 30, largest=1 << 30)
    assert sizes.placement(24) == (
        "weights: 64.00 GiB, more than autoquant.memory_gb=24: 6.00 GiB of them are on the device "
        "at once, and 60.00 GiB cross the bus each way that a window of samples goes"
    )
    assert "64.00 GiB; where they do not fit" in sizes.placement(80)
    assert "where they do not fit" in sizes.placement(None)
