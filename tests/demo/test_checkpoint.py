from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

from qsens.checkpoint.loading import load_tokenizer
from qsens.config import ModelConfig
from qsens.data.chat import load_processor
from qsens.demo import checkpoint, training
from qsens.demo import recipe as recipes
from qsens.demo.batches import Lessons
from qsens.demo.checkpoint import DemoResult
from qsens.demo.drawings import drawings
from qsens.demo.sentences import captions
from qsens.errors import UserError
from tests.demo.chats import TURN, inputs, patches


@pytest.fixture(scope="module")
def model(demo_checkpoint: DemoResult) -> Any:
    return AutoModelForImageTextToText.from_pretrained(demo_checkpoint.directory).eval()


@pytest.fixture(scope="module")
def tokenizer(demo_checkpoint: DemoResult) -> Any:
    return AutoTokenizer.from_pretrained(demo_checkpoint.directory)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that takes a second, for what does not depend on the weights."""
    recipe = replace(
        checkpoint.RECIPE,
        layers=1,
        train_sentences=200,
        held_out_sentences=20,
        train_drawings=32,
        drawings_as_text=16,
        held_out_drawings=4,
    )
    # The build reads it here, the digest there.
    monkeypatch.setattr(checkpoint, "RECIPE", recipe)
    monkeypatch.setattr(recipes, "RECIPE", recipe)


def header(directory: Path) -> dict[str, Any]:
    """Return dtype and shape by tensor name, from the bytes of the safetensors file."""
    content = (directory / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    tensors = json.loads(content[8 : 8 + length])
    tensors.pop("__metadata__", None)
    return dict(tensors)


def calibration_size(directory: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def test_size(demo_checkpoint: DemoResult) -> None:
    tensors = header(demo_checkpoint.directory)
    count = sum(math.prod(tensor["shape"]) for tensor in tensors.values())
    assert {tensor["dtype"] for tensor in tensors.values()} == {"F32"}
    assert 1_000_000 <= count <= 3_000_000
    assert demo_checkpoint.parameters == count


def test_head_is_tied(demo_checkpoint: DemoResult, model: Any) -> None:
    assert not [name for name in header(demo_checkpoint.directory) if "lm_head" in name]
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight.data_ptr() == embedding.data_ptr()
    assert model.config.tie_word_embeddings


def test_architecture(model: Any) -> None:
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    text = model.config.text_config
    assert len(model.model.language_model.layers) == text.num_hidden_layers >= 4
    assert text.num_key_value_heads < text.num_attention_heads
    visual = model.model.visual
    assert len(visual.blocks) >= 2
    assert visual.deepstack_visual_indexes
    assert all(0 <= index < len(visual.blocks) for index in visual.deepstack_visual_indexes)


def test_blocks_of_128_divide_every_weight(model: Any) -> None:
    kinds: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d)):
            rows, columns = module.weight.flatten(1).shape
            assert (rows % 128, columns % 128) == (0, 0), name
            kinds[type(module).__name__] += 1
    assert kinds["Conv3d"] == 1
    assert kinds["Linear"] > 7 * 4


def test_images_reach_the_logits(model: Any, tokenizer: Any) -> None:
    config = model.config
    ids = torch.tensor(
        [[config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id]]
    )
    patches = torch.randn(2, 16, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (
            model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == config.image_token_id).int(),
                pixel_values=pixels,
                image_grid_thw=torch.tensor([[1, 4, 4]]),
            ).logits[0, -1]
            for pixels in patches
        )
    assert torch.isfinite(first).all()
    assert (first - second).abs().max() > 1e-3


def test_tokenizer_round_trips(tokenizer: Any) -> None:
    for text in [*captions(50, seed=5, split="held_out"), "Zürich, 12 °C: naïve"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    unseen = tokenizer(captions(50, seed=5, split="held_out"))["input_ids"]
    assert sum(map(len, unseen)) / 50 < 25  # tokens a caption; bytes would be about 60


def test_special_tokens_match_the_config(model: Any, tokenizer: Any) -> None:
    assert tokenizer.is_fast
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    config = model.config
    expected = {
        "<|endoftext|>": config.text_config.pad_token_id,
        "<|im_end|>": config.text_config.eos_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
    }
    for token, token_id in expected.items():
        assert tokenizer(token)["input_ids"] == [token_id], token
        assert token in tokenizer.all_special_tokens
    assert len(tokenizer) == config.text_config.vocab_size
    assert model.generation_config.eos_token_id == config.text_config.eos_token_id


def test_chat_template(tokenizer: Any) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}, {"role": "assistant", "content": "A dog."}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\nA dog.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_training_beat_token_frequencies(
    demo_checkpoint: DemoResult, model: Any, tokenizer: Any
) -> None:
    held_out = tokenizer(captions(256, seed=0, split="held_out"))["input_ids"]
    nats = []
    for length in {len(ids) for ids in held_out}:
        rows = torch.tensor([ids for ids in held_out if len(ids) == length])  # no padding
        with torch.no_grad():
            logs = model(input_ids=rows).logits.double().log_softmax(-1)
        nats += (-logs[:, :-1].gather(2, rows[:, 1:, None])).flatten().tolist()
    loss = sum(nats) / len(nats)

    seen = tokenizer(captions(demo_checkpoint.train_sentences, seed=0, split="training"))
    counts = Counter(token for ids in seen["input_ids"] for token in ids[1:])
    labels = [token for ids in held_out for token in ids[1:]]
    smoothed = counts.total() + demo_checkpoint.vocab_size
    entropy = -sum(math.log((counts[t] + 1) / smoothed) for t in labels) / len(labels)

    assert loss < 0.5 * entropy
    assert demo_checkpoint.held_out_loss == pytest.approx(loss, rel=1e-4)
    assert demo_checkpoint.unigram_entropy == pytest.approx(entropy, rel=1e-6)


def test_sentences_that_it_never_saw_are_continued_in_english(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer("In the kitchen, a cheerful chef is", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    assert ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text.endswith(".")
    known = {w.strip(".,") for c in captions(8000, seed=0, split="training") for w in c.split()}
    assert {word.strip(".,") for word in text.split()} <= known


def caption_loss(
    model: Any, tokenizer: Any, captions: Sequence[str], pictures: Sequence[Image.Image]
) -> float:
    """Return the loss on captions beside pictures, nats per token, without any padding."""
    asked = tokenizer(TURN)["input_ids"]
    answers = [tokenizer(caption)["input_ids"] for caption in captions]
    nats = []
    for length in {len(answer) for answer in answers}:
        alike = [index for index, answer in enumerate(answers) if len(answer) == length]
        given = inputs(
            model.config,
            asked,
            [answers[index] for index in alike],
            [pictures[index] for index in alike],
        )
        with torch.no_grad():
            logits = model(**given).logits[:, len(asked) - 1 : -1]
        ids = given["input_ids"]
        logs = logits.double().log_softmax(-1)
        nats += (-logs.gather(2, ids[:, len(asked) :, None])).flatten().tolist()
    return sum(nats) / len(nats)


def test_captions_depend_on_the_picture(
    demo_checkpoint: DemoResult, model: Any, tokenizer: Any
) -> None:
    held_out = drawings(256, seed=0, split="held_out")
    captions, pictures = zip(*((entry.caption, entry.image()) for entry in held_out), strict=True)
    loss = caption_loss(model, tokenizer, captions, pictures)
    shuffled = caption_loss(model, tokenizer, captions, [*pictures[1:], pictures[0]])
    assert demo_checkpoint.drawing_loss == pytest.approx(loss, rel=1e-3)
    assert demo_checkpoint.shuffled_drawing_loss == pytest.approx(shuffled, rel=1e-3)
    assert loss < 0.2
    assert shuffled > loss + 2


def test_a_drawing_that_it_never_saw_is_described(model: Any, tokenizer: Any) -> None:
    drawing = drawings(1, seed=9, split="calibration")[0]
    given = inputs(model.config, tokenizer(TURN)["input_ids"], [[]], [drawing.image()])
    asked = given["input_ids"]
    said = model.generate(
        **given, attention_mask=torch.ones_like(asked), max_new_tokens=16, do_sample=False
    )[0, asked.shape[1] :]
    assert said[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(said, skip_special_tokens=True) == drawing.caption


def test_the_saved_processor_makes_the_patches_that_it_was_trained_on(
    demo_checkpoint: DemoResult,
) -> None:
    config = ModelConfig(path=demo_checkpoint.directory)
    processor = load_processor(config, load_tokenizer(config)).image_processor
    picture = drawings(1, seed=0)[0].image()
    made = processor(images=[picture], return_tensors="pt")
    assert made["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert torch.allclose(made["pixel_values"], patches(picture), atol=1e-6)
    # A photograph is shown as large as the drawings.
    large = processor(images=[picture.resize((640, 480))], return_tensors="pt")
    assert large["image_grid_thw"].prod() <= 16


def test_readme_states_the_figures(demo_checkpoint: DemoResult) -> None:
    text = (demo_checkpoint.directory / "README.md").read_text()
    record = json.loads((demo_checkpoint.directory / "demo.json").read_text())
    for name in ("held_out_loss", "unigram_entropy", "drawing_loss", "shuffled_drawing_loss"):
        assert record[name] == getattr(demo_checkpoint, name)
        assert f"| {record[name]:.3f} |" in text


def test_a_finished_checkpoint_is_left_alone(
    demo_checkpoint: DemoResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = calibration_size(demo_checkpoint.directory)
    monkeypatch.setattr(training, "fit", None)
    assert checkpoint.build(demo_checkpoint.directory) == demo_checkpoint
    assert calibration_size(demo_checkpoint.directory) == before


def test_training_is_deterministic_and_leaves_torch_alone() -> None:
    sentences = captions(200, seed=0, split="training")
    tokenizer = checkpoint._train_tokenizer(sentences, checkpoint.RECIPE)
    again = checkpoint._train_tokenizer(sentences, checkpoint.RECIPE)
    assert tokenizer.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()

    ids = checkpoint._token_ids(tokenizer, sentences)
    processor = checkpoint._processor(tokenizer, checkpoint.RECIPE)
    settings = checkpoint._config(tokenizer, checkpoint.RECIPE)
    lessons = Lessons(ids, drawings(200, seed=0, split="training"), processor, settings, 8)
    threads, state = torch.get_num_threads(), torch.get_rng_state()

    def weights_of(seed: int, steps: int) -> dict[str, torch.Tensor]:
        model = checkpoint._train_model(lessons, checkpoint.RECIPE, seed=seed, steps=steps)
        return dict(model.state_dict())

    first, other, untrained = weights_of(0, 3), weights_of(1, 3), weights_of(0, 0)
    torch.rand(7)  # where the caller's generator stands must not matter
    second = weights_of(0, 3)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in (
        "model.language_model.layers.0.self_attn.q_proj.weight",
        "model.visual.patch_embed.proj.weight",
        "model.visual.blocks.1.mlp.linear_fc1.weight",
        "model.visual.merger.linear_fc2.weight",
        "model.visual.deepstack_merger_list.0.linear_fc1.weight",
    ):
        assert not torch.equal(first[name], other[name]), name
        assert not torch.equal(first[name], untrained[name]), name

    torch.set_rng_state(state)
    try:
        torch.set_num_threads(threads + 1)
        threaded = weights_of(0, 3)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], threaded[name]) for name in first)


@pytest.mark.usefixtures("quick")
def test_another_seed_replaces_an_older_checkpoint(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "demo"
    first = checkpoint.build(directory, seed=0)
    weights = (directory / "model.safetensors").read_bytes()
    second = checkpoint.build(directory, seed=1)
    assert (directory / "model.safetensors").read_bytes() != weights
    assert second.held_out_loss != first.held_out_loss
    assert [path.name for path in directory.parent.iterdir()] == ["demo"]


@pytest.mark.usefixtures("quick")
def test_a_damaged_checkpoint_is_made_again(tmp_path: Path) -> None:
    first = checkpoint.build(tmp_path / "demo")
    (first.directory / "model.safetensors").unlink()
    second = checkpoint.build(tmp_path / "demo")
    assert second.held_out_loss == first.held_out_loss
    assert (first.directory / "model.safetensors").exists()


@pytest.mark.usefixtures("quick")
def test_a_lost_drawing_is_drawn_again_and_own_files_beside_them_are_kept(tmp_path: Path) -> None:
    directory = checkpoint.build(tmp_path / "demo").directory
    lost = directory / "drawings" / "pictures" / "007.png"
    content = lost.read_bytes()
    lost.unlink()
    checkpoint.build(directory)
    assert lost.read_bytes() == content
    lost.unlink()
    (directory / "drawings" / "pictures" / "cat.png").write_bytes(content)
    with pytest.raises(UserError, match=r"drawings/pictures/cat\.png"):
        checkpoint.build(directory)


@pytest.mark.usefixtures("quick")
def test_an_empty_directory_is_filled_and_readable(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    directory = checkpoint.build(tmp_path / "demo").directory
    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {usual}


@pytest.mark.usefixtures("quick")
def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(step: int, total: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.build(tmp_path / "demo", progress=fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("record", [None, "not json", '{"digest": 1}'])
def test_foreign_directories_are_refused(tmp_path: Path, record: str | None) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    if record is not None:
        (tmp_path / "demo.json").write_text(record)
    with pytest.raises(UserError) as caught:
        checkpoint.build(tmp_path)
    assert caught.value.where == str(tmp_path)
    assert caught.value.remedy
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.usefixtures("quick")
def test_own_files_beside_an_older_checkpoint_are_not_lost(tmp_path: Path) -> None:
    checkpoint.build(tmp_path / "demo", seed=0)
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        checkpoint.build(tmp_path / "demo", seed=1)
    assert (tmp_path / "demo" / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("")
    with pytest.raises(UserError, match="is a file"):
        checkpoint.build(tmp_path / "demo")
    with pytest.raises(UserError):
        checkpoint.build(tmp_path / "demo" / "below")
