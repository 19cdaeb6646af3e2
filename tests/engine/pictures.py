"""Tiny models that see, with random weights, and samples of a picture and its caption."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from qsens.data.samples import Picture, Samples

IMAGE, START, END = 190, 192, 193
# Qwen2.5-VL's windows are 4x4 patches here: one whole, six of which five are cut, one narrow.
GRIDS = ((1, 4, 4), (1, 6, 10), (1, 2, 4))
FAMILIES = ("Qwen3-VL", "Qwen2.5-VL")
# Groups of the tower: patches, three layers, merger, two for deepstack; patches, three layers,
# merger.
TOWER = {"Qwen3-VL": 1 + 3 * 4 + 2 + 2 * 2, "Qwen2.5-VL": 1 + 3 * 4 + 2}

_TEXT: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "initializer_range": 0.1,
}
_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": 191,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "tie_word_embeddings": False,
}


def model(family: str = "Qwen3-VL", patch: int = 8) -> Any:
    """Return a model of three layers and three vision layers, in evaluation mode.

    Two layers of Qwen3-VL's tower are seen by the decoder; two of Qwen2.5-VL's look at windows of
    4x4 patches, the one between them at whole pictures.

    Args:
        family: One of ``FAMILIES``.
        patch: Side of a patch, in pixels.
    """
    torch.manual_seed(0)
    if family == "Qwen3-VL":
        deep = Qwen3VLConfig(
            text_config=_TEXT | {"rope_parameters": _ROPE | {"mrope_interleaved": True}},
            vision_config=_VISION
            | {
                "patch_size": patch,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
            **_IDS,
        )
        return Qwen3VLForConditionalGeneration(deep).eval().requires_grad_(False)
    windowed = Qwen2_5_VLConfig(
        text_config=_TEXT | {"rope_parameters": _ROPE},
        vision_config=_VISION
        | {"patch_size": patch, "window_size": 4 * patch, "fullatt_block_indexes": [1]},
        **_IDS,
    )
    return Qwen2_5_VLForConditionalGeneration(windowed).eval().requires_grad_(False)


def samples(count: int) -> Samples:
    """Return samples of three picture sizes; captions of four to seven tokens."""
    generator = torch.Generator().manual_seed(1)

    def words(length: int) -> list[int]:
        return torch.randint(0, 180, (length,), generator=generator).tolist()

    ids, spans, pictures = [], [], []
    for index in range(count):
        grid = GRIDS[index % 3]
        patches = grid[1] * grid[2]
        question = [*words(2), START, *[IMAGE] * (patches // 4), END, *words(3)]
        caption = words(4 + index % 4)
        ids.append((*question, *caption, *words(1)))
        spans.append(((len(question), len(question) + len(caption)),))
        tensors = {
            "pixel_values": torch.randn(patches, 3 * 2 * 8 * 8, generator=generator),
            "image_grid_thw": torch.tensor([grid]),
        }
        shown = {"mm_token_type_ids": (torch.tensor(question) == IMAGE).long()}
        pictures.append(Picture(tensors, shown, patches, patches // 4))
    return Samples(tuple(ids), (False,) * count, tuple(spans), tuple(pictures))
