"""Checkpoint files, read without torch."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from pathlib import Path

import pytest

from qsens.checksums import sealed
from qsens.engine.files import identify, read_header, shapes, weight_files
from qsens.errors import UserError


def write_safetensors(path: Path, tensors: dict[str, tuple[list[int], bytes]]) -> None:
    """Write the format by hand: 8 bytes of header length, JSON, data."""
    header, data = {}, b""
    for name, (shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "config.json").write_text('{"architectures": ["Some"], "model_type": "some"}')
    (path / "tokenizer.json").write_text("{}")
    write_safetensors(path / "model.safetensors", {"a": ([2, 3], b"abcdef"), "b": ([1], b"g")})
    return path


def test_identity_follows_content(checkpoint: Path) -> None:
    first = identify(checkpoint)
    assert first.architecture == "Some"
    assert first.weight_bytes == (checkpoint / "model.safetensors").stat().st_size
    assert identify(checkpoint) == first
    write_safetensors(
        checkpoint / "model.safetensors", {"a": ([2, 3], b"abcdeX"), "b": ([1], b"g")}
    )
    changed = identify(checkpoint)
    assert changed.digest != first.digest
    assert changed.tokenizer_digest == first.tokenizer_digest


def test_a_tied_head_is_seen(checkpoint: Path) -> None:
    """Tied where the configuration says so, or where there is no weight for a head."""
    weights, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    assert identify(checkpoint).tied_head is True
    write_safetensors(weights, {"lm_head.weight": ([1], b"h")})
    assert identify(checkpoint).tied_head is False
    config.write_text('{"text_config": {"tie_word_embeddings": true}}')
    assert identify(checkpoint).tied_head is True
    config.write_text(
        '{"tie_word_embeddings": false, "text_config": {"tie_word_embeddings": true}}'
    )
    assert identify(checkpoint).tied_head is False


def test_digest_is_that_of_the_files(checkpoint: Path) -> None:
    files = ["config.json", "model.safetensors"]
    digests = {n: hashlib.sha256((checkpoint / n).read_bytes()).hexdigest() for n in files}
    text = json.dumps(digests, sort_keys=True, separators=(",", ":"))
    assert identify(checkpoint).digest == hashlib.sha256(text.encode()).hexdigest()


def test_cache_saves_reading_and_notices_a_change(checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "results" / ".cells" / "digests.json"
    first = identify(checkpoint, cache=cache)
    kept = json.loads(cache.read_text())
    del kept["checksum"]
    assert len(kept) == 3
    # A digest that is known is believed: so the file was not read again.
    wrong = json.dumps(sealed(dict.fromkeys(kept, "0" * 64)))
    cache.write_text(wrong)
    assert identify(checkpoint, cache=cache).digest != first.digest
    # But not where the cache is not what was written, or nobody can tell.
    for damaged in ("broken", wrong.replace("0", "1", 1), json.dumps(dict.fromkeys(kept, "0"))):
        cache.write_text(damaged)
        assert identify(checkpoint, cache=cache) == first
        assert json.loads(cache.read_text()) == sealed(kept)


def test_no_bit_that_flips_in_the_cache_is_believed(checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "results" / ".cells" / "digests.json"
    first = identify(checkpoint, cache=cache)
    written, rng = cache.read_bytes(), random.Random(13)
    for _ in range(40):
        data = bytearray(written)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        cache.write_bytes(data)
        assert identify(checkpoint, cache=cache) == first
        assert cache.read_bytes() == written


def test_shapes(checkpoint: Path) -> None:
    assert shapes(checkpoint) == {"a": (2, 3), "b": (1,)}


def test_shards_are_followed(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "m-1.safetensors")
    write_safetensors(checkpoint / "m-2.safetensors", {"c": ([1], b"h")})
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in weight_files(checkpoint)] == [
        "m-1.safetensors",
        "m-2.safetensors",
    ]
    (checkpoint / "m-2.safetensors").unlink()
    with pytest.raises(UserError, match="1 of 2 weight files are missing, first m-2"):
        weight_files(checkpoint)


def test_a_file_cut_short_is_refused(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="is broken"):
        read_header(file)
    file.write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match="header is longer"):
        read_header(file)


def test_pickles_only_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickle \(\.bin\) only"):
        weight_files(checkpoint)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda path: (path / "config.json").unlink(), "config.json"),
        (lambda path: (path / "config.json").write_text("{"), "is broken"),
        (lambda path: (path / "config.json").write_text("[]"), "no JSON object"),
        (lambda path: (path / "model.safetensors").unlink(), "holds no"),
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer"),
    ],
)
def test_what_is_missing_is_named(checkpoint: Path, break_it, said: str) -> None:  # type: ignore[no-untyped-def]
    break_it(checkpoint)
    with pytest.raises(UserError, match=said) as caught:
        identify(checkpoint)
    assert caught.value.remedy


def test_no_directory_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="qsens demo-model"):
        identify(tmp_path / "nothing")
