"""Pictures and turns of the demo checkpoint's chat, made without the project's code."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from PIL import Image

_SHOWN = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>Describe this image."
TURN = f"<|im_start|>user\n{_SHOWN}<|im_end|>\n<|im_start|>assistant\n"
"""What a user says who shows a picture of 64x64 pixels."""


def patches(picture: Image.Image) -> torch.Tensor:
    """Return a picture as the tower reads it: 16 patches of 16x16, those of a 32x32 together.

    White is 0 and black is -2; a patch is its channels, each twice over time, row by row.
    """
    values = torch.tensor(np.asarray(picture)).permute(2, 0, 1) / 127.5 - 2
    rows = []
    for top, left in itertools.product((0, 32), (0, 32)):
        for y, x in itertools.product((top, top + 16), (left, left + 16)):
            patch = values[:, y : y + 16, x : x + 16]
            rows.append(patch[:, None].expand(3, 2, 16, 16).flatten())
    return torch.stack(rows)


def inputs(
    model_config: Any, asked: list[int], answers: list[list[int]], pictures: list[Image.Image]
) -> dict[str, torch.Tensor]:
    """Return what a model is called with, of answers of one length."""
    ids = torch.tensor([[*asked, *answer] for answer in answers])
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == model_config.image_token_id).long(),
        "pixel_values": torch.cat([patches(picture) for picture in pictures]),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * len(pictures)),
    }
