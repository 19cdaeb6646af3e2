"""Tiny checkpoints of families that see: their own processor's files, a chat template, a model.

Of each the default configuration, shrunk; of processors the settings that fit it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qsens.checkpoint.twin import build_twin, default_settings

WORDS = (
    "user",
    "assistant",
    "Describe",
    "this",
    "image",
    ".",
    "a",
    "on",
    "red",
    "square",
    "circle",
)
VOCABULARY = 512


@dataclass(frozen=True)
class Family:
    """A family that sees.

    Attributes:
        model_type: As ``config.json`` names it.
        tokens: Special tokens by id.
        shown: What a chat template writes for a picture.
        image: Class of its image processor, below ``transformers.models``, and its settings.
        named: What the tokenizer calls some of its tokens.
        processor: Settings of its processor.
        configure: Changes the shrunk configuration.
        needs: Packages that its processor needs.
    """

    model_type: str
    tokens: dict[int, str]
    shown: str
    image: tuple[str, dict[str, Any]]
    named: dict[str, str] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    configure: Callable[[Any], None] = lambda settings: None
    needs: tuple[str, ...] = ()


def _qwen(model_type: str, unit: int, first: int) -> Family:
    return Family(
        model_type,
        {
            first: "<|image_pad|>",
            first - 1: "<|video_pad|>",
            first - 2: "<|vision_start|>",
            first - 3: "<|vision_end|>",
        },
        "<|vision_start|><|image_pad|><|vision_end|>",
        (
            "qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil",
            {
                "patch_size": unit,
                "size": {"shortest_edge": 4 * unit**2, "longest_edge": 40 * unit**2},
            },
        ),
    )


def _internvl(settings: Any) -> None:
    settings.vision_config.image_size = (56, 56)


def _onevision(settings: Any) -> None:
    settings.image_grid_pinpoints = PINPOINTS


def _llama4(settings: Any) -> None:
    settings.vision_config.intermediate_size = 64 * 4  # what shuffling makes of four patches


def _mistral3(settings: Any) -> None:
    settings.vision_config.image_size = 112


PINPOINTS = [[56, 56], [56, 112], [112, 56], [112, 112]]
_IDEFICS3 = {
    511: "<image>",
    509: "<fake_token_around_image>",
    508: "<global-img>",
    507: "<end_of_utterance>",
    **{450 + 6 * i + j: f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)},
}
_IDEFICS3_SIZES = {"size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 128}}
FAMILIES = (
    _qwen("qwen2_vl", 14, 509),
    _qwen("qwen2_5_vl", 14, 509),
    _qwen("qwen3_vl", 16, 511),
    _qwen("qwen3_5", 16, 511),
    Family(
        "internvl",
        {511: "<IMG_CONTEXT>", 510: "<img>", 509: "</img>", 508: "<video>"},
        "<IMG_CONTEXT>",
        (
            "got_ocr2.image_processing_pil_got_ocr2.GotOcr2ImageProcessorPil",
            {"size": {"height": 56, "width": 56}, "crop_to_patches": True, "max_patches": 4},
        ),
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        {"image_seq_length": 4},
        _internvl,
    ),
    Family(
        "llava",
        {511: "<image>"},
        "<image>",
        (
            "llava.image_processing_pil_llava.LlavaImageProcessorPil",
            {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
        ),
        processor={
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    Family(
        "llava_onevision",
        {511: "<image>", 510: "<video>"},
        "<image>",
        (
            "llava_onevision.image_processing_pil_llava_onevision.LlavaOnevisionImageProcessorPil",
            {"size": {"height": 56, "width": 56}, "image_grid_pinpoints": PINPOINTS},
        ),
        processor={
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_4",
        },
        configure=_onevision,
    ),
    Family(
        "gemma3",
        {511: "<start_of_image>", 510: "<end_of_image>", 509: "<image_soft_token>"},
        "<start_of_image>",
        (
            "gemma3.image_processing_pil_gemma3.Gemma3ImageProcessorPil",
            {"size": {"height": 64, "width": 64}},
        ),
        {
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        {"image_seq_length": 4},
    ),
    Family(
        "gemma4",
        {
            511: "<|image>",
            510: "<image|>",
            509: "<|image|>",
            508: "<|video|>",
            507: "<|audio>",
            506: "<audio|>",
            505: "<|audio|>",
        },
        "<|image|>",
        (
            "gemma4.image_processing_pil_gemma4.Gemma4ImageProcessorPil",
            {"max_soft_tokens": 70},
        ),
        {
            "image_token": "<|image|>",
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "audio_token": "<|audio|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
        },
        needs=("torchvision",),
    ),
    Family(
        "idefics3",
        _IDEFICS3,
        "<image>",
        ("idefics3.image_processing_pil_idefics3.Idefics3ImageProcessorPil", _IDEFICS3_SIZES),
        processor={"image_seq_len": 4},
        needs=("torchvision",),
    ),
    Family(
        "smolvlm",
        _IDEFICS3,
        "<image>",
        ("smolvlm.image_processing_pil_smolvlm.SmolVLMImageProcessorPil", _IDEFICS3_SIZES),
        processor={"image_seq_len": 4},
        needs=("torchvision", "num2words"),
    ),
    Family(
        "mistral3",
        {10: "[IMG]", 12: "[IMG_BREAK]", 13: "[IMG_END]"},
        "[IMG]",
        (
            "pixtral.image_processing_pil_pixtral.PixtralImageProcessorPil",
            {"size": {"longest_edge": 112}, "patch_size": {"height": 14, "width": 14}},
        ),
        processor={"patch_size": 14, "spatial_merge_size": 2},
        configure=_mistral3,
        needs=("torchvision",),
    ),
    Family(
        "llama4",
        {
            511: "<|image_start|>",
            510: "<|image_end|>",
            509: "<|patch|>",
            508: "<|image|>",
            507: "<|tile_x_separator|>",
            506: "<|tile_y_separator|>",
        },
        "<|image|>",
        (
            "llama4.image_processing_llama4.Llama4ImageProcessor",
            {"size": {"height": 56, "width": 56}, "max_patches": 4},
        ),
        processor={"patch_size": 14, "pixel_shuffle_ratio": 0.5},
        configure=_llama4,
        needs=("torchvision",),
    ),
    Family(
        "glm4v",
        {
            511: "<|image|>",
            510: "<|video|>",
            509: "<|begin_of_image|>",
            508: "<|end_of_image|>",
            507: "<|begin_of_video|>",
            506: "<|end_of_video|>",
        },
        "<|begin_of_image|><|image|><|end_of_image|>",
        (
            "glm4v.image_processing_pil_glm4v.Glm4vImageProcessorPil",
            {
                "patch_size": 14,
                "size": {"shortest_edge": 2 * 4 * 14**2, "longest_edge": 2 * 40 * 14**2},
            },
        ),
    ),
)


def save(family: Family, path: Path) -> Path:
    """Save a family's tiny checkpoint with the files that its processor is made of."""
    settings = default_settings(family.model_type)
    family.configure(settings)
    model = build_twin(settings)
    for name, parameter in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):  # Gemma 3's is made of zeros
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    vocabulary = {f"spare{at}": at for at in range(VOCABULARY)}
    words = {word: 100 + at for at, word in enumerate(WORDS)}
    special = {token: at for at, token in family.tokens.items()}
    taken = {*words.values(), *special.values()}
    vocabulary = {word: at for word, at in vocabulary.items() if at not in taken}
    inner = Tokenizer(models.WordLevel(vocabulary | words | special, "spare0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, extra_special_tokens=family.named, pad_token="spare1"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }} {% for part in message.content %}"
        "{% if part.type == 'image' %}" + family.shown + " "
        "{% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    tokenizer.save_pretrained(path)
    module, _, name = family.image[0].rpartition(".")
    kind = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    kind(**family.image[1]).save_pretrained(path)
    if family.processor:
        (path / "processor_config.json").write_text(json.dumps(family.processor))
    return path
