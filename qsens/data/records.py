"""Sample files with more than a caption a line, read without torch: JSONL and SQLite.

JSONL: ``{"image": path, "caption": text}`` a line. SQLite: the table ``vlm_calib_samples`` with the
columns ``split, image_relpath, image_id, caption_id, caption``, in the order of its rows.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from qsens.config.models import JSONL, has_suffix
from qsens.errors import UserError
from qsens.reading import open_file, parse_json, read_bytes, shown
from qsens.visible import visible

CHOOSE = "Set dataset.directory, or choose another data set, such as dataset=demo."
_TABLE = "vlm_calib_samples"


@dataclass(frozen=True)
class Record:
    """A sample.

    Attributes:
        image: Path of its image relative to the images' directory, never out of it; empty where
            the file names none.
        caption: Its caption, stripped.
    """

    image: str
    caption: str


def read_records(path: Path, split: str) -> list[Record]:
    """Return the samples of a file, in order; those without a caption are left out.

    Args:
        path: The file; its suffix says what it is.
        split: Which samples of an SQLite file: its only split where it has just one.

    Raises:
        UserError: The file is broken, has another layout, or names an image outside the images'
            directory; the message names the line or row.
    """
    read = _jsonl(path) if has_suffix(path, JSONL) else _sqlite(path, split)
    return [record for record in read if record.caption]


def _jsonl(path: Path) -> Iterator[Record]:
    data = read_bytes(path, where=f"captions file {path}", remedy=CHOOSE)
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line, halves=True)
        except ValueError as error:
            raise _broken(path, f"line {number} is no JSON: {error}") from error
        if not isinstance(entry, dict) or "caption" not in entry:
            raise _broken(path, f"line {number} is no object with a 'caption'")
        yield _record(path, f"line {number}", entry.get("image", ""), entry["caption"])


def _sqlite(path: Path, split: str) -> Iterator[Record]:
    log = path.with_name(f"{path.name}-wal")
    if log.is_file() and log.stat().st_size:
        raise UserError(
            "has a write-ahead log beside it, so the file alone is not the whole data set",
            where=f"samples file {path}",
            remedy="Close whatever writes to it, or run `PRAGMA wal_checkpoint(TRUNCATE)` on it.",
        )
    # Nothing is locked or written, so a data set on a read-only disk works.
    address = f"file:{quote(str(path))}?mode=ro&immutable=1"
    try:
        with (
            # Who opens it by name cannot know what it is.
            open_file(path, where=f"captions file {path}", remedy=CHOOSE),
            closing(sqlite3.connect(address, uri=True)) as opened,
        ):
            opened.execute("PRAGMA trusted_schema = OFF")
            splits = [row[0] for row in opened.execute(f"SELECT DISTINCT split FROM {_TABLE}")]
            chosen = splits[0] if len(splits) == 1 else split
            if splits and chosen not in splits:
                listed = ", ".join(sorted(map(shown, splits)))
                raise UserError(
                    f"has no split '{split}'; its splits are {listed}",
                    where=f"samples file {path}",
                    remedy="Name the splits small, medium and large, or have one file a size.",
                )
            rows = opened.execute(
                f"SELECT image_relpath, caption FROM {_TABLE} WHERE split IS ? ORDER BY rowid",
                (chosen,),
            )
            for number, (image, caption) in enumerate(rows, 1):
                yield _record(path, f"row {number} of split '{chosen}'", image, caption)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise _broken(path, visible(str(error))) from error


def _record(path: Path, where: str, image: Any, caption: Any) -> Record:
    if not isinstance(caption, str):
        raise _broken(path, f"the caption of {where} is no text")
    if any("\ud800" <= character <= "\udfff" for character in caption):
        raise _broken(path, f"the caption of {where} holds half of a surrogate pair")
    if image is None:
        image = ""
    if not isinstance(image, str):
        raise _broken(path, f"the image of {where} is no path")
    pure = PurePosixPath(image)
    if pure.is_absolute() or ".." in pure.parts or "\0" in image or "\\" in image:
        raise _broken(path, f"the image of {where} lies outside the images' directory: {image!r}")
    return Record(image, caption.strip())


def _broken(path: Path, what: str) -> UserError:
    return UserError(
        what,
        where=f"samples file {path}",
        remedy='Write {"image": PATH, "caption": TEXT} a line (.jsonl), or a table '
        f"{_TABLE} with split, image_relpath and caption (.sqlite).",
    )
