"""Pictures with their captions as samples: a user who shows one, and the answer. Needs torch.

The checkpoint's own chat template and image processor make them; the caption's tokens alone are
labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qsens.checkpoint.refusals import refusals
from qsens.config import ModelConfig
from qsens.data.images import Pixels
from qsens.data.samples import Picture, Samples, token_ids
from qsens.errors import UserError

_NO_PICTURE = "its chat template shows no picture"
_TOKENIZER = "the tokenizer of model.path"
_TEMPLATE = (
    "Save the checkpoint's own chat_template.jinja beside it, and keep image tokens out of "
    "dataset.prompt."
)


def load_processor(config: ModelConfig) -> Any:
    """Load the checkpoint's own image processor, the one that needs no torchvision.

    Raises:
        UserError: There is none, or it is broken.
    """
    with refusals(
        "its image processor cannot be loaded",
        where=f"model.path = {config.path}",
        remedy="Save its preprocessor_config.json beside the weights.",
    ):
        return Qwen2VLImageProcessorPil.from_pretrained(config.path, local_files_only=True)


def chat_samples(
    pictures: Sequence[Pixels],
    captions: Sequence[str],
    tokenizer: Any,
    processor: Any,
    *,
    image_token: int,
    prompt: str,
    longest: int,
    dtype: torch.dtype,
) -> Samples:
    """Return samples of one picture and its caption each.

    Args:
        pictures: The pictures, at the resolution of the processor.
        captions: Their captions.
        tokenizer: The checkpoint's tokenizer, with its chat template.
        processor: Its image processor.
        image_token: Id of the token that stands for a part of a picture.
        prompt: What the user says beside the picture.
        longest: Tokens of a sample at most; a longer caption is cut.
        dtype: Data type of the patches.

    Raises:
        UserError: The chat template does not show a picture, a caption holds the image token, or no
            token of a caption is left.
    """
    before, after = _turn(tokenizer, prompt, image_token)
    encoded = token_ids(tokenizer, captions, special=False)
    ids, truncated, spans, seen = [], [], [], []
    for index, (pixels, caption) in enumerate(zip(pictures, encoded, strict=True)):
        made = _process(processor, pixels)
        grid: tuple[int, int, int] = tuple(made["image_grid_thw"][0].tolist())
        seen.append(Picture(made["pixel_values"].to(dtype), grid))
        shown = grid[0] * grid[1] * grid[2] // processor.merge_size**2
        start = len(before) + shown + len(after)
        if image_token in caption:
            raise UserError(
                "holds the token that stands for a picture",
                where=f"caption {index + 1}: {captions[index][:60]!r}",
                remedy="Remove the caption.",
            )
        if not caption or start >= longest:
            raise _no_label(index, captions[index], start, longest)
        whole = (*before, *[image_token] * shown, *after, *caption)
        ids.append(whole[:longest])
        truncated.append(len(whole) > longest)
        spans.append((start, len(ids[-1])))
    return Samples(tuple(ids), tuple(truncated), tuple(spans), tuple(seen), image_token)


def _process(processor: Any, pixels: Pixels) -> Any:
    with refusals(
        "its image processor fails",
        where="the preprocessor_config.json of model.path",
        remedy="Get the file of the checkpoint again.",
    ):
        return processor(
            images=[pixels],
            do_resize=False,
            input_data_format="channels_last",
            return_tensors="pt",
        )


def _turn(tokenizer: Any, prompt: str, image_token: int) -> tuple[list[int], list[int]]:
    """Return the tokens of the user's turn, before and after the picture."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    with refusals(_NO_PICTURE, where=_TOKENIZER, remedy=_TEMPLATE):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    ids = token_ids(tokenizer, [text], special=False)[0]
    if ids.count(image_token) != 1:
        raise UserError(
            f"{_NO_PICTURE}: it gives {ids.count(image_token)} image tokens where 1 is expected",
            where=_TOKENIZER,
            remedy=_TEMPLATE,
        )
    at = ids.index(image_token)
    return ids[:at], ids[at + 1 :]


def _no_label(index: int, caption: str, start: int, longest: int) -> UserError:
    if start < longest:
        return UserError(
            "the tokenizer gives it no token",
            where=f"caption {index + 1}: {caption[:60]!r}",
            remedy="Remove the caption.",
        )
    return UserError(
        f"picture and prompt of caption {index + 1} take {start} tokens, and a sample has at most "
        f"{longest}",
        where=f"dataset.calib_seq_len = {longest}, dataset.max_pixels",
        remedy="Raise dataset.calib_seq_len, or lower dataset.max_pixels.",
    )
