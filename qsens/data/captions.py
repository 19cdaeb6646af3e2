"""Captions of sample files, read without torch."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qsens.cells import CalibrationSet
from qsens.checksums import digest_file, digest_of
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
    tokens_of,
    uncompressed,
)
from qsens.data.images import PictureReader, identify_pictures, skipped_notices
from qsens.data.records import CHOOSE, Record, read_records
from qsens.errors import UserError
from qsens.identity import SamplesIdentity, Skipped
from qsens.reading import read_bytes

# Samples whose tokens are counted at once.
_COUNTED = 256
_SHOWS = "shows pictures, and text is read alone"


def read_captions(path: Path, split: str = "") -> list[str]:
    """Return the captions of a file; see :func:`read_kind`."""
    return [record.caption for record in read_kind(path, split)[0]]


def read_samples(
    paths: Sequence[Path], split: str = "", kind: str = "auto", *, each_turn: bool = False
) -> list[Record]:
    """Return the samples of files, captions stripped, in order, without empty ones.

    See :func:`read_kinds`.
    """
    return read_kinds(paths, split, kind, each_turn=each_turn)[0]


def samples_of(given: CalibrationSet) -> list[Record]:
    """Return the samples that a cell takes of a data set, those to skip counted."""
    read = read_samples(
        given.samples.paths,
        given.size,
        given.samples.kind,
        each_turn=given.dataset.turns == "each",
    )
    return read[: given.taken]


def read_kinds(
    paths: Sequence[Path], split: str = "", kind: str = "auto", *, each_turn: bool = False
) -> tuple[list[Record], RecordKind]:
    """Return the samples of files that follow one another, and what they are.

    See :func:`read_kind`.

    Raises:
        UserError: As there; or what one file holds is not what the one before it does.
    """
    samples, found = read_kind(paths[0], split, kind, each_turn=each_turn)
    for path in paths[1:]:
        more, other = read_kind(path, split, kind, each_turn=each_turn)
        if other != found:
            raise UserError(
                f"holds records of kind {other}, and {paths[0].name} of kind {found}",
                where=f"samples file {path}",
                remedy="Let a data set hold one kind, and sweep several: dataset=NAME,NAME.",
            )
        samples += more
    return samples, found


def read_kind(
    path: Path, split: str = "", kind: str = "auto", *, each_turn: bool = False
) -> tuple[list[Record], RecordKind]:
    """Return the samples of a file as :func:`read_samples` does, and what they are.

    A ``.txt`` file holds one a line; a byte-order mark and CRLF line ends are taken as what they
    are. All others are those of :mod:`qsens.data.records`.

    Args:
        path: The file; its suffix, in any case, says what it is.
        split: Which samples of an SQLite file: the name of the size.
        kind: What its records are: ``dataset.format``.
        each_turn: Whether each answer of a conversation is a sample: ``dataset.turns``.

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
        samples, found = read_records(path, split, kind, each_turn=each_turn)
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
    dataset: DatasetConfig,
    sizes: Sequence[Size],
    reader: PictureReader | None = None,
    lengths: Callable[[Sequence[Record]], Sequence[int]] | None = None,
) -> tuple[dict[Size, SamplesIdentity], list[str]]:
    """Read the files of ``sizes``; check that each is the head of the next.

    Args:
        dataset: The data set.
        sizes: The sizes.
        reader: Reads the pictures; none where no cell does.
        lengths: Returns the tokens of each of some samples; none where no size counts tokens.

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
        paths = dataset.paths(size)
        if not paths:
            raise UserError(
                f"there is no file of the pattern {', '.join(dataset.names(size))}",
                where=f"dataset.files.{size}, below {dataset.directory}",
                remedy=CHOOSE,
            )
        name = paths[0].name if len(paths) == 1 else f"{paths[0].name} with {len(paths) - 1} more"
        samples, kind = read_kinds(paths, size, dataset.format, each_turn=dataset.turns == "each")
        digests = [digest_file(path, remedy=CHOOSE) for path in paths]
        counts = _count(dataset, samples, lengths) if lengths is not None else {}
        identity = SamplesIdentity(
            path=paths[0],
            more=paths[1:],
            digest=digests[0] if len(paths) == 1 else digest_of(digests),
            available=len(samples),
            kind=kind,
            counts={size: count for size, (count, _) in counts.items()},
            tokens={size: tokens for size, (_, tokens) in counts.items()},
        )
        heads[size] = samples[: identity.limit(dataset, size)]
        skipped = [
            Skipped(sample=number, image="", reason=record.fault or _SHOWS)
            for number, record in enumerate(heads[size], 1)
            if record.fault or record.needs_pictures
        ]
        if reader is None and len(skipped) == len(heads[size]):
            raise UserError(
                f"none of its {len(skipped)} samples can be read as text; sample 1 "
                f"{skipped[0].reason}",
                where=f"samples file {paths[0]}",
                remedy="Set dataset.modality=image_text, for a checkpoint with a vision tower.",
            )
        identities[size] = identity.model_copy(update={"skipped": skipped})
        notices += skipped_notices("records", size, skipped, len(heads[size]), dataset)
        if kind in CONVERSATIONS:
            labels = "the assistant's turns" if dataset.loss == "assistant" else "all of them"
            notices.append(f"{name} holds conversations ({kind}); labels are {labels}")
        if (tokens := tokens_of(dataset.sizes[size])) is not None:
            held, count = identity.tokens[size], identity.counts[size]
            few = f", fewer than the {tokens} asked for: its results are PARTIAL"
            notices.append(
                f"size '{size}' is {count} samples of {name}, {held} tokens"
                + (few if held < tokens else "")
            )
        elif len(samples) < identity.asked(dataset, size):
            notices.append(
                f"{name} holds {len(samples)} captions, fewer than the "
                f"{identity.asked(dataset, size)} of size '{size}': its results are PARTIAL"
            )
    _check_nesting(dataset, heads, "caption", lambda record: record.caption)
    if reader is not None:
        _check_nesting(dataset, heads, "picture", lambda record: record.images)
        pictures, more = identify_pictures(dataset, heads, reader)
        notices += more
        identities = {
            size: samples.model_copy(update={"pictures": pictures[size]})
            for size, samples in identities.items()
        }
    return identities, notices


def _count(
    dataset: DatasetConfig,
    samples: Sequence[Record],
    lengths: Callable[[Sequence[Record]], Sequence[int]],
) -> dict[Size, tuple[int, int]]:
    """Return how many samples each size in tokens comes to, and how many tokens they are.

    It is the first samples that have as many together; all of them where there are fewer.
    """
    wanted = {
        size: tokens
        for size, count in dataset.sizes.items()
        if (tokens := tokens_of(count)) is not None
    }
    counted: list[int] = []
    for start in range(0, len(samples), _COUNTED):
        if sum(counted) >= max(wanted.values(), default=0):
            break
        counted += lengths(samples[start : start + _COUNTED])
    totals = list(itertools.accumulate(counted))
    counts = {}
    for size, tokens in wanted.items():
        place = bisect.bisect_left(totals, tokens)
        counts[size] = (min(place + 1, len(totals)), totals[min(place, len(totals) - 1)])
    return counts


def _check_nesting(
    dataset: DatasetConfig,
    heads: Mapping[Size, list[Record]],
    what: str,
    part: Callable[[Record], object],
) -> None:
    ordered = [size for size in SIZES if size in heads]
    for smaller, larger in itertools.pairwise(ordered):
        common = min(len(heads[smaller]), len(heads[larger]))
        for line, (a, b) in enumerate(
            zip(heads[smaller][:common], heads[larger][:common], strict=True), start=1
        ):
            if part(a) != part(b):
                raise UserError(
                    f"is not the head of {dataset.paths(larger)[0].name}: {what} {line} differs",
                    where=f"captions file {dataset.paths(smaller)[0]}",
                    remedy="Make each size the first samples of the next larger one.",
                )
