from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from qsens.demo import scenes
from qsens.demo.sentences import captions, inflect, shipped, split_of

SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "dataset" / "demo"
VOWELS = set("aeiou")
# Words of the grammar that follow a number and are plural.
IRREGULAR_PLURALS = {"women", "men", "fishermen", "children", "sheep", "deer", "geese"}
NUMBERS = {"two", "three", "four", "five", "six", "several"}


def words(caption: str) -> list[str]:
    return re.findall(r"[a-z]+", caption.lower())


@pytest.fixture(scope="module")
def many() -> list[str]:
    return captions(4000, seed=7, split="training")


def test_captions_are_distinct_and_repeatable() -> None:
    first = captions(600, seed=3)
    assert len(set(first)) == 600
    assert captions(600, seed=3) == first
    assert captions(40, seed=3) == first[:40]
    assert len(set(captions(600, seed=4)) & set(first)) < 60


def test_the_stream_is_pinned() -> None:
    assert captions(2, seed=0) == [
        "Four singers tune banjos in a brightly lit ballroom.",
        "Three geologists rest on a rocky slope in the early morning.",
    ]


def test_bad_counts_are_refused() -> None:
    assert captions(0, seed=0) == []
    with pytest.raises(ValueError, match="negative"):
        captions(-1, seed=0)


def test_vocabulary_is_wide() -> None:
    assert len({word for caption in captions(512, seed=0) for word in words(caption)}) >= 300


def test_captions_are_sentences_of_8_to_14_words(many: list[str]) -> None:
    for caption in many:
        assert 8 <= len(caption.split()) <= 14, caption
        assert re.fullmatch(r"[A-Z][a-z]*,?( [a-z]+,?)+\.", caption), caption


def test_articles_agree_with_the_next_word(many: list[str]) -> None:
    seen = set()
    for caption in many:
        tokens = words(caption)
        for article, following in pairwise(tokens):
            if article in ("a", "an") and following != "few":
                assert (article == "an") == (following[0] in VOWELS), caption
                seen.add(article)
    assert seen == {"a", "an"}


@pytest.mark.parametrize(
    ("verb", "one", "going_on"),
    [
        ("wait for", "waits for", "are waiting for"),
        ("carry", "carries", "are carrying"),
        ("buy", "buys", "are buying"),
        ("catch", "catches", "are catching"),
        ("push", "pushes", "are pushing"),
        ("pass", "passes", "are passing"),
        ("run", "runs", "are running"),
        ("stir", "stirs", "are stirring"),
        ("slice", "slices", "are slicing"),
        ("tow", "tows", "are towing"),
    ],
)
def test_inflections(verb: str, one: str, going_on: str) -> None:
    assert inflect(verb, False, progressive=False) == one
    assert inflect(verb, True, progressive=False) == verb
    assert inflect(verb, True, progressive=True) == going_on


def test_there_is_and_there_are_agree_with_what_follows(many: list[str]) -> None:
    for caption in many:
        opening = words(caption)
        if opening[:2] in (["there", "is"], ["there", "are"]):
            plural = opening[2] in NUMBERS or opening[2:4] == ["a", "few"]
            assert (opening[1] == "are") == plural, caption


def test_numbers_come_with_plurals(many: list[str]) -> None:
    for caption in many:
        noun_phrase = re.match(r"(\w+) (?:\w+ )?(?:are|is)\b", caption)
        if noun_phrase and noun_phrase[1].lower() in NUMBERS:
            noun = noun_phrase[0].split()[-2]
            assert noun.endswith("s") or noun in IRREGULAR_PLURALS, caption
            assert noun_phrase[0].endswith("are"), caption


def test_splits_share_no_caption_whatever_the_seeds() -> None:
    calibration = {c for seed in range(3) for c in captions(512, seed=seed, split="calibration")}
    held_out = {c for seed in range(3) for c in captions(512, seed=seed, split="held_out")}
    training = {c for seed in range(3) for c in captions(4000, seed=seed, split="training")}
    assert not calibration & held_out
    assert not calibration & training
    assert not held_out & training
    assert {split_of(caption) for caption in held_out} == {"held_out"}


def test_every_background_can_do_something_by_itself() -> None:
    for scene in scenes.SCENES.values():
        for key in scene.company:
            assert "" in scenes.SCENES[key].actions.values(), key


def test_shipped_files_are_what_the_generator_gives() -> None:
    assert sorted(shipped()) == [f"captions_{size}.txt" for size in ("large", "medium", "small")]
    for name, text in shipped().items():
        assert (SHIPPED / name).read_bytes() == text.encode()


def test_shipped_files_are_nested() -> None:
    text = {
        size: (SHIPPED / f"captions_{size}.txt").read_bytes().decode("utf-8")
        for size in ("small", "medium", "large")
    }
    assert {size: content.count("\n") for size, content in text.items()} == {
        "small": 16,
        "medium": 128,
        "large": 512,
    }
    assert text["large"].startswith(text["medium"])
    assert text["medium"].startswith(text["small"])
    assert "\r" not in text["large"]
    assert len(set(text["large"].splitlines())) == 512


def test_captions_do_not_import_torch() -> None:
    code = "import sys, qsens.demo.sentences; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
