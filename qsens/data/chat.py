"""Pictures as samples: with captions, and in conversations. Needs torch.

The checkpoint's own chat template and processor make them, whatever tensors its class asks for. A
caption is the answer to a user who shows a picture; the tokens of answers alone are labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from qsens.checkpoint.refusals import refusals
from qsens.config import ModelConfig
from qsens.data.conversations import ASSISTANT, Conversation
from qsens.data.images import Pixels
from qsens.data.rendering import Rendered, cut_at, render
from qsens.data.samples import Picture, Samples, token_ids
from qsens.errors import UserError

_NO_PICTURE = "its chat template shows no picture"
# What the tower reads, as all classes of transformers call it.
_PIXELS = "pixel_values"
_TOKENIZER = "the tokenizer of model.path"
_TEMPLATE = (
    "Save the checkpoint's own chat_template.jinja beside it, and keep image tokens out of "
    "dataset.prompt."
)


def load_processor(config: ModelConfig, tokenizer: Any) -> Any:
    """Load the checkpoint's own processor, with the image processor that needs no torchvision.

    Args:
        config: The checkpoint.
        tokenizer: Its tokenizer, with its chat template.

    Raises:
        UserError: There is none, it is broken, or it needs a package that is not installed.
    """
    with refusals(
        "its image processor cannot be loaded",
        where=f"model.path = {config.path}",
        remedy="Save its preprocessor_config.json beside the weights, and install what it asks for "
        '(pip install "qsens[vision]").',
    ):
        options = {"local_files_only": True, "trust_remote_code": config.trust_remote_code}
        settings = AutoConfig.from_pretrained(config.path, **options)
        images = AutoImageProcessor.from_pretrained(config.path, backend="pil", **options)
        kind = PROCESSOR_MAPPING[type(settings)]
        described, _ = kind.get_processor_dict(config.path, local_files_only=True)
        return assemble_processor(kind, tokenizer, images, described)


def assemble_processor(
    kind: Any, tokenizer: Any, images: Any, settings: Mapping[str, Any] | None = None
) -> Any:
    """Return a processor of pictures and text without what it has for videos and sounds.

    Those need packages of their own (torchvision, librosa), and no sample has any.

    Args:
        kind: transformers' class.
        tokenizer: The tokenizer.
        images: The image processor.
        settings: What its ``processor_config.json`` holds.
    """

    class Seeing(kind):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            if argument is None:
                return None
            return super().check_argument_for_proper_class(name, argument)

    parts = {"tokenizer": tokenizer, "image_processor": images}
    given = [parts.get(name) for name in kind.get_attributes()]
    return Seeing.from_args_and_dict(given, dict(settings or {}))


def chat_samples(
    pictures: Sequence[Pixels],
    captions: Sequence[str],
    processor: Any,
    settings: Any,
    *,
    resize: bool,
    prompt: str,
    longest: int,
    dtype: torch.dtype,
) -> Samples:
    """Return samples of one picture and its caption each.

    Args:
        pictures: The pictures.
        captions: Their captions.
        processor: The checkpoint's processor, see :func:`load_processor`.
        settings: The model's configuration.
        resize: Whether the processor resizes; not where pictures have its resolution already.
        prompt: What the user says beside the picture.
        longest: Tokens of a sample at most; a longer caption is cut.
        dtype: Data type of what the tower reads.

    Raises:
        UserError: The chat template does not show a picture, a caption holds the image token, or no
            token of a caption is left.
    """
    image_token = _image_token(settings)
    text = _turn(processor.tokenizer, prompt, image_token)
    encoded = token_ids(processor.tokenizer, captions, special=False)
    ids, truncated, spans, seen = [], [], [], []
    for index, (pixels, caption) in enumerate(zip(pictures, encoded, strict=True)):
        made = _process(processor, text, [pixels], resize=resize)
        asked = made["input_ids"][0].tolist()
        seen.append(_picture(made, settings, asked.count(image_token), dtype))
        start = len(asked)
        if image_token in caption:
            raise UserError(
                "holds the token that stands for a picture",
                where=f"caption {index + 1}: {captions[index][:60]!r}",
                remedy="Remove the caption.",
            )
        if not caption or start >= longest:
            raise _no_label(index, captions[index], start, longest)
        whole = (*asked, *caption)
        ids.append(whole[:longest])
        truncated.append(len(whole) > longest)
        spans.append(((start, len(ids[-1])),))
    return Samples(tuple(ids), tuple(truncated), tuple(spans), tuple(seen))


def conversation_chat_samples(
    conversations: Sequence[Conversation],
    pictures: Sequence[Sequence[Pixels]],
    processor: Any,
    settings: Any,
    *,
    resize: bool,
    longest: int,
    dtype: torch.dtype,
) -> Samples:
    """Return samples of conversations that show pictures.

    Where a picture follows an answer, the last answer alone is a label: what stands before a label
    is then all that the model saw.

    Args:
        conversations: The conversations.
        pictures: The pictures of each, in order.
        processor: The checkpoint's processor, see :func:`load_processor`.
        settings: The model's configuration.
        resize: Whether the processor resizes; not where pictures have its resolution already.
        longest: Tokens of a sample at most; a longer one ends after the last answer that fits.
        dtype: Data type of what the tower reads.

    Raises:
        UserError: The chat template does not show the pictures, or refuses a conversation; or none
            of the labels of one fits.
    """
    image_token = _image_token(settings)
    rendered, seen = [], []
    for number, (conversation, shown) in enumerate(zip(conversations, pictures, strict=True), 1):
        split = conversation.shows_after_an_answer()
        asked = replace(conversation, last=True) if split else conversation
        text = render(asked, processor.tokenizer, number)
        made = _process(processor, text.text, shown, resize=resize)
        ids = tuple(made["input_ids"][0].tolist())
        seen.append(_picture(made, settings, ids.count(image_token), dtype))
        # What stands for pictures grew, and what follows the first label is as it was.
        first, more = text.spans[0][0], len(ids) - len(text.ids)
        if ids[first + more :] != text.ids[first:] or image_token in text.ids[first:]:
            raise UserError(
                "its processor makes other tokens of an answer than its tokenizer",
                where=f"conversation {number}",
                remedy=_TEMPLATE,
            )
        spans = tuple((start + more, end + more) for start, end in text.spans)
        rewritten = text.rewritten or (split and not conversation.last)
        rendered.append(Rendered(ids, spans, rewritten))
    return cut_at(longest, rendered, loss=ASSISTANT, pictures=seen)


def _process(processor: Any, text: str, pictures: Sequence[Pixels], *, resize: bool) -> Any:
    """Return what the processor makes of a text and the pictures that it shows."""
    with refusals(
        "its image processor fails",
        where="the preprocessor_config.json of model.path",
        remedy="Get the file of the checkpoint again.",
    ):
        return processor(
            text=[text],
            images=[[Image.fromarray(pixels) for pixels in pictures]],
            add_special_tokens=False,
            return_tensors="pt",
            **({} if resize else {"do_resize": False}),
        )


def _picture(made: Any, settings: Any, shown: int, dtype: torch.dtype) -> Picture:
    """Sort what a processor made: what it says of tokens, and what the tower reads."""
    if not shown:
        raise _no_picture(0)
    ids = made["input_ids"]
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in made.items()
        if tensor.shape != ids.shape
    }
    tokens = {
        name: tensor[0]
        for name, tensor in made.items()
        if tensor.shape == ids.shape and name not in ("input_ids", "attention_mask")
    }
    if _PIXELS not in tensors:
        raise UserError(
            f"its image processor gives no {_PIXELS}, but {', '.join(tensors) or 'nothing'}",
            where="the preprocessor_config.json of model.path",
            remedy="Use coverage=lm_only with dataset.modality=text for this checkpoint.",
        )
    return Picture(tensors, tokens, _patches(tensors[_PIXELS], settings.vision_config), shown)


def _patches(pixels: torch.Tensor, vision: Any) -> int:
    """Return how many patches a tower cuts pictures into.

    Args:
        pixels: Patches, ``(..., channels)``, or pictures, ``(..., channels, height, width)``.
        vision: The tower's configuration.
    """
    if pixels.ndim < 4:
        return pixels.shape[:-1].numel()
    size = vision.patch_size
    high, wide = (size, size) if isinstance(size, int) else size
    return pixels.shape[:-3].numel() * (pixels.shape[-2] // high) * (pixels.shape[-1] // wide)


def _image_token(settings: Any) -> int:
    """Return the id of the token that stands for a part of a picture."""
    held = getattr(settings, "image_token_id", None)
    return int(settings.image_token_index if held is None else held)


def _turn(tokenizer: Any, prompt: str, image_token: int) -> str:
    """Return the user's turn, in which one token stands for the picture."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    with refusals(_NO_PICTURE, where=_TOKENIZER, remedy=_TEMPLATE):
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    count = token_ids(tokenizer, [text], special=False)[0].count(image_token)
    if count > 1:
        raise _no_picture(count)
    return text


def _no_picture(count: int) -> UserError:
    return UserError(
        f"{_NO_PICTURE}: it gives {count} image tokens where 1 is expected",
        where=_TOKENIZER,
        remedy=_TEMPLATE,
    )


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
