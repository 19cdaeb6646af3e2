"""A tiny Qwen3-VL checkpoint that is really trained, in a minute on one CPU core.

Layers differ in what they contribute only once they have learnt something, so random weights would
give a sweep nothing to find. The language model learns from sentences, the whole model from
drawings that it describes in the chat format that sweeps use.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import tokenizers
import torch
import transformers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from qsens.data.chat import assemble_processor
from qsens.demo import training
from qsens.demo.batches import Lessons, drawing_batches, text_batches
from qsens.demo.drawings import (
    DATA_SET,
    GROUND,
    SIDE,
    data_set_files,
    write_data_set,
)
from qsens.demo.recipe import (
    CHAT_TEMPLATE,
    PROMPT,
    RECIPE,
    RECORD,
    SPECIAL_TOKENS,
    DemoResult,
    Recipe,
    finished,
    held_out_captions,
    held_out_drawings,
    read_record,
    recipe_digest,
    training_captions,
    training_drawings,
)
from qsens.demo.training import Progress
from qsens.errors import UserError

_README: Final = """\
# Demo checkpoint

A Qwen3-VL of {parameters:,} parameters (float32, tied head), trained with seed {seed} on
{train_sentences:,} generated sentences and on {train_drawings:,} drawings of shapes with captions
that say what is on them.

| nats per token | |
| --- | --- |
| loss on held-out sentences | {held_out_loss:.3f} |
| the same, by the frequencies of single tokens | {unigram_entropy:.3f} |
| loss on the captions of held-out drawings | {drawing_loss:.3f} |
| the same, each caption beside another drawing | {shuffled_drawing_loss:.3f} |

It loads with `AutoModelForImageTextToText.from_pretrained`, `AutoTokenizer.from_pretrained` and,
where torchvision is installed, `AutoProcessor.from_pretrained`.
`drawings/` holds the calibration samples that `dataset=demo_drawings` names.
It knows nothing but such sentences and drawings, and serves to try things out.
"""

# As often as it takes for the words of the chat to become tokens of their own.
_CHATS: Final = 100


def build(directory: Path, *, seed: int = 0, progress: Progress | None = None) -> DemoResult:
    """Train the demo checkpoint into a directory, or find it there finished and do nothing.

    The directory appears whole or not at all. A finished checkpoint of another seed or recipe is
    replaced. The state of torch's random generators and its thread settings are left as they were.

    Args:
        directory: Where the checkpoint goes; missing parents are made.
        seed: Seed of the weights and of the order of training.
        progress: Told how training goes.

    Returns:
        The figures of the checkpoint, as stored in its ``demo.json``.

    Raises:
        UserError: If the directory holds anything but a demo checkpoint.
    """
    directory = directory.resolve()
    digest = recipe_digest(seed)
    built = finished(directory, digest)
    if built is not None:
        return built
    _refuse_foreign_files(directory)
    draft = directory.parent / f".{directory.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"the checkpoint cannot be written: {error.strerror}",
            where=str(directory),
            remedy="Choose a directory that you may write to.",
        ) from error
    try:
        _write(draft, seed=seed, digest=digest, progress=progress)
        result = finished(directory, digest)
        if result is None:
            _move_into_place(draft, directory)
            result = finished(directory, digest)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    assert result is not None
    return result


def _write(directory: Path, *, seed: int, digest: str, progress: Progress | None) -> None:
    start = time.monotonic()
    recipe, size = RECIPE, RECIPE.training.batch_size
    drawn, hidden = training_drawings(recipe), held_out_drawings(recipe)
    spoken = [drawing.caption for drawing in drawn[: recipe.drawings_as_text]]
    sentences = training_captions(recipe)
    tokenizer = _train_tokenizer([*sentences, *spoken], recipe)
    processor, settings = _processor(tokenizer, recipe), _config(tokenizer, recipe)
    seen = _token_ids(tokenizer, sentences)
    unseen = _token_ids(tokenizer, held_out_captions(recipe))
    texts = [*seen, *_token_ids(tokenizer, spoken)]
    lessons = Lessons(
        [[*ids, tokenizer.eos_token_id] for ids in texts], drawn, processor, settings, size
    )
    model = _train_model(lessons, recipe, seed=seed, progress=progress)
    pictures = [
        drawing_batches(hidden, size, processor, settings, shuffled=shuffled)
        for shuffled in (False, True)
    ]
    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocab_size": len(tokenizer),
        "train_sentences": len(seen),
        "train_drawings": len(drawn),
        "held_out_loss": training.mean_loss(model, text_batches(unseen, size)),
        "unigram_entropy": training.unigram_entropy(seen, unseen, len(tokenizer)),
        "drawing_loss": training.mean_loss(model, pictures[0]),
        "shuffled_drawing_loss": training.mean_loss(model, pictures[1]),
    }
    _save(model, directory)
    tokenizer.save_pretrained(directory)
    processor.image_processor.save_pretrained(directory)
    (directory / DATA_SET).mkdir()
    write_data_set(directory / DATA_SET)
    (directory / "README.md").write_text(_README.format(seed=seed, **figures), encoding="utf-8")
    figures["seconds"] = round(time.monotonic() - start, 1)
    record = {
        "digest": digest,
        "seed": seed,
        **figures,
        "recipe": asdict(RECIPE),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "files": sorted([*(path.name for path in directory.iterdir()), RECORD]),
    }
    (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    mode = (directory / RECORD).stat().st_mode
    for path in directory.rglob("*"):
        if path.is_file():
            _publish(path, mode=mode)


def _train_tokenizer(texts: Sequence[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with Qwen's special tokens at the end of the vocabulary."""
    chat = [PROMPT, "user\n", "assistant\n"] * _CHATS
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.normalizer = tokenizers.normalizers.NFC()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=recipe.vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator([*texts, *chat], trainer)
    inner.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[
            token for token in SPECIAL_TOKENS if token not in ("<|endoftext|>", "<|im_end|>")
        ],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def _token_ids(tokenizer: PreTrainedTokenizerFast, sentences: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(sentences))["input_ids"]
    return ids


def _config(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Qwen3VLConfig:
    token = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "head_dim": recipe.head_dim,
        "initializer_range": recipe.initializer_range,
        "max_position_embeddings": 2048,
        # The sections are of half a head: time, height and width share its frequencies.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
        },
        "bos_token_id": token["<|endoftext|>"],
        "eos_token_id": token["<|im_end|>"],
        "pad_token_id": token["<|endoftext|>"],
        "tie_word_embeddings": True,
    }
    vision: dict[str, Any] = {
        "depth": recipe.vision_depth,
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.vision_intermediate_size,
        "num_heads": recipe.vision_heads,
        "patch_size": recipe.vision_patch,
        "initializer_range": recipe.initializer_range,
        "out_hidden_size": recipe.hidden_size,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def _processor(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Any:
    """Return the processor: the ground of the drawings is 0, so empty patches add nothing."""
    images = Qwen2VLImageProcessorPil(
        patch_size=recipe.vision_patch,
        merge_size=2,
        temporal_patch_size=2,
        # Any picture is shown at the size of those that it was trained on.
        size={"shortest_edge": (2 * recipe.vision_patch) ** 2, "longest_edge": SIDE**2},
        image_mean=[value / 255 for value in GROUND],
        image_std=[0.5] * 3,
    )
    return assemble_processor(Qwen3VLProcessor, tokenizer, images)


def _train_model(
    lessons: Lessons,
    recipe: Recipe,
    *,
    seed: int,
    steps: int | None = None,
    progress: Progress | None = None,
) -> Qwen3VLForConditionalGeneration:
    """Return the trained model, float32, in evaluation mode; `steps` ends training early."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(lessons.settings)
        training.fit(
            model,
            [
                (list(model.model.language_model.parameters()), 1.0),
                (list(model.model.visual.parameters()), recipe.training.vision_rate),
            ],
            itertools.islice(lessons.shuffled(), steps),
            len(lessons),
            recipe.training,
            progress=progress,
        )
    return model.eval()


def _save(model: Qwen3VLForConditionalGeneration, directory: Path) -> None:
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model.save_pretrained(directory)
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _refuse_foreign_files(directory: Path) -> None:
    if not directory.exists():
        return
    if directory.is_dir():
        ours = (read_record(directory) or {"files": []})["files"]
        drawn = [Path(DATA_SET, name) for name in data_set_files()] if DATA_SET in ours else []
        known = {*map(Path, ours), *drawn, *(path.parent for path in drawn)}
        files = (path.relative_to(directory) for path in directory.rglob("*"))
        foreign = sorted(str(path) for path in files if path not in known)
        if not foreign:
            return
        what = f"the directory has files that are not of a demo checkpoint: {foreign[0]}"
        if len(foreign) > 1:
            what += f" and {len(foreign) - 1} more"
    else:
        what = "the path is a file; a checkpoint is a directory"
    raise UserError(what, where=str(directory), remedy="Choose a new or an empty directory.")


def _move_into_place(draft: Path, directory: Path) -> None:
    if not directory.exists():
        draft.rename(directory)
        return
    _refuse_foreign_files(directory)
    retired = draft.with_suffix(".old")
    directory.rename(retired)
    draft.rename(directory)
    shutil.rmtree(retired)


def _publish(path: Path, *, mode: int) -> None:
    # safetensors makes its files readable to their owner alone, whatever the umask.
    path.chmod(mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())
