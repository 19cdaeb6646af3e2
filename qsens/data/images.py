"""Pictures of samples, each decoded once and kept at the resolution that the model sees.

Without torch. A picture that cannot be used is named with what is wrong with it; whoever asks
decides what becomes of its sample.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL import Image, ImageOps, UnidentifiedImageError

from qsens.checkpoint.files import PROCESSOR, read_config
from qsens.checksums import digest_of
from qsens.config import DatasetConfig, ModelConfig
from qsens.config.models import Size
from qsens.data.records import Record
from qsens.errors import UserError
from qsens.grid import Plan
from qsens.identity import PicturesIdentity, Skipped
from qsens.reading import has_file, read_bytes, read_json, shown
from qsens.store import PICTURES
from qsens.writing import write_bytes

if TYPE_CHECKING:  # whoever plans without pictures needs no numpy
    import numpy as np
    from numpy.typing import NDArray

Pixels: TypeAlias = "NDArray[np.uint8]"
"""A picture, ``(height, width, 3)``, RGB."""

# Decoding these takes half a gibibyte of memory; an ordinary camera's pictures are smaller.
MOST_PIXELS = 1 << 27
MOST_BYTES = 1 << 28
# Sides whose ratio is larger are refused by the processor as well.
_MOST_RATIO = 200
# What an image processor and the configuration of a tower must agree on, by both their names.
_SHARED = {
    "patch_size": "patch_size",
    "merge_size": "spatial_merge_size",
    "temporal_patch_size": "temporal_patch_size",
}
# Types that resize by the rule of `Resolution`: their pictures are kept as a model sees them.
_RESIZED = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
)
_UNNAMED = "is not named"
_IMAGES = "Set dataset.images to the directory that the paths in the sample files start at."
# Decoders that run no other program and read no other file.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


@dataclass(frozen=True)
class Resolution:
    """What becomes of a picture's size before the checkpoint's processor reads it.

    Attributes:
        unit: Both sides are multiples of it, in pixels: the patches that the tower merges. 1 where
            the processor has a rule of its own, and larger pictures than ``most`` are reduced.
        least: Pixels at least.
        most: Pixels at most.
    """

    unit: int
    least: int
    most: int

    def of(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height as the model sees them: the aspect kept as well as it can be.

        Source: the rule by which the image processors of Qwen-VL resize.
        """
        wide, high = (round(side / self.unit) * self.unit for side in (width, height))
        if wide * high > self.most:
            shrink = math.sqrt(width * height / self.most)
            wide, high = (
                max(self.unit, math.floor(side / shrink / self.unit) * self.unit)
                for side in (width, height)
            )
        elif wide * high < self.least:
            grow = math.sqrt(self.least / (width * height))
            wide, high = (
                math.ceil(side * grow / self.unit) * self.unit for side in (width, height)
            )
        return wide, high

    def tokens(self, pixels: Pixels) -> int:
        """Return how many tokens a picture at its resolution is to the language model, at least."""
        if self.unit == 1:  # the processor says, later
            return 0
        return int(pixels.shape[0] * pixels.shape[1]) // self.unit**2


@dataclass
class PictureReader:
    """Reads pictures below one directory, through a cache.

    Attributes:
        root: The directory that paths start at and never leave.
        cache: Directory of the decoded pictures, ``.npy`` by digest of their content.
        resolution: What becomes of a picture's size.
    """

    root: Path
    cache: Path
    resolution: Resolution
    _found: dict[str, tuple[str, Path | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, dataset: DatasetConfig) -> PictureReader:
        """Return the reader of the pictures of a plan's data set."""
        resolution = read_resolution(plan.config.model, dataset.max_pixels)
        return cls(dataset.images_root(), cache_of(plan.results), resolution)

    def find(self, image: str) -> tuple[str, Path | None]:
        """Return the digest of a picture with where it lies decoded, or what is wrong with it.

        Args:
            image: Its path, relative to the root.
        """
        if image not in self._found:
            try:
                self._found[image] = self._keep(image)
            except _Unusable as error:
                self._found[image] = str(error), None
        return self._found[image]

    def read(self, image: str) -> Pixels | None:
        """Return a picture, decoded once and for all; none where it cannot be used."""
        _, path = self.find(image)
        if path is None:
            return None
        import numpy as np

        pixels: Pixels = np.load(path, allow_pickle=False)
        return pixels

    def identify(self, records: Sequence[Record]) -> PicturesIdentity:
        """Return what the pictures of samples are.

        Args:
            records: The samples that a size may use, in order.

        Raises:
            UserError: There is no directory of pictures, or none of them can be used.
        """
        if not self.root.is_dir():
            raise UserError(
                "there is no such directory, and the sweep reads pictures",
                where=f"dataset.images = {self.root}",
                remedy=_IMAGES,
            )
        located = [[self.find(image) for image in record.images] for record in records]
        skipped = []
        for number, (record, found) in enumerate(zip(records, located, strict=True), 1):
            unusable = zip(record.images, found, strict=True)
            lost = next(((image, said) for image, (said, path) in unusable if path is None), None)
            if lost is not None:
                image, reason = lost
                skipped.append(Skipped(sample=number, image=image, reason=record.fault or reason))
        if len(skipped) == len(records):
            raise UserError(
                f"none of {len(records)} pictures can be used; {in_words(skipped, 1)}",
                where=f"dataset.images = {self.root}",
                remedy=_IMAGES,
            )
        return PicturesIdentity(
            digest=digest_of(
                [[said, path is not None] for found in located for said, path in found]
            ),
            skipped=skipped,
        )

    def largest(self) -> int:
        """Return the tokens of the largest picture that was found."""
        import numpy as np

        shapes = (np.load(path, mmap_mode="r") for _, path in self._found.values() if path)
        return max((self.resolution.tokens(pixels) for pixels in shapes), default=0)

    def mark_used(self) -> None:
        """Note that somebody plans with the pictures found, so that none is pruned as old."""
        for _, path in self._found.values():
            if path is not None:
                os.utime(path)

    def _keep(self, image: str) -> tuple[str, Path]:
        data = self._bytes(image)
        digest = hashlib.sha256(data).hexdigest()
        rule = self.resolution
        kept = self.cache / f"{digest}-{rule.unit}-{rule.least}-{rule.most}.npy"
        if kept.is_file():
            return digest, kept
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs and broken metadata: judged here
            try:
                with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
                    pixels = self._decode(picture)
            except (_Unusable, MemoryError):
                raise
            except Image.DecompressionBombError as error:
                raise _Unusable("is enormous") from error
            except UnidentifiedImageError as error:
                raise _Unusable(f"is no {', '.join(_FORMATS)} file") from error
            except Exception as error:  # Decoders raise anything on bytes that they do not expect.
                reason = str(error).strip() or type(error).__name__
                raise _Unusable(f"is broken: {reason.splitlines()[0]}") from error
        import numpy as np

        array = io.BytesIO()
        np.save(array, pixels, allow_pickle=False)
        write_bytes(kept, array.getvalue())
        return digest, kept

    def _bytes(self, image: str) -> bytes:
        if not image:
            raise _Unusable(_UNNAMED)
        root = self.root.resolve()
        try:
            path = (root / image).resolve()
            if not path.is_relative_to(root):
                raise _Unusable("lies outside dataset.images")
            if not path.is_file():
                raise _Unusable("is missing")
        except (OSError, RuntimeError, ValueError) as error:
            raise _Unusable(f"cannot be read: {getattr(error, 'strerror', error)}") from error
        try:
            return read_bytes(path, most=MOST_BYTES, remedy=_IMAGES)
        except UserError as error:
            raise _Unusable(error.what) from error

    def _decode(self, picture: Image.Image) -> Pixels:
        """Return a picture as the model sees it; what is refused is not decoded."""
        import numpy as np

        width, height = picture.size
        if width * height > MOST_PIXELS:
            raise _Unusable(f"is enormous: {width}x{height} pixels")
        if max(width, height) > _MOST_RATIO * min(width, height):
            raise _Unusable(f"is too narrow: {width}x{height} pixels")
        picture.load()
        upright = ImageOps.exif_transpose(picture)
        if upright.mode != "RGB":  # as processors do: transparency is left out, 16 bits are cut off
            upright = upright.convert("RGB")
        size = self.resolution.of(*upright.size)
        return np.asarray(upright.resize(size, Image.Resampling.BICUBIC))


def cache_of(results: Path) -> Path:
    """Return the directory of decoded pictures below a results root."""
    return results / PICTURES


def identify_pictures(
    dataset: DatasetConfig, records: dict[Size, list[Record]], reader: PictureReader
) -> tuple[dict[Size, PicturesIdentity], list[str]]:
    """Read the pictures of sample files; those that the model already saw are not decoded again.

    Args:
        dataset: The data set.
        records: The samples that each size may use.
        reader: Reads the pictures.

    Returns:
        What the pictures of each size are, and a notice for each size that skips some.

    Raises:
        UserError: No picture of a size can be used, or one is longer than a sample may be.
    """
    identities, notices = {}, []
    for size, taken in records.items():
        identities[size] = reader.identify(taken)
        skipped = identities[size].skipped
        notices += skipped_notices("pictures", size, skipped, len(taken), dataset)
    if (longest := reader.largest()) >= dataset.calib_seq_len:
        raise UserError(
            f"a picture takes {longest} tokens, and a sample has at most {dataset.calib_seq_len}",
            where=f"dataset.calib_seq_len = {dataset.calib_seq_len}, "
            f"dataset.max_pixels = {dataset.max_pixels}",
            remedy="Raise dataset.calib_seq_len, or lower dataset.max_pixels.",
        )
    return identities, notices


def skipped_notices(
    what: str, size: Size, skipped: Sequence[Skipped], taken: int, dataset: DatasetConfig
) -> list[str]:
    """Say which samples of a size are skipped, if any are, and whether those are too many.

    Args:
        what: What they are skipped for: ``pictures``, ``records``.
        size: The size.
        skipped: The samples.
        taken: How many the size may use.
        dataset: The data set.
    """
    if not skipped:
        return []
    beyond = too_many(len(skipped), taken, dataset.max_skipped)
    return [
        f"{len(skipped)} of {taken} {what} of size '{size}' are skipped"
        + (": its results are PARTIAL" if beyond else "")
        + f"; {in_words(skipped)}"
    ]


def too_many(skipped: int, taken: int, share: float) -> bool:
    """Return whether more pictures are skipped than ``dataset.max_skipped`` allows."""
    return skipped > share * taken


def in_words(skipped: Sequence[Skipped], most: int = 5) -> str:
    """Return in words which samples are skipped, the first of many."""
    named = [
        f"sample {entry.sample}, {entry.image!r} {entry.reason}"
        if entry.image
        else f"sample {entry.sample} {'names none' if entry.reason == _UNNAMED else entry.reason}"
        for entry in skipped[:most]
    ]
    rest = len(skipped) - len(named)
    return "; ".join([*named, *([f"and {rest} more"] if rest else [])])


def read_resolution(config: ModelConfig, max_pixels: int) -> Resolution:
    """Read what becomes of pictures before the checkpoint's processor reads them.

    Args:
        config: The checkpoint, with its patterns resolved.
        max_pixels: Pixels of a picture at most.

    Raises:
        UserError: The checkpoint has no vision tower, no image processor, or one of another tower.
    """
    described = read_config(config.path)
    kind = str(described.get("model_type", "unknown"))
    where = f"model.path = {config.path}"
    tower = described.get("vision_config")
    if not (config.vision_patterns and isinstance(tower, dict)):
        raise UserError(
            f"model type '{shown(kind)}' cannot be given pictures: it has no vision tower",
            where=where,
            remedy="Use coverage=lm_only with dataset.modality=text for this checkpoint.",
        )
    settings = _processor(config.path)
    if kind not in _RESIZED:
        return Resolution(1, 1, max_pixels)
    try:
        size = settings.get("size") or {}
        unit = int(settings["patch_size"]) * int(settings["merge_size"])
        least = int(settings.get("min_pixels") or size["shortest_edge"])
        most = int(settings.get("max_pixels") or size["longest_edge"])
        if unit < 1 or least < 1 or most < 1:
            raise ValueError("a size below 1")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"its image processor does not say how it resizes pictures: {shown(str(error))}",
            where=where,
            remedy="Get the preprocessor_config.json of the checkpoint again.",
        ) from error
    for key, name in _SHARED.items():
        wanted = tower.get(name)
        if None not in (wanted, settings.get(key)) and settings[key] != wanted:
            raise UserError(
                f"its image processor has {key} {shown(settings[key])}, and its config.json "
                f"{name} {shown(wanted)}",
                where=where,
                remedy="Get both files of one and the same checkpoint.",
            )
    most = min(most, max_pixels)
    return Resolution(unit, min(least, most), most)


def _processor(path: Path) -> dict[str, Any]:
    """Return the settings of a checkpoint's image processor."""
    for name in reversed(PROCESSOR):
        file = path / name
        if not has_file(file, remedy="Get it again."):
            continue
        settings = read_json(file, remedy="Get it again.")
        if isinstance(settings, dict):
            inner = settings.get("image_processor", settings if name == PROCESSOR[0] else None)
            if isinstance(inner, dict):
                return inner
    raise UserError(
        "has no image processor, and the sweep reads pictures",
        where=f"model.path = {path}",
        remedy=f"Save its {PROCESSOR[0]} beside the weights, or use coverage=lm_only with "
        "dataset.modality=text.",
    )


class _Unusable(Exception):
    """What is wrong with a picture, in words that follow its name."""
