"""What the captions are about: ``scenes.yaml`` as it is read, which says how words are marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from types import SimpleNamespace
from typing import Any, Final

import yaml


@dataclass(frozen=True, slots=True)
class Scene:
    """Subjects of one kind with what they look like, what they do and where.

    Attributes:
        subjects: Nouns.
        looks: Adjectives of the subjects.
        actions: Objects by verb; an empty string for a verb that takes none.
        places: Nouns by preposition.
        moods: Adjectives of the places.
        landmarks: Nouns to stand beside.
        people: Whether subjects wear and carry things.
        indoors: Whether there is no weather.
        company: Keys of `SCENES` whose subjects may be in the background.
    """

    subjects: str
    looks: str
    actions: dict[str, str]
    places: dict[str, str]
    moods: str
    landmarks: str
    people: bool = False
    indoors: bool = False
    company: Sequence[str] = ()


_READ: Final[dict[str, Any]] = yaml.safe_load(
    resources.files("qsens.demo").joinpath("scenes.yaml").read_text(encoding="utf-8")
)
SCENES: Final = {name: Scene(**given) for name, given in _READ["scenes"].items()}
COMMON: Final = SimpleNamespace(**_READ["words"])
"""Words that fit everywhere, by what they are."""
