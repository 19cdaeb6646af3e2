"""Conversations that show pictures: their tokens and labels, both engines, what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qsens.engine.scores import silent
from qsens.errors import UserError
from qsens.grid import Plan
from qsens.pipeline.compute import both_engines
from qsens.pipeline.loading import load_whole
from qsens.results import read_manifest
from qsens.store import Store
from tests.engine import pictures
from tests.pipeline.seeing import Place

PROMPT = "Describe this image ."
FIXED = {
    "coverage": "all_layers",
    "dataset.size": "small",
    "dataset.files.small": "small.jsonl",
    "quant_pair": "wint8_afp16",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("seeing"))


def image(path: str) -> dict[str, str]:
    return {"type": "image", "image": path}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*parts: dict[str, str]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def assistant(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": words}


def planned(place: Place, name: str, chats: list[Any], *overrides: str) -> Plan:
    """Plan a sweep over conversations, as many as there are."""
    (place.root / name).mkdir()
    lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    (place.root / name / "small.jsonl").write_text(lines)
    given = FIXED | dict(override.split("=", 1) for override in overrides)
    given.setdefault("dataset.sizes.small", str(len(chats)))
    words = [f"{key}={value}" for key, value in given.items()]
    return place.plan(*words, data=place.root / name, sizes={}, preset="single")


def read(plan: Plan) -> Any:
    return load_whole(plan, plan.cells[0], silent)


def shown(samples: Any, index: int, plan: Plan) -> tuple[list[str], list[str]]:
    """Return a sample in words, a run of tokens of a picture as one, and those that are labels."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(plan.config.model.path)
    ids = samples.ids[index]
    words = tokenizer.convert_ids_to_tokens(list(ids))
    whole = [
        word
        for at, word in enumerate(words)
        if not (ids[at] == pictures.IMAGE and at and ids[at - 1] == pictures.IMAGE)
    ]
    return whole, [word for start, end in samples.spans[index] for word in words[start:end]]


def test_answers_behind_pictures_are_labels(place: Place) -> None:
    (first, said), (second, other) = place.rows[:2]
    chats = [
        [user(image(first), text(PROMPT)), assistant(said), user(text("a")), assistant("red")],
        [user(text("this"), image(first), image(second)), assistant(other)],
    ]
    plan = planned(place, "labels", chats)
    samples = read(plan).samples
    picture = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    assert shown(samples, 0, plan) == (
        f"user {' '.join(picture)} {PROMPT} assistant {said} user a assistant red".split(),
        [*said.split(), "red"],
    )
    assert shown(samples, 1, plan) == (
        ["user", "this", *picture, *picture, "assistant", *other.split()],
        other.split(),
    )
    one, both = samples.pictures
    # As many tokens as the tower merges patches to, of one picture and of both.
    for index, held in enumerate((one, both)):
        grids = held.tensors["image_grid_thw"].tolist()
        assert len(grids) == index + 1
        assert held.patches == sum(t * h * w for t, h, w in grids)
        assert held.shown == held.patches // 4 == samples.ids[index].count(pictures.IMAGE)


def test_both_engines_agree(place: Place) -> None:
    rows = place.rows[:4]
    chats = [
        [user(image(name), text(PROMPT)), assistant(said), user(text("a")), assistant("red on")]
        for name, said in rows[:2]
    ]
    chats += [[user(image(name), image(rows[0][0])), assistant(said)] for name, said in rows[2:]]
    plan = planned(place, "engines", chats, "quant_pair=wint8_aint8", "autoquant.batch_size=2")
    ours, theirs, _ = both_engines(Store(plan), plan.cells[0], silent)
    assert any("visual" in name for name in ours)
    assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-12)
    manifests = place.run(plan)
    (manifest,) = manifests.values()
    assert manifest.dataset is not None
    assert (manifest.dataset.records, manifest.dataset.loss) == ("messages", "assistant")


def test_a_picture_behind_an_answer_leaves_the_last_one(place: Place) -> None:
    (first, said), (second, other) = place.rows[:2]
    chat = [
        user(image(first), text(PROMPT)),
        assistant(said),
        user(image(second), text(PROMPT)),
        assistant(other),
    ]
    plan = planned(place, "late", [chat])
    loaded = read(plan)
    assert shown(loaded.samples, 0, plan)[1] == other.split()
    assert any("the last answer alone is a label" in notice for notice in loaded.notices)
    each = planned(place, "each", [chat], "dataset.turns=each", "dataset.sizes.small=2")
    loaded = read(each)
    assert [shown(loaded.samples, at, each)[1] for at in (0, 1)] == [said.split(), other.split()]
    assert [len(one.tensors["image_grid_thw"]) for one in loaded.samples.pictures] == [1, 2]
    assert not any("the last answer alone" in notice for notice in loaded.notices)


def test_a_long_conversation_ends_behind_an_answer(place: Place) -> None:
    first, said = place.rows[0]
    chat = [user(image(first), text(PROMPT)), assistant(said), user(text("a")), assistant("red")]
    whole = read(planned(place, "whole", [chat])).samples
    longest = len(whole.ids[0]) - 1
    plan = planned(place, "cut", [chat], f"dataset.calib_seq_len={longest}")
    samples = read(plan).samples
    assert samples.truncated == (True,)
    assert shown(samples, 0, plan)[1] == said.split()
    assert samples.spans[0][-1][1] == len(samples.ids[0])


def test_what_shows_no_usable_picture_is_left_out(place: Place) -> None:
    rows = place.rows[:3]
    chats = [[user(image(name), text(PROMPT)), assistant(said)] for name, said in rows]
    chats.insert(1, [user(text("this image")), assistant("red")])
    chats.insert(2, [user(image(rows[0][0]), image("none.png")), assistant("red")])
    plan = planned(place, "left", chats, "dataset.max_skipped=0.5")
    (one,) = plan.cells[0].sets
    assert [(entry.sample, entry.image) for entry in one.skipped] == [(2, ""), (3, "none.png")]
    samples = read(plan).samples
    assert len(samples) == one.used == 3
    place.run(plan)
    manifest = read_manifest(Store(plan).manifest(plan.cells[0]))
    assert manifest.dataset is not None
    assert manifest.dataset.skipped == 2


def test_text_alone_leaves_out_what_shows_pictures(place: Place) -> None:
    first, said = place.rows[0]
    seeing = [user(image(first), text(PROMPT)), assistant(said)]
    plain = [user(text("this image")), assistant("red")]
    blind = ("coverage=lm_only", "dataset.max_skipped=0.5")
    plan = planned(place, "text", [plain, seeing], *blind)
    (one,) = plan.cells[0].sets
    assert (one.used, [entry.sample for entry in one.skipped]) == (1, [2])
    assert len(read(plan).samples) == 1
    with pytest.raises(UserError, match="none of its 1 samples can be read as text") as caught:
        planned(place, "none", [seeing], *blind)
    assert "dataset.modality=image_text" in caught.value.remedy


def test_another_picture_is_another_data_set(place: Place) -> None:
    (first, said), (second, _) = place.rows[:2]
    plans = [
        planned(place, f"as-{at}", [[user(image(name), text(PROMPT)), assistant(said)]])
        for at, name in enumerate((first, second))
    ]
    assert plans[0].cells[0].digest != plans[1].cells[0].digest
    assert Path(place.root / "images" / first).is_file()
