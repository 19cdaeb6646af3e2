"""A tiny Qwen3-VL checkpoint whose language model is really trained, in a minute on one CPU core.

Layers differ in what they contribute only once they have learnt something, so random weights would
give a sweep nothing to find. The vision tower runs but keeps its random weights: captions alone do
not train it.
"""

from __future__ import annotations

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

from qsens.demo import training
from qsens.demo.recipe import (
    CHAT_TEMPLATE,
    RECIPE,
    RECORD,
    SPECIAL_TOKENS,
    DemoResult,
    Recipe,
    finished,
    held_out_captions,
    read_record,
    recipe_digest,
    training_captions,
)
from qsens.demo.training import Progress
from qsens.errors import UserError

_README: Final = """\
# Demo checkpoint

A Qwen3-VL of {parameters:,} parameters (float32, tied head). Its language model was trained on
{train_sentences:,} generated captions with seed {seed}; its vision tower has random weights.

| on held-out captions | nats per token |
| --- | --- |
| loss of this model | {held_out_loss:.3f} |
| cross-entropy of single-token frequencies | {unigram_entropy:.3f} |

It loads with `AutoModelForImageTextToText.from_pretrained` and `AutoTokenizer.from_pretrained`.
It knows nothing but such captions, and serves to try things out.
"""


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
    found = finished(directory, digest)
    if found is not None:
        return found
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
    sentences = training_captions(RECIPE)
    tokenizer = _train_tokenizer(sentences, RECIPE)
    seen = _token_ids(tokenizer, sentences)
    unseen = _token_ids(tokenizer, held_out_captions(RECIPE))
    model = _train_model(tokenizer, seen, RECIPE, seed=seed, progress=progress)
    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocab_size": len(tokenizer),
        "train_sentences": len(seen),
        "held_out_loss": training.mean_loss(model, unseen, RECIPE.training.batch_size),
        "unigram_entropy": training.unigram_entropy(seen, unseen, len(tokenizer)),
    }
    _save(model, directory)
    tokenizer.save_pretrained(directory)
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
    for path in directory.iterdir():
        _publish(path, mode=(directory / RECORD).stat().st_mode)


def _train_tokenizer(sentences: Sequence[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with Qwen's special tokens at the end of the vocabulary."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.normalizer = tokenizers.normalizers.NFC()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=recipe.vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(sentences, trainer)
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


def _train_model(
    tokenizer: PreTrainedTokenizerFast,
    sequences: Sequence[list[int]],
    recipe: Recipe,
    *,
    seed: int,
    steps: int | None = None,
    progress: Progress | None = None,
) -> Qwen3VLForConditionalGeneration:
    """Return the trained model, float32, in evaluation mode; `steps` ends training early."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(_config(tokenizer, recipe))
        training.fit(
            model,
            list(model.model.language_model.parameters()),
            [[*ids, tokenizer.eos_token_id] for ids in sequences],
            recipe.training,
            steps=steps,
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
        foreign = sorted(path.name for path in directory.iterdir() if path.name not in ours)
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
