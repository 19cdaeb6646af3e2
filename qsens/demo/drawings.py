"""Pictures drawn from a small seeded grammar, each with a caption that says what is on it.

A picture shows two groups of like shapes on a white ground, one above or left of the other:
"Two red circles above a blue square." Unlike :mod:`qsens.demo.sentences`, whose captions are text
alone, a caption here can be told from its picture and from nothing else. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final, Literal

from PIL import Image, ImageDraw

from qsens.demo.sentences import SHIPPED_SEED, SIZES, Split, distinct

Relation = Literal["above", "left of"]
Shape = Literal["circle", "square", "triangle"]

SIDE: Final = 64
"""Width and height of a picture, in pixels."""

DATA_SET: Final = "drawings"
"""The directory below the demo checkpoint's that holds the calibration samples."""

CELL: Final = 16
"""Width and height of the place that a shape is drawn in, in pixels: a patch of the tower."""

SHAPE: Final = 12
"""Width and height of a shape, in pixels."""

COLORS: Final = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
    "black": (10, 10, 10),
    "purple": (150, 40, 180),
}
GROUND: Final = (255, 255, 255)
SHAPES: Final[tuple[Shape, ...]] = ("circle", "square", "triangle")
RELATIONS: Final[tuple[Relation, ...]] = ("above", "left of")
LOOK: Final = (SIDE, CELL, SHAPE, COLORS, GROUND)
"""All numbers that pictures are drawn from, beside what is on them."""

_COUNTS: Final = ("A", "Two", "Three")
_CELLS: Final = SIDE // CELL
_PICTURES: Final = "pictures"
_TRIES_PER_DRAWING: Final = 100


@dataclass(frozen=True)
class Group:
    """Shapes of one kind in a row or a column.

    Attributes:
        color: Their colour.
        shape: What they are.
        corners: Left and upper edge of each, in pixels.
    """

    color: str
    shape: Shape
    corners: tuple[tuple[int, int], ...]

    @property
    def phrase(self) -> str:
        """Return what it is in words, ``two red circles``."""
        count = _COUNTS[len(self.corners) - 1].lower()
        return f"{count} {self.color} {self.shape}{'s' if len(self.corners) > 1 else ''}"


@dataclass(frozen=True)
class Drawing:
    """Two groups of shapes, one above or left of the other.

    Attributes:
        first: The group above or on the left.
        second: The other, of another colour.
        relation: How the first lies to the second.
    """

    first: Group
    second: Group
    relation: Relation

    @property
    def caption(self) -> str:
        """Return what it shows, in a sentence."""
        text = f"{self.first.phrase} {self.relation} {self.second.phrase}."
        return f"{text[0].upper()}{text[1:]}"

    def image(self) -> Image.Image:
        """Return the picture, RGB, :data:`SIDE` by :data:`SIDE`."""
        image = Image.new("RGB", (SIDE, SIDE), GROUND)
        pen = ImageDraw.Draw(image)
        for group in (self.first, self.second):
            for x, y in group.corners:
                _draw(pen, group.shape, x, y, COLORS[group.color])
        return image


def drawings(count: int, *, seed: int, split: Split = "calibration") -> list[Drawing]:
    """Return drawings of one split, no caption twice, the same for the same arguments.

    The first `count` drawings do not depend on `count`: a longer list continues a shorter one.

    Args:
        count: How many drawings.
        seed: Which stream of drawings.
        split: Which part of all captions to draw from; no caption is in two parts.

    Raises:
        ValueError: If `count` is negative, or more than the grammar has.
    """
    stream = _stream(Random(seed))
    return distinct(
        stream, lambda drawing: drawing.caption, count, split=split, tries=_TRIES_PER_DRAWING
    )


def shipped() -> list[Drawing]:
    """Return the drawings of the calibration samples, those of the largest size."""
    return drawings(max(SIZES.values()), seed=SHIPPED_SEED)


def data_set_files() -> list[str]:
    """Return the files of the data set, by path below its directory."""
    pictures = [_picture(number) for number in range(max(SIZES.values()))]
    return [*(f"drawings_{size}.jsonl" for size in SIZES), *pictures]


def write_data_set(directory: Path) -> None:
    """Write the calibration samples into an existing empty directory.

    Each size is a JSONL file of ``{"image": path, "caption": text}``, the head of the next.
    """
    (directory / _PICTURES).mkdir()
    lines = []
    for number, drawing in enumerate(shipped()):
        drawing.image().save(directory / _picture(number))
        sample = {"image": _picture(number), "caption": drawing.caption}
        lines.append(f"{json.dumps(sample)}\n")
    for size, count in SIZES.items():
        (directory / f"drawings_{size}.jsonl").write_bytes("".join(lines[:count]).encode())


def _picture(number: int) -> str:
    return f"{_PICTURES}/{number:03}.png"


def _stream(random: Random) -> Iterator[Drawing]:
    # Random.random alone: only its stream is promised to stay the same.
    def below(limit: int) -> int:
        return int(random.random() * limit)

    while True:
        relation = RELATIONS[below(len(RELATIONS))]
        counts = 1 + below(3), 1 + below(3)
        lines = below(_CELLS // 2), _CELLS // 2 + below(_CELLS // 2)
        starts = below(_CELLS + 1 - counts[0]), below(_CELLS + 1 - counts[1])
        kinds = [(below(len(COLORS)), below(len(SHAPES))) for _ in range(2)]
        shifts = [(below(CELL - SHAPE), below(CELL - SHAPE)) for _ in range(sum(counts))]
        apart = starts[0] + counts[0] <= starts[1] or starts[1] + counts[1] <= starts[0]
        # Groups that share neither a row nor a column are above and left of each other at once.
        if apart or kinds[0][0] == kinds[1][0]:
            continue
        groups = []
        for number, line, start, (color, shape) in zip(counts, lines, starts, kinds, strict=True):
            cells = [(at, line) for at in range(start, start + number)]
            if relation == "left of":
                cells = [(y, x) for x, y in cells]
            corners = []
            for column, row in cells:
                x, y = shifts.pop()
                corners.append((column * CELL + x, row * CELL + y))
            groups.append(Group(list(COLORS)[color], SHAPES[shape], tuple(corners)))
        yield Drawing(groups[0], groups[1], relation)


def _draw(
    pen: ImageDraw.ImageDraw, shape: Shape, x: int, y: int, color: tuple[int, int, int]
) -> None:
    right, bottom = x + SHAPE - 1, y + SHAPE - 1
    if shape == "circle":
        pen.ellipse((x, y, right, bottom), fill=color)
    elif shape == "square":
        pen.rectangle((x, y, right, bottom), fill=color)
    else:
        pen.polygon([(x, bottom), (right, bottom), (x + SHAPE // 2, y)], fill=color)
