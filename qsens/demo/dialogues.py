"""Dialogues about scenes, for the demo checkpoint: a data set of conversations beside its captions.

Somebody asks who is there, what they do, where and when; the answers hold together. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Final

from qsens.demo.scenes import SCENES, Scene
from qsens.demo.sentences import (
    Draw,
    Phrase,
    draw_action,
    draw_place,
    draw_subject,
    draw_time,
)

COUNT: Final = 512
"""Dialogues in the shipped file."""

_SEED: Final = 1
_OPENINGS: Final = ("Who is there?", "Whom do you see?", "Who is in the picture?")
_MORE: Final = ("Tell me more.", "Go on.", "And what else?")


def dialogues(count: int, *, seed: int = _SEED) -> list[list[dict[str, str]]]:
    """Return dialogues as lists of messages, no two alike, the same on any machine.

    The first `count` do not depend on `count`.
    """
    made: dict[str, list[dict[str, str]]] = {}
    stream = _stream(seed)
    while len(made) < count:
        messages = next(stream)
        made.setdefault(json.dumps(messages), messages)
    return list(made.values())


def shipped() -> str:
    """Return the content of the shipped file: a dialogue a line."""
    return "".join(json.dumps({"messages": one}) + "\n" for one in dialogues(COUNT))


def _stream(seed: int) -> Iterator[list[dict[str, str]]]:
    draw = Draw(seed)
    while True:
        scene = SCENES[draw.one(list(SCENES))]
        subject = draw_subject(draw, scene)
        turns = [(draw.one(_OPENINGS), subject.text)]
        asked = _questions(draw, scene, subject)
        for _ in range(1 + int(draw.chance(0.6)) + int(draw.chance(0.4))):
            turn = draw.one(asked)
            asked.remove(turn)
            turns.append(turn)
        yield [
            {"role": role, "content": f"{text[0].upper()}{text[1:]}"}
            for question, answer in turns
            for role, text in (("user", question), ("assistant", f"{answer}."))
        ]


def _questions(draw: Draw, scene: Scene, subject: Phrase) -> list[tuple[str, str]]:
    """Return questions about somebody with their answers."""
    be, do, they = ("are", "do", "they") if subject.plural else ("is", "does", "it")
    action = draw_action(draw, scene, subject.plural, progressive=True)
    place, when = draw_place(draw, scene), draw_time(draw, scene)
    return [
        (f"What {be} {they} doing?", f"{subject.text} {action}"),
        (f"Where {be} {they}?", f"{they} {be} {place}"),
        (f"When {do} {they} do that?", f"{they} {do} that {when}"),
        (draw.one(_MORE), f"{subject.text} {action} {place} {when}"),
    ]
