"""Captions of sample files, read without torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qsens.checksums import digest_file
from qsens.config import DatasetConfig
from qsens.config.models import (
    CONVERSATIONS,
    GZIP,
    JSON,
    JSONL,
    PARQUET,
    SIZES,
    SQLITE,
    TEXT,
    RecordKind,
    Size,
    has_suffix,
    uncompressed,
)
from qsens.data.images import PictureReader, identify_pictures, skipped_notices
from qsens.data.records import CHOOSE, Record, read_records
from qsens.errors import UserError
from qsens.identity import SamplesIdentity, Skipped
from qsens.reading import read_bytes


def read_captions(path: Path, split: str = "") -> list[str]:
    """Return the captions of a file; see :func:`read_samples`."""
    return [record.caption for record in read_samples(path, split)]


def read_samples(path: Path, split: str = "", kind: str = "auto") -> list[Record]:
    """Return the samples of a file, captions stripped, in order, without empty ones.

    See :func:`read_kind`.
    """
    return read_kind(path, split, kind)[0]


def read_kind(path: Path, split: str = "", kind: str = "auto") -> tuple[list[Record], RecordKind]:
    """Return the samples of a file as :func:`read_samples` does, and what they are.

    A ``.txt`` file holds one a line; a byte-order mark and CRLF line ends are taken as what they
    are. All others are those of :mod:`qsens.data.records`.

    Args:
        path: The file; its suffix, in any case, says what it is.
        split: Which samples of an SQLite file: the name of the size.
        kind: What its records are: ``dataset.format``.

    Raises:
        UserError: The file has another suffix, is missing, empty, broken, no regular file, or no
            UTF-8; the message names the line.
    """
    if not (
        has_suffix(path, (*TEXT, *PARQUET, *SQLITE))
        or has_suffix(uncompressed(path), (*JSONL, *JSON))
    ):
        raise UserError(
            f"is no file of samples that qsens knows: its suffix is '{path.suffix}'",
            where=f"samples file {path}",
            remedy=f"Known are {', '.join(TEXT)} (a caption a line), {', '.join(JSONL)} "
            '({"image": PATH, "caption": TEXT} or a conversation a line), '
            f"{', '.join(JSON)} (a list of them), both also {GZIP}, {', '.join(PARQUET)} (a table "
            f"of them) and {', '.join(SQLITE)} (a table).",
        )
    found: RecordKind = "caption"
    if has_suffix(path, TEXT):
        samples = [Record("", caption) for caption in _lines(path)]
    else:
        samples, found = read_records(path, split, kind)
    if not samples:
        raise UserError(
            "holds no caption", where=f"captions file {path}", remedy="Write one caption a line."
        )
    return samples, found


def _lines(path: Path) -> list[str]:
    data = read_bytes(path, where=f"captions file {path}", remedy=CHOOSE)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"line {line} is no UTF-8 (byte 0x{data[error.start]:02x})",
            where=f"captions file {path}",
            remedy="Save the file as UTF-8.",
        ) from error
    captions = [line.strip() for line in text.replace("\r\n", "\n").split("\n")]
    return [caption for caption in captions if caption]


def identify_samples(
    dataset: DatasetConfig, sizes: Sequence[Size], reader: PictureReader | None = None
) -> tuple[dict[Size, SamplesIdentity], list[str]]:
    """Read the files of ``sizes``; check that each is the head of the next.

    Args:
        dataset: The data set.
        sizes: The sizes.
        reader: Reads the pictures; none where no cell does.

    Returns:
        What each file is, and a notice for each that is shorter than its size or skips pictures.

    Raises:
        UserError: A file is missing or broken, or is not the head of the next larger one; or no
            picture can be used.
    """
    identities: dict[Size, SamplesIdentity] = {}
    heads: dict[Size, list[Record]] = {}
    notices = []
    for size in sizes:
        path = dataset.path(size)
        samples, kind = read_kind(path, size, dataset.format)
        heads[size] = samples[: dataset.limit(size)]
        skipped = [
            Skipped(sample=number, image="", reason=record.fault)
            for number, record in enumerate(heads[size], 1)
            if record.fault
        ]
        identities[size] = SamplesIdentity(
            path=path,
            digest=digest_file(path, remedy=CHOOSE),
            available=len(samples),
            kind=kind,
            skipped=skipped,
        )
        notices += skipped_notices("records", size, skipped, len(heads[size]), dataset)
        if kind in CONVERSATIONS:
            labels = "the assistant's turns" if dataset.loss == "assistant" else "all of them"
            notices.append(f"{path.name} holds conversations ({kind}); labels are {labels}")
        if len(samples) < dataset.asked(size):
            notices.append(
                f"{path.name} holds {len(samples)} captions, fewer than the {dataset.asked(size)} "
                f"of size '{size}': its results are PARTIAL"
            )
    _check_nesting(dataset, heads, "caption", lambda record: record.caption)
    if reader is not None:
        _check_nesting(dataset, heads, "picture", lambda record: record.image)
        pictures, more = identify_pictures(dataset, heads, reader)
        notices += more
        identities = {
            size: samples.model_copy(update={"pictures": pictures[size]})
            for size, samples in identities.items()
        }
    return identities, notices


def _check_nesting(
    dataset: DatasetConfig,
    heads: Mapping[Size, list[Record]],
    what: str,
    part: Callable[[Record], str],
) -> None:
    ordered = [size for size in SIZES if size in heads]
    for smaller, larger in itertools.pairwise(ordered):
        common = min(len(heads[smaller]), len(heads[larger]))
        for line, (a, b) in enumerate(
            zip(heads[smaller][:common], heads[larger][:common], strict=True), start=1
        ):
            if part(a) != part(b):
                raise UserError(
                    f"is not the head of {dataset.path(larger).name}: {what} {line} differs",
                    where=f"captions file {dataset.path(smaller)}",
                    remedy="Make each size the first samples of the next larger one.",
                )
