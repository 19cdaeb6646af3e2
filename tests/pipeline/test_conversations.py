"""Sweeps over conversations: labels are the assistant's turns, in both engines and in reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from qsens.engine.scores import silent
from qsens.errors import UserError
from qsens.grid import Plan
from qsens.pipeline.compute import both_engines
from qsens.pipeline.loading import load_whole
from qsens.pipeline.sweep import run_sweep
from qsens.results import read_manifest
from qsens.store import Store
from tests.checkpoint.hostile import plan_of
from tests.checkpoint.tiny_families import CAPTIONS, configuration, save

TEMPLATE = (
    "{% for m in messages %}{{ m.content }} {{ eos }}{% endfor %}"
    "{% if add_generation_prompt %}{% endif %}"
)
SMOLLM2 = Path(__file__).parents[2] / ".cache" / "smollm2"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = save(configuration("Llama", tied=True), tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def turns(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]}


CHATS = [
    turns(CAPTIONS[0], CAPTIONS[1]),
    turns(CAPTIONS[1], CAPTIONS[2], CAPTIONS[3], CAPTIONS[0]),
    turns(CAPTIONS[3], CAPTIONS[3]),
    turns(CAPTIONS[2], CAPTIONS[1], CAPTIONS[0]),
]


def planned(checkpoint: Path, root: Path, *overrides: str, chats: Any = CHATS) -> Plan:
    root.mkdir(exist_ok=True)
    (root / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return plan_of(
        checkpoint,
        root / "results",
        f"dataset.directory={root}",
        "dataset.files.small=chats.jsonl",
        "model.dtype=float32",
        "dataset.size=small",
        *overrides,
    )


def test_each_answer_may_be_a_sample(checkpoint: Path, tmp_path: Path) -> None:
    together = planned(checkpoint, tmp_path / "a")
    plan = planned(checkpoint, tmp_path / "b", "dataset.turns=each", "dataset.sizes.small=5")
    samples = load_whole(plan, plan.cells[0], silent).samples
    answers = [
        (chat["messages"][:at], chat["messages"][at])
        for chat in CHATS
        for at, message in enumerate(chat["messages"])
        if message["role"] == "assistant"
    ]
    assert len(answers) == 5
    assert samples.labels() == [words(answer["content"]) for _, answer in answers]
    for ids, (before, answer) in zip(samples.ids, answers, strict=True):
        assert len(ids) == sum(words(message["content"]) for message in [*before, answer])
    assert plan.cells[0].digest != together.cells[0].digest
    _, errors = run_sweep(plan)
    assert errors == []
    dataset = read_manifest(Store(plan).manifest(plan.cells[0])).dataset
    assert dataset is not None
    assert (dataset.turns, dataset.samples_used) == ("each", 5)


def words(text: str) -> int:
    return len(text.split())


def test_labels_are_the_answers(checkpoint: Path, tmp_path: Path) -> None:
    plan = planned(checkpoint, tmp_path)
    samples = load_whole(plan, plan.cells[0], silent).samples
    answers = [
        [message["content"] for message in chat["messages"] if message["role"] == "assistant"]
        for chat in CHATS
    ]
    assert samples.labels() == [sum(map(words, each)) for each in answers]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for ids, spans, each in zip(samples.ids, samples.spans, answers, strict=True):
        said = [tokenizer.convert_ids_to_tokens(ids[start:end]) for start, end in spans]
        assert said == [text.split() for text in each]


@pytest.mark.parametrize("loss", ["assistant", "all"])
def test_both_engines_agree(loss: str, checkpoint: Path, tmp_path: Path) -> None:
    plan = planned(checkpoint, tmp_path, f"dataset.loss={loss}", "autoquant.batch_size=2")
    ours, theirs, _ = both_engines(Store(plan), plan.cells[0], silent)
    assert ours == pytest.approx(theirs, rel=1e-3, abs=0)
    assert all(score > 0 for score in ours.values())


def test_the_loss_is_that_of_the_answers(checkpoint: Path, tmp_path: Path) -> None:
    plan = planned(checkpoint, tmp_path)
    loaded = load_whole(plan, plan.cells[0], silent)
    from qsens.engine.candidates import distinct
    from qsens.engine.gradient import scorer
    from qsens.pipeline.loading import groups_of, request_of

    groups = groups_of(plan, plan.cells[0], loaded.model)
    candidates = distinct([request_of(plan.cells[0])])
    found = scorer.score(loaded.model, loaded.samples, groups, candidates, {}).loss
    for index, (ids, spans) in enumerate(
        zip(loaded.samples.ids, loaded.samples.spans, strict=True)
    ):
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([ids])).logits[0]
        losses = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        expected = sum(losses[at - 1] for start, end in spans for at in range(start, end))
        assert float(found[index]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("method", ["gradient", "fisher", "kl_div"])
def test_a_sweep_says_what_it_read(method: str, checkpoint: Path, tmp_path: Path) -> None:
    plan = planned(checkpoint, tmp_path, f"autoquant.method={method}")
    said = "chats.jsonl holds conversations (messages); labels are the assistant's turns"
    assert said in plan.notices
    published, errors = run_sweep(plan)
    assert errors == []
    (entry,) = published["cells"]
    dataset = read_manifest(Path(entry["manifest"])).dataset
    assert dataset is not None
    assert (dataset.records, dataset.loss) == ("messages", "assistant")
    assert dataset.label_tokens == sum(
        words(message["content"])
        for chat in CHATS
        for message in chat["messages"]
        if message["role"] == "assistant"
    )


@pytest.mark.parametrize("allowed", [0.25, 0.1])
def test_records_that_do_not_fit_are_skipped_and_named(
    allowed: float, checkpoint: Path, tmp_path: Path
) -> None:
    """The numbers are those of the others; beyond the share that may be, the result is PARTIAL."""
    whole = run_sweep(planned(checkpoint, tmp_path / "a", "dataset.sizes.small=3", chats=CHATS[1:]))
    broken = [CHATS[1], turns("a user alone"), *CHATS[2:]]
    plan = planned(checkpoint, tmp_path / "b", f"dataset.max_skipped={allowed}", chats=broken)
    said = "sample 2 (line 2) is no conversation: it has no turn of the assistant"
    assert any(said in notice for notice in plan.notices)
    found = run_sweep(plan)
    manifests = []
    for published, errors in (whole, found):
        assert errors == []
        manifests.append(read_manifest(Path(published["cells"][0]["manifest"])))
    before, after = manifests
    scores = [
        {name: row.sensitivity for name, row in each.layer_sensitivity.items()}
        for each in manifests
    ]
    assert scores[0] == scores[1]
    assert before.dataset is not None
    assert after.dataset is not None
    assert (before.dataset.skipped, after.dataset.skipped) == (0, 1)
    assert (after.dataset.samples_asked, after.dataset.samples_used) == (4, 3)
    assert any("1 of 4 records are skipped" in notice for notice in after.notices)
    assert bool(after.partial) == (allowed < 0.25)


def test_what_changes_numbers_changes_digests(checkpoint: Path, tmp_path: Path) -> None:
    """The same bytes read otherwise are another result."""
    both = [chat | {"text": "a b"} for chat in CHATS]
    digests = {
        planned(checkpoint, tmp_path, *overrides, chats=both).cells[0].digest
        for overrides in ((), ("dataset.loss=all",), ("dataset.format=text",))
    }
    assert len(digests) == 3
    assert len({planned(checkpoint, tmp_path, chats=both).cells[0].digest} | digests) == 3


def test_a_checkpoint_without_a_template_is_refused(tmp_path: Path) -> None:
    path = save(configuration("Llama", tied=True), tmp_path / "llama")
    with pytest.raises(UserError, match="has no chat template"):
        planned(path, tmp_path)


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="needs `python -m benchmarks.smollm2`")
def test_smollm2s_own_template() -> None:
    from qsens.data.conversations import Conversation
    from qsens.data.rendering import render

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    messages = (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello there."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
    )
    found = render(Conversation(messages), tokenizer, 1)
    start, end = "<|im_start|>", "<|im_end|>\n"
    text = "".join(f"{start}{one['role']}\n{one['content']}{end}" for one in messages)
    assert found.ids == tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    labels = [tokenizer.decode(found.ids[begin:stop]) for begin, stop in found.spans]
    assert labels == [f"Hello there.{end}", f"Because.{end}"]
    assert not found.rewritten
