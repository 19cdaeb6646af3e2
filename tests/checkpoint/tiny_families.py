"""A tiny checkpoint of each family, built from its configuration with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

from qsens.checkpoint.loading import auto_class

CAPTIONS = [
    "a red circle left of a blue square",
    "two green squares",
    "a blue circle above a red square and a green circle",
    "three red circles",
]
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})
# Ids of the special tokens that configurations name; no caption holds them.
IMAGE, VIDEO, START, END, PAD = range(len(WORDS), len(WORDS) + 5)
VOCABULARY = len(WORDS) + 8

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # Large enough that the output depends on the input.
    "initializer_range": 0.2,
    "bos_token_id": PAD,
    "eos_token_id": PAD,
    "pad_token_id": PAD,
}
_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_QWEN3_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
# No width is that of another matrix; blocks of 16 and of 32 divide the experts' inner width.
_MIXTURE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96}


def configuration(family: str, *, tied: bool) -> Any:
    """Return the configuration of a family's tiny model."""
    tie = {"tie_word_embeddings": tied}
    text = _TEXT | tie
    if family == "Qwen3-VL":
        rope = {"rope_parameters": _ROPE | {"mrope_interleaved": True}}
        return Qwen3VLConfig(text_config=text | rope, vision_config=_QWEN3_VISION, **_IDS, **tie)
    if family == "Qwen3-VL-MoE":
        rope = {"rope_parameters": _ROPE | {"mrope_interleaved": True}}
        return Qwen3VLMoeConfig(
            text_config=text | rope | _MIXTURE, vision_config=_QWEN3_VISION, **_IDS, **tie
        )
    if family == "Qwen2.5-VL":
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        }
        rope = {"rope_parameters": _ROPE}
        return Qwen2_5_VLConfig(text_config=text | rope, vision_config=vision, **_IDS, **tie)
    if family == "Gemma 3":
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        }
        return Gemma3Config(
            text_config=text | {"sliding_window": 4, "layer_types": _GEMMA_LAYERS},
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
            **tie,
        )
    if family == "Gemma 3, text alone":
        return Gemma3TextConfig(**text, sliding_window=4, layer_types=_GEMMA_LAYERS)
    if family == "Qwen3":
        return Qwen3Config(**text)
    if family == "Qwen3-MoE":
        return Qwen3MoeConfig(**text, **_MIXTURE)
    assert family == "Llama"
    return LlamaConfig(**text)


_GEMMA_LAYERS = ["sliding_attention", "full_attention"]


def save(config: Any, path: Path) -> Path:
    """Save a model of that configuration, its weights drawn with a seed, and a tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_class(config).from_config(config, dtype=torch.float32)
    model.save_pretrained(path)
    inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, WORDS[0]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(path)
    return path
