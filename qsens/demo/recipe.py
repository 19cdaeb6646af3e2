"""What decides the demo checkpoint, and the record of one that is finished. No torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from qsens.config import DatasetConfig
from qsens.demo.drawings import DATA_SET, LOOK, Drawing, data_set_files, drawings, shipped
from qsens.demo.sentences import captions
from qsens.documents import peek

RECORD: Final = "demo.json"
PROMPT: Final = DatasetConfig().prompt
"""What the user says beside a picture: what sweeps say where nobody sets ``dataset.prompt``."""
SPECIAL_TOKENS: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE: Final = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@dataclass(frozen=True)
class Training:
    """Settings of AdamW.

    Attributes:
        batch_size: Sequences in a step.
        learning_rate: The highest one.
        vision_rate: The vision tower's learning rate as a share of that.
        betas: Decay of the two moments.
        weight_decay: On all parameters.
        warmup_steps: Steps over which the learning rate rises; it then falls to 0 as a cosine.
    """

    batch_size: int = 16
    learning_rate: float = 4e-3
    vision_rate: float = 0.25
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warmup_steps: int = 30


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights, beside the seed and the captions.

    Attributes:
        version: Raised when code changes the weights but no number here does.
        vocab_size: Tokens, special ones included.
        hidden_size: Width of the language model and of the vision tower. Inputs and outputs of all
            linear layers are multiples of 128, so that blocks of 32, 64 and 128 divide.
        intermediate_size: Width inside the language model's MLPs.
        layers: Decoder layers of the language model.
        heads: Query heads of the language model.
        kv_heads: Key and value heads, each shared by `heads / kv_heads` query heads.
        head_dim: Width of a head of the language model.
        vision_depth: Blocks of the vision tower; the first also feeds the decoder directly.
        vision_heads: Heads of the vision tower.
        vision_intermediate_size: Width inside the vision tower's MLPs.
        vision_patch: Side of an image patch, in pixels.
        initializer_range: Standard deviation of the weights before training; the usual 0.02 is
            for wider models and learns half as fast here.
        train_sentences: Sentences to train on.
        held_out_sentences: Sentences that the loss is measured on.
        train_drawings: Drawings to train on, each with its caption as the answer in a chat.
        drawings_as_text: The first so many of them whose captions are trained on as text, too.
        held_out_drawings: Drawings that the loss is measured on.
        training: How it is trained.
    """

    version: int = 3
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vision_depth: int = 2
    vision_heads: int = 4
    vision_intermediate_size: int = 256
    vision_patch: int = 16
    initializer_range: float = 0.08
    train_sentences: int = 8000
    held_out_sentences: int = 256
    train_drawings: int = 6000
    drawings_as_text: int = 1000
    held_out_drawings: int = 256
    training: Training = field(default_factory=Training)


RECIPE: Final = Recipe()


@dataclass(frozen=True)
class DemoResult:
    """A finished demo checkpoint.

    Attributes:
        directory: Where it is, absolute.
        parameters: Stored parameters; the tied head counts once.
        vocab_size: Tokens, special ones included.
        train_sentences: Sentences that it was trained on.
        train_drawings: Drawings that it was trained on.
        held_out_loss: Cross-entropy of the model on held-out sentences, nats per token.
        unigram_entropy: Cross-entropy, on the same tokens, of the frequencies of single tokens in
            the training sentences, nats per token: what a model scores that ignores context.
        drawing_loss: Cross-entropy on the captions of held-out drawings, nats per token.
        shuffled_drawing_loss: The same where each caption stands beside the next one's drawing:
            what a model scores that sees another picture.
        seconds: Wall time of the build that made it.
    """

    directory: Path
    parameters: int
    vocab_size: int
    train_sentences: int
    train_drawings: int
    held_out_loss: float
    unigram_entropy: float
    drawing_loss: float
    shuffled_drawing_loss: float
    seconds: float


def recipe_digest(seed: int = 0) -> str:
    """Return the hex digest of all that decides the checkpoint: recipe, samples and seed."""
    drawn = training_drawings(RECIPE) + held_out_drawings(RECIPE) + shipped()
    content = {
        "recipe": asdict(RECIPE),
        "seed": seed,
        "special_tokens": SPECIAL_TOKENS,
        "chat_template": CHAT_TEMPLATE,
        "prompt": PROMPT,
        "sentences": training_captions(RECIPE) + held_out_captions(RECIPE),
        "look": LOOK,
        "drawings": [asdict(drawing) for drawing in drawn],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def training_captions(recipe: Recipe) -> list[str]:
    """Return the captions to train on, text alone."""
    return captions(recipe.train_sentences, seed=0, split="training")


def held_out_captions(recipe: Recipe) -> list[str]:
    """Return the captions that the loss is measured on, text alone."""
    return captions(recipe.held_out_sentences, seed=0, split="held_out")


def training_drawings(recipe: Recipe) -> list[Drawing]:
    """Return the drawings to train on: of two streams, as one has not so many captions."""
    half = recipe.train_drawings // 2
    first = drawings(half, seed=0, split="training")
    return first + drawings(recipe.train_drawings - half, seed=1, split="training")


def held_out_drawings(recipe: Recipe) -> list[Drawing]:
    """Return the drawings that the loss is measured on."""
    return drawings(recipe.held_out_drawings, seed=0, split="held_out")


def read_record(directory: Path) -> dict[str, Any] | None:
    """Return the record in ``directory``; none where it is no demo checkpoint."""
    record = peek(directory / RECORD)
    return record if record.keys() >= {"digest", "files"} else None


def finished(directory: Path, digest: str) -> DemoResult | None:
    """Return the figures of the checkpoint in ``directory`` if it is that of ``digest``."""
    record = read_record(directory)
    if record is None or record["digest"] != digest:
        return None
    drawn = [f"{DATA_SET}/{name}" for name in data_set_files()]
    files = [name for name in record["files"] if name != DATA_SET]
    if not all((directory / name).is_file() for name in [*files, *drawn]):
        return None
    figures = [entry.name for entry in fields(DemoResult) if entry.name != "directory"]
    return DemoResult(directory=directory, **{name: record[name] for name in figures})
