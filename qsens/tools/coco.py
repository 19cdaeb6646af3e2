"""Calibration samples from COCO's caption annotations: one caption an image, nested sizes."""

from __future__ import annotations

import glob
import hashlib
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from qsens.checksums import digest_file
from qsens.config import Roots, load_sweep
from qsens.config.models import JSONL, SIZES, DatasetConfig, Size, has_suffix
from qsens.errors import UserError
from qsens.reading import parse_json, read_bytes
from qsens.writing import write_file

_TARGET = "Name another directory with --out."
_REMEDY = "Name a captions_*.json of COCO: {images: [...], annotations: [...]}."


@dataclass(frozen=True)
class Caption:
    """A caption of an image.

    Attributes:
        image: The image's file, relative to the images' directory; empty without images.
        text: The caption, normalised.
    """

    image: str
    text: str


class _Annotation(BaseModel):
    id: int | str
    image_id: int | str
    caption: str


class _Image(BaseModel):
    id: int | str
    file_name: str = Field(min_length=1)


class _File(BaseModel):
    annotations: list[_Annotation]


class _WithImages(_File):
    images: list[_Image]


@dataclass(frozen=True)
class Annotations:
    """What is read of an annotation file.

    Attributes:
        captions: By image id: ``(annotation id, text)``, as the file has them.
        files: By image id: its file name.
        digest: SHA-256 of the file, in hex.
    """

    captions: Mapping[str, Sequence[tuple[str, str]]]
    files: Mapping[str, str]
    digest: str


def make_captions(
    annotations: Path,
    *,
    dataset: str = "coco2017_captions",
    out: Path | None = None,
    images: Path | None = None,
    sizes: Sequence[str] = (),
    seed: int = 0,
    replace: bool = False,
    roots: Roots | None = None,
) -> dict[str, Any]:
    """Write the sample files of a data set from an annotation file, all or none.

    Args:
        annotations: COCO's ``captions_*.json``.
        dataset: File below ``configs/dataset/`` that says names and sizes of the sample files.
        out: Directory of the sample files; the data set's when not given.
        images: Directory of the images: writes ``{"image": path, "caption": text}``, a line each,
            with paths relative to it; images that are not there are left out. That of the data
            set when not given, where its files are JSON lines.
        sizes: Sizes to write; all of the data set when empty.
        seed: Draws other images and captions.
        replace: Whether files with another content may be overwritten.
        roots: Where things lie; from the environment when not given.

    Returns:
        ``files``, by size: path and samples; ``seed``, ``source_digest`` and ``left_out``: images
        or captions by reason.

    Raises:
        UserError: The file is malformed, holds too few captions, or would overwrite others.
        TryAgain: The disk is full; nothing was written.
    """
    roots = roots or Roots.from_environment()
    (config,) = load_sweep("single", [f"dataset={dataset}"], roots=roots).config.dataset
    chosen = _sizes(config, sizes)
    files, counts = _layout(config, chosen)
    if images is None and any(has_suffix(files[size], JSONL) for size in chosen):
        images = config.images_root()
    read = read_annotations(annotations, with_images=images is not None)
    left_out: Counter[str] = Counter()
    if images is not None and not images.is_dir():
        raise UserError(
            "is no directory", where=f"--images {images}", remedy="Name the images' directory."
        )
    wanted = counts[chosen[-1]]
    drawn: list[Caption] = []
    for caption in draw(read, images=images, seed=seed, left_out=left_out):
        drawn.append(caption)
        if len(drawn) == wanted:
            break
    if len(drawn) < wanted:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
        raise UserError(
            f"gives {len(drawn)} captions, and size '{chosen[-1]}' needs {wanted}"
            + (f" (left out: {reasons})" if reasons else ""),
            where=str(annotations),
            remedy="Name a larger file, or fewer sizes: --size small.",
        )
    directory = roots.resolve(out or config.directory)
    paths = {size: directory / files[size] for size in chosen}
    if images is not None:
        paths = {size: path.with_suffix(".jsonl") for size, path in paths.items()}
    texts = {paths[size]: _lines(drawn[: counts[size]], images) for size in chosen}
    _write(texts, replace=replace)
    return {
        "files": {
            size: {"path": str(path), "samples": counts[size]} for size, path in paths.items()
        },
        "seed": seed,
        "source_digest": read.digest,
        "left_out": dict(sorted(left_out.items())),
    }


def read_annotations(path: Path, *, with_images: bool) -> Annotations:
    """Read an annotation file.

    Args:
        path: COCO's ``captions_*.json``.
        with_images: Whether the images' names are needed.

    Raises:
        UserError: It cannot be read, or is no captions file; the message names the entry.
    """
    data = read_bytes(path, remedy=_REMEDY)
    try:
        tree = parse_json(data)
    except ValueError as error:
        raise UserError(f"is no JSON: {error}", where=str(path), remedy=_REMEDY) from error
    try:
        read = (_WithImages if with_images else _File).model_validate(tree, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"])) or "the file"
        raise _malformed(f"{at}: {first['msg']}", path) from error
    captions: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for annotation in read.annotations:
        captions[str(annotation.image_id)].append((str(annotation.id), annotation.caption))
    files: dict[str, str] = {}
    for image in read.images if isinstance(read, _WithImages) else ():
        known = files.setdefault(str(image.id), image.file_name)
        if known != image.file_name:
            raise _malformed(f"image {image.id} has two files, {known} and {image.file_name}", path)
    return Annotations(captions, files, hashlib.sha256(data).hexdigest())


def draw(
    read: Annotations, *, images: Path | None, seed: int, left_out: Counter[str]
) -> Iterator[Caption]:
    """Yield one caption an image, in a drawn order; no text comes twice.

    Order and choice hang on the seed and the ids alone, by SHA-256: not on the order of the file,
    on the version of Python, or on how many are taken.

    Args:
        read: The annotations.
        images: Directory of the images; none where only the text matters.
        seed: Draws other images and captions.
        left_out: Counts what is left out, by reason.
    """
    seen: set[str] = set()
    for image in sorted(read.captions, key=lambda image: _rank(seed, image)):
        name = "" if images is None else read.files.get(image, "")
        if images is not None and not _is_there(images, name):
            left_out["images that are not there"] += 1
            continue
        candidates = sorted(read.captions[image], key=lambda pair: _rank(seed, image, *pair))
        for _, raw in candidates:
            text = normalise(raw)
            if not text:
                left_out["empty captions"] += 1
            elif text.casefold() in seen:
                left_out["captions that came before"] += 1
            else:
                seen.add(text.casefold())
                yield Caption(name, text)
                break


def normalise(text: str) -> str:
    """Return a caption in NFC, on one line, without invisible characters or doubled spaces."""
    spaced = " ".join(unicodedata.normalize("NFC", text).split())
    kept = (c for c in spaced if c in _JOINERS or unicodedata.category(c) not in _INVISIBLE)
    return " ".join("".join(kept).split()).strip(_JOINERS + " ")


# Control and format characters, and halves of surrogate pairs, which UTF-8 cannot hold.
_INVISIBLE = ("Cc", "Cf", "Cs")
# Invisible too, but Persian, Indic scripts and emoji are written with them.
_JOINERS = "\u200c\u200d"


def _sizes(config: DatasetConfig, given: Sequence[str]) -> list[Size]:
    known = [size for size in SIZES if size in config.sizes and size in config.files]
    for size in given:
        if size not in known:
            raise UserError(
                f"unknown size '{size}'", where="--size", remedy=f"Allowed: {', '.join(known)}."
            )
    return [size for size in known if not given or size in given]


def _layout(
    config: DatasetConfig, sizes: Sequence[Size]
) -> tuple[dict[Size, str], dict[Size, int]]:
    """Return the file of each size, and how many captions it is to hold.

    Raises:
        UserError: A size has several files, or counts tokens.
    """
    files: dict[Size, str] = {}
    counts: dict[Size, int] = {}
    for size in sizes:
        names, count = config.names(size), config.sizes[size]
        if len(names) > 1 or glob.has_magic(names[0]) or not isinstance(count, int):
            raise UserError(
                f"size '{size}' is no number of captions in one file",
                where=f"--dataset {config.name}",
                remedy="Name a data set of captions, such as coco2017_captions.",
            )
        files[size], counts[size] = names[0], count
    return files, counts


def _is_there(images: Path, name: str) -> bool:
    """Say whether an image lies below the images' directory; a name never leads out of it."""
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\0" in name:
        return False
    path = images / pure
    try:
        return path.is_file() and path.resolve().is_relative_to(images.resolve())
    except (OSError, ValueError):  # a name that no file can have
        return False


def _lines(captions: Sequence[Caption], images: Path | None) -> str:
    if images is None:
        return "".join(f"{caption.text}\n" for caption in captions)
    return "".join(
        json.dumps({"image": caption.image, "caption": caption.text}, ensure_ascii=False) + "\n"
        for caption in captions
    )


def _write(texts: Mapping[Path, str], *, replace: bool) -> None:
    """Write files all or none; no file is renamed before all are on the disk."""
    new = {}
    for path, text in texts.items():
        content = text.encode("utf-8")
        if (
            path.is_file()
            and digest_file(path, remedy=_TARGET) == hashlib.sha256(content).hexdigest()
        ):
            continue
        if path.exists() and not replace:
            raise UserError(
                "is there already, with another content",
                where=str(path),
                remedy="Name another directory with --out, or overwrite it with --replace.",
            )
        new[path] = content
    with ExitStack() as stack:
        for path, content in new.items():
            stack.enter_context(write_file(path)).write_bytes(content)


def _malformed(what: str, path: Path) -> UserError:
    return UserError(what, where=str(path), remedy=_REMEDY)


def _rank(seed: int, *parts: str) -> bytes:
    text = "\0".join((str(seed), *parts))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
