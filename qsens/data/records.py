"""Sample files of records, read without torch: JSON lines, JSON lists, Parquet and SQLite.

JSON: ``{"image": path, "caption": text}``, ``{"text": text}``, or a conversation, see
:mod:`qsens.data.conversations`; compressed or not. SQLite: the table ``vlm_calib_samples`` with the
columns ``split, image_relpath, image_id, caption_id, caption``, in the order of its rows.
"""

from __future__ import annotations

import gzip
import io
import itertools
import re
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from qsens.config.models import GZIP, JSON, PARQUET, SQLITE, RecordKind, has_suffix, uncompressed
from qsens.data.conversations import Conversation, kind_of, leads_out, read_conversation
from qsens.errors import UserError
from qsens.reading import MOST_BYTES, open_file, parse_json, read_bytes, shown
from qsens.visible import visible

CHOOSE = "Set dataset.directory, or choose another data set, such as dataset=demo."
_TABLE = "vlm_calib_samples"
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Record:
    """A sample.

    Attributes:
        image: Path of its image relative to the images' directory, never out of it; empty where
            the file names none.
        caption: Its caption or text, stripped; of a conversation, all of it in one line.
        conversation: The conversation; none where it is a caption or a text.
        fault: What is wrong with a record that is no conversation; it is left out.
    """

    image: str
    caption: str
    conversation: Conversation | None = None
    fault: str = ""

    @property
    def images(self) -> tuple[str, ...]:
        """Paths of its pictures; one that is empty where it names none."""
        shown = self.conversation.images if self.conversation is not None else (self.image,)
        return shown or ("",)

    @property
    def needs_pictures(self) -> bool:
        """Whether it says nothing without them: a conversation that shows some."""
        return self.conversation is not None and bool(self.conversation.images)


def read_records(
    path: Path, split: str, kind: str = "auto", *, each_turn: bool = False
) -> tuple[list[Record], RecordKind]:
    """Return the samples of a file, in order, and what they are; empty texts are left out.

    Args:
        path: The file; its suffix says what it is.
        split: Which samples of an SQLite file: its only split where it has just one.
        kind: What the records are; by the first one's keys when ``auto``.
        each_turn: Whether each answer of a conversation is a sample.

    Raises:
        UserError: The file is broken, has another layout, or names an image outside the images'
            directory; the message names the line or row.
    """
    if has_suffix(path, SQLITE):
        if kind not in ("auto", "caption"):
            raise _broken(path, f"holds captions, and dataset.format = {kind}")
        return [record for record in _sqlite(path, split) if record.caption], "caption"
    if has_suffix(path, PARQUET):
        entries = _rows(path)
    else:
        entries = _array(path) if has_suffix(uncompressed(path), JSON) else _lines(path)
    first = next(entries, None)
    if first is None:
        return [], "caption"
    found = kind_of(first[1]) if kind == "auto" else kind
    if found is None:
        raise _broken(path, f"{first[0]} has none of the keys that say what it is")
    records = []
    for where, entry in itertools.chain([first], entries):
        record = _read(path, where, entry, found)
        if each_turn and record.conversation is not None:
            turns = record.conversation.turns()
            records += [Record("", str(turn), turn) for turn in turns]
        elif record.caption:
            records.append(record)
    if records and all(record.fault for record in records):
        raise _broken(path, f"none of its {len(records)} records fits; sample 1 {records[0].fault}")
    return records, found  # type: ignore[return-value]


def _read(path: Path, where: str, entry: Mapping[str, Any], kind: str) -> Record:
    """Return a record of that kind."""
    if kind in ("caption", "text"):
        if kind not in entry:
            raise _broken(path, f"{where} is no object with a '{kind}'")
        return _record(path, where, entry.get("image", ""), entry[kind], kind)
    try:
        conversation = read_conversation(entry, kind)
        text = str(conversation)
        if _SURROGATE.search(text):
            raise ValueError("it holds half of a surrogate pair")
    except ValueError as error:
        fault = f"({where}) is no conversation: {error}"
        return Record("", fault, fault=fault)
    return Record("", text, conversation)


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the records of JSON lines with their places."""
    for number, line in enumerate(_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line, halves=True)
        except ValueError as error:
            raise _broken(path, f"line {number} is no JSON: {error}") from error
        if not isinstance(entry, dict):
            raise _broken(path, f"line {number} is no object with a 'caption'")
        yield f"line {number}", entry


def _array(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the records of a JSON list with their places."""
    try:
        entries = parse_json(_bytes(path), halves=True)
    except ValueError as error:
        raise _broken(path, f"is no JSON: {error}") from error
    if not isinstance(entries, list):
        raise _broken(path, "is no list of records")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise _broken(path, f"entry {number} is no object")
        yield f"entry {number}", entry


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a Parquet table with their places."""
    where = f"samples file {path}"
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(
            "pyarrow is not installed, which reads Parquet",
            where=where,
            remedy='Install it: pip install "qsens[parquet]".',
        ) from error
    number = 0
    with open_file(path, where=where, remedy=CHOOSE) as opened:
        try:
            table = ParquetFile(opened)
            groups = range(table.metadata.num_row_groups)
            size = sum(table.metadata.row_group(group).total_byte_size for group in groups)
            if size > MOST_BYTES:
                raise UserError(
                    f"unpacks to more than {MOST_BYTES >> 20} MiB",
                    where=where,
                    remedy="Split the file.",
                )
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    # A column that a row leaves out is null in it.
                    given = {key: value for key, value in row.items() if value is not None}
                    yield f"row {number}", given
        except (ArrowException, OSError, UnicodeDecodeError) as error:
            raise _broken(path, f"is no whole Parquet file: {visible(str(error))}") from error


def _bytes(path: Path) -> bytes:
    """Return a file's content, uncompressed."""
    where = f"captions file {path}"
    data = read_bytes(path, where=where, remedy=CHOOSE)
    if not path.name.lower().endswith(GZIP):
        return data
    try:
        with gzip.open(io.BytesIO(data)) as opened:
            data = opened.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _broken(path, f"is no whole gzip file: {error}") from error
    if len(data) > MOST_BYTES:
        raise UserError(
            f"unpacks to more than {MOST_BYTES >> 20} MiB", where=where, remedy="Split the file."
        )
    return data


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


def _record(path: Path, where: str, image: Any, caption: Any, kind: str = "caption") -> Record:
    if not isinstance(caption, str):
        raise _broken(path, f"the {kind} of {where} is no text")
    if _SURROGATE.search(caption):
        raise _broken(path, f"the {kind} of {where} holds half of a surrogate pair")
    if image is None:
        image = ""
    if not isinstance(image, str):
        raise _broken(path, f"the image of {where} is no path")
    if leads_out(image):
        raise _broken(path, f"the image of {where} lies outside the images' directory: {image!r}")
    return Record(image, caption.strip())


def _broken(path: Path, what: str) -> UserError:
    return UserError(
        what,
        where=f"samples file {path}",
        remedy='Write {"image": PATH, "caption": TEXT}, {"text": TEXT}, or a conversation '
        '({"messages": [...]}, {"conversations": [...]}, {"prompt": TEXT, "completion": TEXT}) a '
        f"line (.jsonl), or a table {_TABLE} with split, image_relpath and caption (.sqlite).",
    )
