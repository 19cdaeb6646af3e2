"""Tiny checkpoints that see, with processor files, and data sets of drawn pictures."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qsens.config import Roots
from qsens.grid import Plan
from qsens.pipeline.plan import plan_sweep
from qsens.pipeline.sweep import run_sweep
from qsens.results import read_manifest
from qsens.schema.manifest import Manifest
from tests.engine import pictures

REPO = Path(__file__).resolve().parents[2]
SIZES = {"small": 4, "medium": 8, "large": 12}
MAX_PIXELS = 48 * 48
COLORS = ("red", "green", "blue", "black", "white")
SHAPES = ("square", "circle", "line")
WORDS = ("user", "assistant", "Describe", "this", "image", ".", "a", "on", *COLORS, *SHAPES)
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|> "
    "{% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def save_checkpoint(path: Path, family: str = "Qwen3-VL") -> Path:
    """Save the model, a tokenizer of words with a chat template, and an image processor."""
    patch = 8 if family == "Qwen3-VL" else 14
    pictures.model(family, patch).save_pretrained(path)
    vocabulary = {word: at for at, word in enumerate(WORDS)}
    vocabulary |= {f"spare{at}": at for at in range(len(WORDS), 200)}
    special = {"<|image_pad|>": pictures.IMAGE, "<|video_pad|>": 191}
    special |= {"<|vision_start|>": pictures.START, "<|vision_end|>": pictures.END}
    taken = set(special.values())
    vocabulary = {word: at for word, at in vocabulary.items() if at not in taken} | special
    inner = Tokenizer(models.WordLevel(vocabulary, "spare199"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    if family == "Qwen3-VL":
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(path)
        Qwen2VLImageProcessorPil(
            patch_size=patch,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ).save_pretrained(path)
        return path
    # As Qwen2.5-VL is published: bounds of its own names, the template in a file of its own.
    tokenizer.save_pretrained(path)
    template = {"chat_template": "assistant . " + TEMPLATE}
    (path / "chat_template.json").write_text(json.dumps(template), encoding="utf-8")
    settings = {
        "min_pixels": 56 * 56,
        "max_pixels": 16384 * 28 * 28,
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.3, 0.2, 0.4],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    (path / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


def draw(path: Path, number: int, scale: int = 1) -> str:
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
    image.resize((size[0] * scale, size[1] * scale)).save(path)
    return f"a {color} {shape} on {ground}"


def samples(images: Path, count: int, scale: int = 1) -> list[tuple[str, str]]:
    """Draw pictures; return path and caption of each."""
    names = [f"part{number % 2}/{number}.png" for number in range(count)]
    return [(name, draw(images / name, at, scale)) for at, name in enumerate(names)]


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


class Place:
    """A results root with a checkpoint that sees and a data set of drawn pictures."""

    def __init__(self, root: Path, family: str = "Qwen3-VL") -> None:
        self.root = root
        self.roots = Roots(root=REPO, results=root / "results", configs=(REPO / "configs",))
        self.checkpoint = save_checkpoint(root / "tiny", family)
        windows = family == "Qwen2.5-VL"
        self.short_name = "qwen2_5_vl_3b" if windows else "qwen3_vl_4b"
        # Windows are 56 pixels wide: pictures of several.
        self.max_pixels = 200 * 200 if windows else MAX_PIXELS
        self.rows = samples(root / "images", SIZES["large"], 4 if windows else 1)
        self.data(self.rows, SIZES)

    def data(self, rows: list[tuple[str, str]], sizes: dict[str, int], name: str = "data") -> Path:
        (self.root / name).mkdir(exist_ok=True)
        for size, count in sizes.items():
            write_jsonl(self.root / name / f"{size}.jsonl", rows[:count])
        return self.root / name

    def plan(
        self,
        *overrides: str,
        data: Path | None = None,
        sizes: dict[str, int] = SIZES,
        preset: str = "int8-3phase",
    ) -> Plan:
        given = {
            "model.path": self.checkpoint,
            "model.name": f"{self.short_name}_instruct",
            "model.short_name": self.short_name,
            "model.dtype": "float32",
            "dataset.directory": data or self.root / "data",
            "dataset.images": self.root / "images",
            "dataset.max_pixels": self.max_pixels,
            "autoquant.batch_size": 3,
            "autoquant.device": "cpu",
            **{f"dataset.files.{size}": f"{size}.jsonl" for size in sizes},
            **{f"dataset.sizes.{size}": count for size, count in sizes.items()},
        }
        given |= dict(override.split("=", 1) for override in overrides)
        words = [f"{key}={value}" for key, value in given.items()]
        return plan_sweep(preset, words, roots=self.roots)

    def run(self, plan: Plan) -> dict[str, Manifest]:
        published, errors = run_sweep(plan)
        assert errors == []
        return {
            entry["cell"]: read_manifest(Path(entry["manifest"])) for entry in published["cells"]
        }

    def analysis(self) -> Path:
        return self.root / f"results/models/{self.short_name}_instruct/layer-analysis"


def rows(manifest: Manifest, tower: bool) -> dict[str, Any]:
    return {
        name: row for name, row in manifest.layer_sensitivity.items() if ("visual" in name) == tower
    }


def scores(manifest: Manifest, tower: bool = False) -> dict[str, float]:
    return {name: row.sensitivity for name, row in rows(manifest, tower).items()}
