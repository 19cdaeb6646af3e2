"""A tiny Qwen3-VL with random weights, and samples of a picture and its caption."""

from __future__ import annotations

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from qsens.engine.samples import Picture, Samples

IMAGE, START, END = 190, 192, 193
GRIDS = ((1, 4, 4), (1, 4, 6), (1, 2, 4))


def model() -> Qwen3VLForConditionalGeneration:
    """Return the model: three layers, three vision layers, two of them seen by the decoder."""
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 200,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "initializer_range": 0.1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 8,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.1,
        },
        image_token_id=IMAGE,
        video_token_id=191,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    return Qwen3VLForConditionalGeneration(config).eval().requires_grad_(False)


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
        spans.append((len(question), len(question) + len(caption)))
        pictures.append(Picture(torch.randn(patches, 3 * 2 * 8 * 8, generator=generator), grid))
    return Samples(tuple(ids), (False,) * count, tuple(spans), tuple(pictures), IMAGE)
