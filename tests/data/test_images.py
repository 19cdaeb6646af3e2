"""Pictures read from files: sizes by the processor's rule, the cache, and each kind of bad one."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from qsens.checkpoint.components import resolve_components
from qsens.config import ModelConfig
from qsens.data.images import PictureReader, Resolution, read_resolution, too_many
from qsens.data.records import Record
from qsens.errors import UserError
from qsens.identity import PicturesIdentity, Skipped
from tests.checkpoint.tiny_families import configuration, save

RULE = Resolution(unit=16, least=16 * 16, most=64 * 64)


@pytest.fixture
def reader(tmp_path: Path) -> PictureReader:
    (tmp_path / "images").mkdir()
    return PictureReader(tmp_path / "images", tmp_path / "cache", RULE)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    drawn = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(drawn)


def claims(width: int, height: int) -> bytes:
    """Return a PNG file that says it has that size, and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(64)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("least", [1, 16 * 16, 40 * 40])
def test_sizes_are_those_of_the_processor(least: int) -> None:
    rule = Resolution(unit=16, least=least, most=64 * 64)
    for width in (9, 16, 25, 40, 63, 64, 65, 200, 999):
        for height in (9, 24, 41, 64, 130, 640):
            high, wide = smart_resize(height, width, 16, least, 64 * 64)
            assert rule.of(width, height) == (wide, high)


def test_a_picture_is_resized_as_pillow_does_and_kept(reader: PictureReader) -> None:
    picture = noise(50, 33)
    picture.save(reader.root / "a.png")
    pixels = reader.read("a.png")
    assert pixels is not None
    assert pixels.shape == (32, 48, 3)
    assert pixels.dtype == np.uint8
    expected = np.asarray(picture.resize((48, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(pixels, expected)
    assert RULE.tokens(pixels) == 6
    assert reader.largest() == 6


def test_no_picture_is_decoded_twice(
    reader: PictureReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise(40, 40).save(reader.root / "a.png")
    shutil.copy(reader.root / "a.png", reader.root / "same.png")
    first = reader.read("a.png")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", refuse)
    again = PictureReader(reader.root, reader.cache, RULE)
    for name in ("a.png", "same.png"):
        pixels = again.read(name)
        assert first is not None
        assert pixels is not None
        assert np.array_equal(first, pixels)
    assert len(list(reader.cache.iterdir())) == 1


def test_a_picture_lies_as_its_camera_says(reader: PictureReader) -> None:
    picture = noise(48, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    picture.save(reader.root / "turned.png", exif=exif)
    pixels = reader.read("turned.png")
    assert pixels is not None
    assert np.array_equal(pixels, np.rot90(np.asarray(picture), -1))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *((mode, "png") for mode in ("1", "L", "LA", "P", "RGBA", "I;16")),
        *((mode, "tiff") for mode in ("L", "P", "RGBA", "CMYK", "I;16", "I", "F", "LAB")),
        *((mode, "jpg") for mode in ("L", "CMYK", "YCbCr")),
        *((mode, "gif") for mode in ("L", "P")),
        ("RGBA", "webp"),
    ],
)
def test_a_picture_of_any_mode_is_what_processors_see(
    reader: PictureReader, mode: str, suffix: str
) -> None:
    drawn = np.random.default_rng(1).integers(0, 1 << 16, (33, 50), dtype=np.uint16)
    if mode.startswith(("I", "F")):
        picture = Image.fromarray(drawn).convert(mode)
    else:
        alpha = Image.fromarray((drawn >> 8).astype(np.uint8))
        picture = noise(50, 33)
        if mode in ("RGBA", "LA"):
            picture.putalpha(alpha)
        picture = picture.convert("LAB") if mode == "LAB" else picture.convert(mode)
    file = reader.root / f"a.{suffix}"
    picture.save(file)
    assert Image.open(file).mode != "RGB" or mode == "YCbCr"
    pixels = reader.read(file.name)
    assert pixels is not None
    seen = Qwen2VLImageProcessorPil().convert_to_rgb(Image.open(file))
    assert seen.mode == "RGB"
    assert np.array_equal(pixels, np.asarray(seen.resize((48, 32), Image.Resampling.BICUBIC)))
    assert np.array_equal(pixels, np.asarray(load_image(str(file)).resize((48, 32), 3)))


def test_grey_is_equal_in_all_channels_and_transparency_is_left_out(reader: PictureReader) -> None:
    Image.new("L", (32, 32), 77).save(reader.root / "grey.png")
    Image.new("RGBA", (32, 32), (9, 8, 7, 0)).save(reader.root / "clear.png")
    Image.fromarray(np.full((32, 32), 200, np.uint16)).save(reader.root / "deep.png")
    for name, colour in (("grey", (77,) * 3), ("clear", (9, 8, 7)), ("deep", (200,) * 3)):
        pixels = reader.read(f"{name}.png")
        assert pixels is not None
        assert (pixels == np.array(colour, np.uint8)).all()


def test_every_bad_picture_is_named_with_its_reason(reader: PictureReader, tmp_path: Path) -> None:
    root = reader.root
    noise(32, 32).save(root / "good.png")
    noise(32, 32).save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "folder.png").mkdir()
    (root / "text.png").write_text("no picture")
    (root / "empty.png").write_bytes(b"")
    (root / "cut.png").write_bytes((root / "good.png").read_bytes()[:200])
    (root / "lies.png").write_bytes(claims(300, 300))
    (root / "bomb.png").write_bytes(claims(20_000, 20_000))
    (root / "huge.png").write_bytes(claims(13_000, 11_000))
    Image.new("RGB", (2000, 4)).save(root / "narrow.png")
    (root / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    expected = {
        "": "is not named",
        "gone.png": "is missing",
        "link.png": "lies outside dataset.images",
        "loop.png": "",
        "folder.png": "is missing",
        "text.png": "is no JPEG",
        "empty.png": "is no JPEG",
        "cut.png": "is broken",
        "lies.png": "is broken",
        "bomb.png": "is enormous",
        "huge.png": "is enormous: 13000x11000 pixels",
        "narrow.png": "is too narrow: 2000x4 pixels",
        "page.eps": "is no JPEG",
    }
    records = [Record("good.png", "a caption"), *(Record(name, "another") for name in expected)]
    found = reader.identify(records)
    assert [entry.sample for entry in found.skipped] == list(range(2, len(records) + 1))
    for entry, (name, reason) in zip(found.skipped, expected.items(), strict=True):
        assert entry.image == name
        assert entry.reason.startswith(reason), name
    assert found.valid(1) == found.valid(len(records)) == 1
    assert len(list(reader.cache.iterdir())) == 1


def test_a_directory_without_any_picture_is_an_error(reader: PictureReader) -> None:
    with pytest.raises(UserError, match=r"none of 2 pictures can be used; sample 1, 'a\.png' is"):
        reader.identify([Record("a.png", "one"), Record("b.png", "two")])
    with pytest.raises(UserError, match=r"can be used; sample 1 names none; and 1 more"):
        reader.identify([Record("", "one"), Record("", "two")])
    unmatched = PictureReader(reader.root / "gone", reader.cache, RULE)
    with pytest.raises(UserError, match=r"gone: there is no such directory"):
        unmatched.identify([Record("a.png", "one")])


def test_the_identity_follows_the_bytes_of_the_pictures(reader: PictureReader) -> None:
    records = [Record("a.png", "one"), Record("b.png", "two")]

    def identity() -> PicturesIdentity:
        return PictureReader(reader.root, reader.cache, RULE).identify(records)

    noise(32, 32, 1).save(reader.root / "a.png")
    noise(32, 32, 2).save(reader.root / "b.png")
    before = identity()
    assert identity() == before
    noise(32, 32, 3).save(reader.root / "b.png")
    changed = identity()
    (reader.root / "b.png").unlink()
    missing = identity()
    assert len({before.digest, changed.digest, missing.digest}) == 3
    assert missing.skipped == [Skipped(sample=2, image="b.png", reason="is missing")]


def test_a_share_of_the_pictures_may_be_skipped() -> None:
    assert not too_many(0, 16, 0.0)
    assert not too_many(2, 100, 0.02)
    assert too_many(3, 100, 0.02)
    assert too_many(1, 16, 0.02)


def test_the_processor_says_the_resolution(tmp_path: Path) -> None:
    path = save(configuration("Qwen3-VL", tied=True), tmp_path / "model")
    config = resolve_components(ModelConfig(path=path))
    with pytest.raises(UserError, match="has no image processor"):
        read_resolution(config, 10_000)
    settings = {"patch_size": 4, "merge_size": 4}
    file = path / "preprocessor_config.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="does not say how it resizes pictures"):
        read_resolution(config, 10_000)
    file.write_text("{")
    with pytest.raises(UserError, match="is broken"):
        read_resolution(config, 10_000)
    size = {"size": {"shortest_edge": 300, "longest_edge": 5000}}
    file.write_text(json.dumps(settings | size))
    with pytest.raises(UserError, match=r"has merge_size 4, and its config\.json spatial_merge"):
        read_resolution(config, 10_000)
    settings["merge_size"] = 2
    file.write_text(json.dumps(settings | size | {"temporal_patch_size": 1}))
    with pytest.raises(UserError, match=r"temporal_patch_size 1, and its config\.json temporal"):
        read_resolution(config, 10_000)
    file.write_text(json.dumps(settings | size))
    assert read_resolution(config, 10_000) == Resolution(8, 300, 5000)
    assert read_resolution(config, 1000) == Resolution(8, 300, 1000)
    # What newer versions of transformers write.
    inner = {"image_processor": settings | {"min_pixels": 400, "max_pixels": 4000}}
    (path / "processor_config.json").write_text(json.dumps(inner))
    assert read_resolution(config, 10_000) == Resolution(8, 400, 4000)


def test_a_model_without_a_tower_is_refused(tmp_path: Path) -> None:
    path = save(configuration("Llama", tied=True), tmp_path / "model")
    with pytest.raises(UserError, match=r"'llama' cannot be given pictures: it has no vision"):
        read_resolution(resolve_components(ModelConfig(path=path)), 10_000)


def test_other_processors_resize_themselves(tmp_path: Path) -> None:
    """Larger pictures are reduced before, and how many tokens they are is not known yet."""
    path = save(configuration("Gemma 3", tied=True), tmp_path / "model")
    config = resolve_components(ModelConfig(path=path))
    with pytest.raises(UserError, match="has no image processor"):
        read_resolution(config, 10_000)
    (path / "preprocessor_config.json").write_text('{"size": {"height": 16, "width": 16}}')
    rule = read_resolution(config, 10_000)
    assert rule.of(100, 80) == (100, 80)
    assert rule.of(300, 200) == (122, 81)  # sqrt(10000 / 60000) of each
    reader = PictureReader(tmp_path, tmp_path / "cache", rule)
    noise(50, 33).save(tmp_path / "a.png")
    pixels = reader.read("a.png")
    assert pixels is not None
    assert np.array_equal(pixels, np.asarray(noise(50, 33)))
    assert reader.largest() == 0


def test_a_picture_of_a_photo_format_is_read(reader: PictureReader) -> None:
    data = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 40)).save(data, "JPEG", quality=95)
    (reader.root / "photo.jpg").write_bytes(data.getvalue())
    pixels = reader.read("photo.jpg")
    assert pixels is not None
    assert np.abs(pixels.astype(int) - [200, 30, 40]).max() <= 3
