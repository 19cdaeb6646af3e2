"""Captions of scenes from a small seeded grammar: text to train, calibrate and test on.

A caption is one English sentence of 8 to 14 words. Subjects, actions and places hang together by
scene, so a model gains by looking further back than one word. No download, no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Final, Literal, NamedTuple, TypeVar

from qsens.demo.scenes import COMMON, SCENES, Scene

Split = Literal["calibration", "held_out", "training"]
_T = TypeVar("_T")

SIZES: Final[dict[str, int]] = {"small": 16, "medium": 128, "large": 512}
"""Captions in each shipped calibration file; each file is the head of the next."""

SHIPPED_SEED: Final = 0
"""The seed of the shipped calibration files."""

WORDS: Final = range(8, 15)
"""Permitted numbers of words in a caption."""

_IRREGULAR: Final = {
    "man": "men",
    "woman": "women",
    "fisherman": "fishermen",
    "child": "children",
    "sheep": "sheep",
    "deer": "deer",
    "goose": "geese",
    "calf": "calves",
    "wolf": "wolves",
    "scarf": "scarves",
    "shelf": "shelves",
}
_SINGULAR: Final = {many: one for one, many in _IRREGULAR.items()}
_DOUBLED: Final = frozenset({"run", "swim", "nap", "stop", "stir", "trot", "sit"})
_FUNCTION_WORDS: Final = "a an the in on at of with and is are there to while from for"
_TRIES_PER_CAPTION: Final = 200


def captions(count: int, *, seed: int, split: Split = "calibration") -> list[str]:
    """Return distinct captions of one split, the same for the same arguments on any machine.

    The first `count` captions do not depend on `count`: a longer list continues a shorter one.

    Args:
        count: How many captions.
        seed: Which stream of captions.
        split: Which part of all captions to draw from; no caption is in two parts.

    Raises:
        ValueError: If `count` is negative, or more than the grammar has.
    """
    return distinct(_stream(seed), str, count, split=split, tries=_TRIES_PER_CAPTION)


def distinct(
    stream: Iterator[_T], caption: Callable[[_T], str], count: int, *, split: Split, tries: int
) -> list[_T]:
    """Return the first items of a stream that belong to one split, no caption twice.

    Args:
        stream: The items, without end.
        caption: Returns an item's caption.
        count: How many items.
        split: Which part of all captions to draw from.
        tries: Items to look at for each one that is wanted, at most.

    Raises:
        ValueError: If `count` is negative, or more than the stream gave.
    """
    if count < 0:
        raise ValueError(f"count is {count}; it must not be negative")
    made: dict[str, _T] = {}
    for _ in range(tries * count):
        if len(made) == count:
            break
        item = next(stream)
        if split_of(caption(item)) == split:
            made.setdefault(caption(item), item)
    if len(made) < count:
        raise ValueError(f"count is {count}; the grammar gave only {len(made)} distinct captions")
    return list(made.values())


def split_of(caption: str) -> Split:
    """Return the split that a caption belongs to: a property of its text, whatever the seed."""
    eighth = hashlib.sha256(caption.encode()).digest()[0] % 8
    if eighth == 0:
        return "calibration"
    return "held_out" if eighth == 1 else "training"


def shipped() -> dict[str, str]:
    """Return the content of the shipped calibration files by file name, one caption a line."""
    lines = captions(max(SIZES.values()), seed=SHIPPED_SEED)
    return {
        f"captions_{size}.txt": "".join(f"{line}\n" for line in lines[:count])
        for size, count in SIZES.items()
    }


class Phrase(NamedTuple):
    """Words for a subject, and whether there are several of it."""

    text: str
    plural: bool


class Draw:
    """Random choices, from `Random.random` alone: only its stream is promised to stay the same."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def chance(self, probability: float) -> bool:
        """Return true with that probability."""
        return self._random.random() < probability

    def one(self, options: Sequence[_T]) -> _T:
        """Return one of the options."""
        return options[int(self._random.random() * len(options))]

    def word(self, words: str) -> str:
        """Return one of several words, as it is read."""
        return self.one(words.split()).replace("_", " ")


def _stream(seed: int) -> Iterator[str]:
    draw = Draw(seed)
    while True:
        text = _caption(draw)
        if _reads_well(text):
            yield f"{text[0].upper()}{text[1:]}."


def _reads_well(text: str) -> bool:
    """Refuse captions that are too short or too long, or that say a thing twice."""
    words = text.replace(",", "").split()
    content = [_stem(word) for word in words if word not in _FUNCTION_WORDS.split()]
    return (
        len(words) in WORDS
        and len(set(content)) == len(content)
        and all(words.count(word) < 3 for word in ("in", "on", "at", "with"))
    )


def _stem(word: str) -> str:
    singular = _SINGULAR.get(word, word)
    return singular.removesuffix("ing").removesuffix("s").removesuffix("e").removesuffix("y")


def _caption(draw: Draw) -> str:
    if draw.chance(0.1):
        return _still_life(draw)
    scene = SCENES[draw.one(list(SCENES))]
    subject = draw_subject(draw, scene)
    templates = [_plain, _plain, _progressive, _place_first, _time_first, _there_is, _pair]
    if scene.company:
        templates.append(_while)
    return draw.one(templates)(draw, scene, subject)


def _plain(draw: Draw, scene: Scene, subject: Phrase) -> str:
    text = f"{subject.text} {draw_action(draw, scene, subject.plural)}"
    where = _beside(draw, scene) if draw.chance(0.3) else draw_place(draw, scene)
    return f"{text} {where} {draw_time(draw, scene)}" if draw.chance(0.6) else f"{text} {where}"


def _progressive(draw: Draw, scene: Scene, subject: Phrase) -> str:
    action = draw_action(draw, scene, subject.plural, progressive=True)
    where = _beside(draw, scene) if draw.chance(0.3) else draw_place(draw, scene)
    return f"{subject.text} {action} {where}"


def _place_first(draw: Draw, scene: Scene, subject: Phrase) -> str:
    action = draw_action(draw, scene, subject.plural, progressive=draw.chance(0.5))
    return f"{draw_place(draw, scene)}, {subject.text} {action}"


def _time_first(draw: Draw, scene: Scene, subject: Phrase) -> str:
    action = draw_action(draw, scene, subject.plural, progressive=draw.chance(0.5))
    return f"{draw_time(draw, scene)}, {subject.text} {action} {draw_place(draw, scene)}"


def _there_is(draw: Draw, scene: Scene, subject: Phrase) -> str:
    be = "are" if subject.plural else "is"
    tail = draw_time(draw, scene) if draw.chance(0.5) else draw_place(draw, scene)
    return f"there {be} {subject.text} {_beside(draw, scene)} {tail}"


def _pair(draw: Draw, scene: Scene, subject: Phrase) -> str:
    other = draw_subject(draw, scene, plain=True)
    action = draw_action(draw, scene, True)
    return f"{subject.text} and {other.text} {action} {draw_place(draw, scene)}"


def _while(draw: Draw, scene: Scene, subject: Phrase) -> str:
    background = SCENES[draw.one(scene.company)]
    other = draw_subject(draw, background, plain=True)
    verb = inflect(draw.one(_intransitive(background)), other.plural, progressive=False)
    action = draw_action(draw, scene, subject.plural)
    return f"{subject.text} {action} while {other.text} {verb} {draw.word(COMMON.backgrounds)}"


def _still_life(draw: Draw) -> str:
    first = _counted(draw, COMMON.fruit, COMMON.fruit_looks)
    second = _a(draw, COMMON.vessels, COMMON.vessel_looks)
    surface = _a(draw, COMMON.surfaces, COMMON.surface_looks)
    if draw.chance(0.5):
        room = f"in {_a(draw, COMMON.rooms, COMMON.room_looks)}"
        verb = inflect("sit", first.plural, progressive=False)
        return f"{first.text} {verb} on {surface} {room}"
    be = "are" if first.plural else "is"
    relation = draw.word(COMMON.relations)
    return f"there {be} {first.text} on {surface} {relation} {second}"


def draw_subject(draw: Draw, scene: Scene, *, plain: bool = False) -> Phrase:
    """Return somebody or something of a scene; plain, without what they wear."""
    subject = _counted(draw, scene.subjects, scene.looks)
    if plain or not scene.people or not draw.chance(0.3):
        return subject
    if draw.chance(0.7):
        with_it, things, looks = "in", COMMON.garments, COMMON.colors
    else:
        with_it, things, looks = "with", COMMON.luggage, ""
    if subject.plural:
        return Phrase(f"{subject.text} {with_it} {_some(draw, things, looks)}", True)
    return Phrase(f"{subject.text} {with_it} {_a(draw, things, looks)}", False)


def _counted(draw: Draw, nouns: str, looks: str) -> Phrase:
    looks = looks if draw.chance(0.75) else ""
    if draw.chance(0.55):
        return Phrase(_a(draw, nouns, looks), False)
    return Phrase(f"{draw.word(COMMON.quantities)} {_some(draw, nouns, looks)}", True)


def _a(draw: Draw, nouns: str, looks: str) -> str:
    return _article(" ".join(([draw.word(looks)] if looks else []) + [draw.word(nouns)]))


def _some(draw: Draw, nouns: str, looks: str) -> str:
    return " ".join(([draw.word(looks)] if looks else []) + [_plural(draw.word(nouns))])


def _intransitive(scene: Scene) -> list[str]:
    return [verb for verb, objects in scene.actions.items() if not objects]


def draw_action(draw: Draw, scene: Scene, plural: bool, *, progressive: bool = False) -> str:
    """Return what somebody of a scene does."""
    verb = draw.one(list(scene.actions))
    inflected = inflect(verb, plural, progressive=progressive)
    if not scene.actions[verb]:
        return inflected
    noun = draw.word(scene.actions[verb])
    if noun.endswith("*"):
        return f"{inflected} {noun[:-1]}"
    if noun.endswith("!"):
        return f"{inflected} {_article(noun[:-1])}"
    looks = COMMON.colors if draw.chance(0.5) else ""
    noun = noun.replace(" ", "_")
    return f"{inflected} {_some(draw, noun, looks) if plural else _a(draw, noun, looks)}"


def draw_place(draw: Draw, scene: Scene) -> str:
    """Return where."""
    preposition = draw.one(list(scene.places))
    nouns = scene.places[preposition]
    if draw.chance(0.7):
        return f"{preposition} {_a(draw, nouns, scene.moods)}"
    return f"{preposition} the {draw.word(nouns)}"


def _beside(draw: Draw, scene: Scene) -> str:
    landmark = draw.word(scene.landmarks)
    where = _article(landmark) if draw.chance(0.6) else f"the {landmark}"
    return f"{draw.word(COMMON.relations)} {where}"


def draw_time(draw: Draw, scene: Scene) -> str:
    """Return when, or in what weather."""
    if draw.chance(0.4):
        kinds = COMMON.seasons if scene.indoors or draw.chance(0.3) else COMMON.weather
        return f"on {_a(draw, COMMON.parts_of_day, kinds)}"
    if scene.indoors:
        return draw.word(COMMON.indoor_hours)
    return draw.word(COMMON.skies if draw.chance(0.5) else COMMON.hours)


def _article(phrase: str) -> str:
    # By letter, not by sound: the scenes have no word like "hour" or "uniform".
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _plural(noun: str) -> str:
    head, space, last = noun.rpartition(" ")
    return f"{head}{space}{_IRREGULAR.get(last) or _with_s(last)}"


def _with_s(word: str) -> str:
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return f"{word}es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}s"


def inflect(verb: str, plural: bool, *, progressive: bool) -> str:
    """Return a verb as its subject asks for it."""
    head, space, particle = verb.partition(" ")
    if not progressive:
        return f"{head if plural else _with_s(head)}{space}{particle}"
    stem = f"{head}{head[-1]}" if head in _DOUBLED else head.removesuffix("e")
    return f"{'are' if plural else 'is'} {stem}ing{space}{particle}"
