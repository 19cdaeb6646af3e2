from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from qsens.demo.drawings import Drawing, data_set_files, drawings, write_data_set
from qsens.demo.sentences import split_of

NUMBERS = {"a": 1, "two": 2, "three": 3}
KINDS = r"(a|two|three) (\w+) (circle|square|triangle)(s?)"
# Red, green and blue against half of their range; a word may allow both.
CHANNELS = {
    "red": (True, False, False),
    "green": (False, True, False),
    "blue": (False, False, True),
    "yellow": (True, True, False),
    "purple": (True, False, True),
    "black": (False, False, False),
}


def shapes_of(pixels: np.ndarray, color: str) -> list[tuple[str, slice, slice]]:
    """Return what is drawn in a colour: its form, the rows and the columns that it takes."""
    inked = (pixels < 250).any(axis=2)
    alike = (pixels > 127) == np.array(CHANNELS[color])
    labels, _ = ndimage.label(inked & alike.all(axis=2), structure=np.ones((3, 3)))
    found = []
    for number, place in enumerate(ndimage.find_objects(labels), 1):
        inside = labels[place] == number
        height, width = inside.shape
        assert height == width, (color, inside)
        share, top, bottom = inside.mean(), inside[0].sum(), inside[-1].sum()
        if share == 1:
            form = "square"
        elif top <= 2 and bottom == width:
            form = "triangle"
        else:
            assert share == pytest.approx(np.pi / 4, abs=0.1)
            assert (inside == inside[::-1]).all()
            assert (inside == inside[:, ::-1]).all()
            form = "circle"
        found.append((form, *place))
    return found


def overlap(one: list[slice], other: list[slice]) -> bool:
    """Return whether the stretches from the first to the last of each have a pixel in common."""
    (a, b), (c, d) = (
        (min(part.start for part in parts), max(part.stop for part in parts))
        for parts in (one, other)
    )
    return a < d and c < b


@pytest.fixture(scope="module")
def many() -> list[Drawing]:
    return drawings(1000, seed=3, split="training")


def check(caption: str, pixels: np.ndarray) -> str:
    """Compare a picture with its caption; return the relation that it shows."""
    said = re.fullmatch(f"{KINDS} (above|left of) {KINDS}\\.", caption.lower())
    assert said, caption
    groups = []
    for count, color, form, plural in (said.groups()[:4], said.groups()[5:]):
        shown = shapes_of(pixels, color)
        assert [entry[0] for entry in shown] == [form] * NUMBERS[count], caption
        assert bool(plural) == (count != "a"), caption
        groups.append(([entry[1] for entry in shown], [entry[2] for entry in shown]))
    drawn = sum(rows.stop - rows.start for group in groups for rows in group[0])
    assert drawn == 12 * sum(len(group[0]) for group in groups)
    (rows, columns), (other_rows, other_columns) = groups
    relation = said.group(5)
    if relation == "above":
        assert max(row.stop for row in rows) <= min(row.start for row in other_rows), caption
        assert overlap(columns, other_columns), caption
        assert not overlap(rows, other_rows), caption
    else:
        assert max(c.stop for c in columns) <= min(c.start for c in other_columns), caption
        assert overlap(rows, other_rows), caption
        assert not overlap(columns, other_columns), caption
    return relation


def test_pictures_show_what_their_captions_say_and_nothing_else(many: list[Drawing]) -> None:
    relations = set()
    for drawing in many:
        image = drawing.image()
        assert (image.mode, image.size) == ("RGB", (64, 64))
        pixels = np.asarray(image)
        relations.add(check(drawing.caption, pixels))
        named = set(drawing.caption.lower().split())
        for color in CHANNELS.keys() - named:
            assert shapes_of(pixels, color) == [], drawing.caption
    assert relations == {"above", "left of"}
    words = {word.strip(".") for drawing in many for word in drawing.caption.lower().split()}
    assert words >= {*NUMBERS, *CHANNELS, "circle", "squares", "triangle"}


def test_no_caption_is_drawn_twice_and_no_split_shares_one(many: list[Drawing]) -> None:
    parts = [
        {drawing.caption for drawing in drawings(500, seed=seed, split=split)}
        for seed, split in enumerate(("training", "held_out", "calibration"))
    ]
    assert [len(part) for part in parts] == [500] * 3
    assert not any(one & other for one, other in combinations(parts, 2))
    assert {split_of(drawing.caption) for drawing in many} == {"training"}


def test_the_stream_is_pinned_and_continues() -> None:
    first = drawings(40, seed=0)
    assert [drawing.caption for drawing in first[:2]] == [
        "Two blue triangles left of two purple triangles.",
        "Two red triangles above two blue squares.",
    ]
    assert first[1].first.corners == ((17, 2), (34, 0))
    assert drawings(60, seed=0)[:40] == first
    assert drawings(40, seed=1) != first


def test_bad_counts_are_refused() -> None:
    assert drawings(0, seed=0) == []
    with pytest.raises(ValueError, match="negative"):
        drawings(-1, seed=0)
    with pytest.raises(ValueError, match="distinct"):
        drawings(700, seed=0)


def test_data_set_holds_a_picture_a_caption_and_sizes_are_heads(tmp_path: Path) -> None:
    write_data_set(tmp_path)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == set(data_set_files())
    texts = {
        size: (tmp_path / f"drawings_{size}.jsonl").read_text(encoding="utf-8")
        for size in ("small", "medium", "large")
    }
    assert [text.count("\n") for text in texts.values()] == [16, 128, 512]
    assert texts["large"].startswith(texts["medium"])
    assert texts["medium"].startswith(texts["small"])
    samples = [json.loads(line) for line in texts["large"].splitlines()]
    assert len({sample["caption"] for sample in samples}) == 512
    assert {split_of(sample["caption"]) for sample in samples} == {"calibration"}
    for sample in samples:
        with Image.open(tmp_path / sample["image"]) as image:
            check(sample["caption"], np.asarray(image))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.png")) < 256 * 1024


def test_nothing_of_it_imports_torch() -> None:
    code = "import sys, qsens.demo.drawings, qsens.demo.recipe; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
