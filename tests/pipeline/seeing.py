"""A tiny Qwen3-VL with its processor files, and data sets of drawn pictures with captions."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ..engine import pictures

COLORS = ("red", "green", "blue", "black", "white")
SHAPES = ("square", "circle", "line")
WORDS = ("user", "assistant", "Describe", "this", "image", ".", "a", "on", *COLORS, *SHAPES)
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|> "
    "{% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def save_checkpoint(path: Path) -> Path:
    """Save the model, a tokenizer of words with a chat template, and an image processor."""
    pictures.model().save_pretrained(path)
    vocabulary = {word: at for at, word in enumerate(WORDS)}
    vocabulary |= {f"spare{at}": at for at in range(len(WORDS), 200)}
    special = {"<|image_pad|>": pictures.IMAGE, "<|video_pad|>": 191}
    special |= {"<|vision_start|>": pictures.START, "<|vision_end|>": pictures.END}
    taken = set(special.values())
    vocabulary = {word: at for word, at in vocabulary.items() if at not in taken} | special
    inner = Tokenizer(models.WordLevel(vocabulary, "spare199"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(list(special))
    PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TEMPLATE).save_pretrained(path)
    Qwen2VLImageProcessorPil(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(path)
    return path


def draw(path: Path, number: int) -> str:
    """Draw a picture; return its caption."""
    color, ground = COLORS[number % 5], COLORS[(number // 5 + number + 1) % 5]
    shape = SHAPES[number % 3]
    size = (40 + 8 * (number % 4), 30 + 8 * (number % 3))
    image = Image.new("RGB", size, ground)
    pen = ImageDraw.Draw(image)
    box = (4 + number % 7, 4, 24, 20)
    if shape == "square":
        pen.rectangle(box, fill=color)
    elif shape == "circle":
        pen.ellipse(box, fill=color)
    else:
        pen.line(box, fill=color, width=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return f"a {color} {shape} on {ground}"


def samples(images: Path, count: int) -> list[tuple[str, str]]:
    """Draw pictures; return path and caption of each."""
    return [
        (f"part{number % 2}/{number}.png", draw(images / f"part{number % 2}/{number}.png", number))
        for number in range(count)
    ]


def write_jsonl(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    """Write samples as JSON lines."""
    lines = (json.dumps({"image": image, "caption": caption}) for image, caption in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_sqlite(path: Path, splits: dict[str, Sequence[tuple[str, str]]]) -> None:
    """Write samples as the older data sets have them."""
    with sqlite3.connect(path) as opened:
        opened.execute(
            "CREATE TABLE vlm_calib_samples (id INTEGER PRIMARY KEY, split TEXT, "
            "image_relpath TEXT, image_id INTEGER, caption_id INTEGER, caption TEXT)"
        )
        opened.execute("CREATE TABLE meta (key TEXT, value TEXT)")
        for split, rows in splits.items():
            opened.executemany(
                "INSERT INTO vlm_calib_samples (split, image_relpath, image_id, caption_id, "
                "caption) VALUES (?, ?, ?, ?, ?)",
                [(split, image, at, at, caption) for at, (image, caption) in enumerate(rows)],
            )
    opened.close()
