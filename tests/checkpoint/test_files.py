"""Checkpoint files, read without torch."""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from qsens.checkpoint import headers
from qsens.checkpoint.files import find_weights, identify, weight_files
from qsens.checkpoint.headers import read_tensors
from qsens.checkpoint.quantized import shapes
from qsens.checksums import sealed
from qsens.errors import TryAgain, UserError


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
    held = {"position_ids": ([2, 3], b"abcdef"), "b": ([1], b"g")}
    write_safetensors(checkpoint / "model.safetensors", held)
    assert shapes(checkpoint) == {"position_ids": (2, 3), "b": (1,)}


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
        read_tensors(file)
    file.write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match="header is longer"):
        read_tensors(file)


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


# Which files count


def write_index(path: Path, **places: str) -> None:
    index = {"metadata": {}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def sharded(checkpoint: Path) -> Path:
    (checkpoint / "model.safetensors").unlink()
    write_safetensors(checkpoint / ONE, {"a": ([1], b"a")})
    write_safetensors(checkpoint / TWO, {"b": ([1], b"b")})
    write_index(checkpoint, a=ONE, b=TWO)
    return checkpoint


def read_names(path: Path) -> list[str]:
    return [file.relative_to(path).as_posix() for file in find_weights(path).files]


def test_files_beside_those_that_count_are_named_and_not_hashed(sharded: Path) -> None:
    before = identify(sharded)
    assert before.notices == []
    names = ["consolidated.safetensors", "model-00003-of-00003.safetensors", "MODEL.SAFETENSORS"]
    names += ["model.fp16.safetensors", "model.Q4_K.gguf", "pytorch_model-00001-of-00002.bin"]
    for name in names:
        write_safetensors(sharded / name, {"c": ([1], b"c")})
    (sharded / "training_args.bin").write_bytes(b"no weights")
    assert read_names(sharded) == [ONE, TWO]
    after = identify(sharded)
    assert after.digest == before.digest
    (said,) = after.notices
    assert said.startswith("6 weight files beside those of the checkpoint are not read")
    assert said.endswith("the first is MODEL.SAFETENSORS")


def test_an_index_beside_another_file_is_refused(sharded: Path) -> None:
    """The weights are there twice: who loads the one must not be told the other."""
    write_safetensors(sharded / "model.safetensors", {"a": ([1], b"x"), "b": ([1], b"y")})
    with pytest.raises(UserError, match="which names other files") as caught:
        identify(sharded)
    assert "model.safetensors.index.json" in caught.value.what
    (sharded / "model.safetensors.index.json").unlink()
    assert read_names(sharded) == ["model.safetensors"]
    assert find_weights(sharded).beside == (ONE, TWO)


def test_an_index_of_the_one_file_may_lie_beside_it(checkpoint: Path) -> None:
    alone = identify(checkpoint)
    write_index(checkpoint, a="model.safetensors", b="model.safetensors")
    assert identify(checkpoint) == alone


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([ONE, TWO], "holds 2 weight files and no model.safetensors.index.json"),
        (["weights.safetensors"], "weights are in weights.safetensors, and transformers reads"),
        (["consolidated.safetensors"], "weights are in consolidated.safetensors"),
        (["MODEL.SAFETENSORS"], "weights are in MODEL.SAFETENSORS"),
        (["model.fp16.safetensors"], "weights are in model.fp16.safetensors"),
    ],
)
def test_what_transformers_would_not_find_is_refused(
    names: list[str], said: str, checkpoint: Path
) -> None:
    (checkpoint / "model.safetensors").unlink()
    for at, name in enumerate(names):
        write_safetensors(checkpoint / name, {f"a{at}": ([1], b"a")})
    with pytest.raises(UserError, match=said) as caught:
        identify(checkpoint)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("../model.safetensors", "outside the checkpoint"),
        ("/somewhere/model.safetensors", "outside the checkpoint"),
        ("pytorch_model.bin", "no .safetensors file"),
        ("model-2.SAFETENSORS", "no .safetensors file"),
        ("model-2.safetensors", "1 of 2 weight files are missing"),
    ],
)
def test_an_index_that_leads_astray_is_refused(place: str, said: str, sharded: Path) -> None:
    write_index(sharded, a=ONE, b=place)
    (sharded / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=said):
        identify(sharded)


def test_a_tensor_in_two_files_is_refused(sharded: Path) -> None:
    write_safetensors(sharded / TWO, {"b": ([1], b"b"), "a": ([1], b"x")})
    with pytest.raises(UserError, match=f"two weight files hold a: {ONE} and {TWO}"):
        identify(sharded)


def test_an_index_without_metadata_is_refused(sharded: Path) -> None:
    index = {"weight_map": {"a": ONE, "b": TWO}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="has no metadata"):
        identify(sharded)


def test_config_may_name_the_file(checkpoint: Path) -> None:
    write_safetensors(checkpoint / "consolidated.safetensors", {"a": ([1], b"z")})
    config = checkpoint / "config.json"
    config.write_text('{"transformers_weights": "consolidated.safetensors"}')
    assert read_names(checkpoint) == ["consolidated.safetensors"]
    assert find_weights(checkpoint).beside == ("model.safetensors",)
    for name, said in {"gone.safetensors": "is not there", "model.bin": "neither"}.items():
        config.write_text(json.dumps({"transformers_weights": name}))
        with pytest.raises(UserError, match=said):
            find_weights(checkpoint)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
)
def test_an_adapter_is_refused(name: str, alone: bool, checkpoint: Path) -> None:
    if alone:
        for file in checkpoint.iterdir():
            file.unlink()
    (checkpoint / name).write_text("{}")
    with pytest.raises(UserError, match=f"holds an adapter, {name}") as caught:
        identify(checkpoint)
    assert "Merge the adapter" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "it has no weight_map"),
        ('{"metadata": {}}', "it has no weight_map"),
        ('{"weight_map": {}}', "it has no weight_map"),
        ('{"weight_map": ["a"]}', "it has no weight_map"),
        ('{"weight_map": {"a": 1}}', "it says that a is in 1"),
        (json.dumps({"weight_map": {"a": [ONE]}}), "it says that a is in"),
        ('{"weight_map": {"a": "%s.safetensors"}}' % ("n" * 250), "File name too long"),
        (r'{"weight_map": {"a": "\u0000.safetensors"}}', "embedded null byte"),
        (r'{"weight_map": {"a": "\udc80.safetensors"}}', "half of a surrogate pair"),
        (r'{"weight_map": {"a": "\u001b[2J.safetensors"}}', "first '.x1b.2J.safetensors'"),
        ('{"weight_map": {"a": "%s"}}' % ("n" * 100_000), r"n\.\.\.n.*, which is no \.safetensors"),
        ('{"weight_map": %s}' % ('{"a":' * 101 + "0" + "}" * 101), "nests deeper than 100 levels"),
        ('{"weight_map": %s}' % ("9" * 5000), "4300 digits"),
    ],
)
def test_a_malformed_index_is_refused(text: str, said: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        identify(sharded)
    assert caught.value.remedy
    assert "\n" not in caught.value.what
    assert len(caught.value.what) < 400


READ = ["config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json"]
READ += ["tokenizer_config.json", "preprocessor_config.json"]


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize(
    ("put", "said"),
    [
        (os.mkfifo, "is a pipe, and no file"),
        (Path.mkdir, "is a directory, and no file"),
        (lambda file: file.symlink_to("/dev/zero"), "is a device, and no file"),
        (lambda file: file.symlink_to("n" * 256), "cannot be read: File name too long"),
    ],
    ids=["pipe", "directory", "device", "name"],
)
def test_what_is_no_file_is_neither_read_nor_passed_over(
    put: Callable[[Path], object], said: str, name: str, checkpoint: Path
) -> None:
    file = checkpoint / name
    file.unlink(missing_ok=True)
    put(file)
    with pytest.raises(UserError, match=said) as caught:
        identify(checkpoint)
    assert caught.value.where == str(file)


def test_a_name_that_no_directory_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="File name too long"):
        identify(tmp_path / ("n" * 256))


@pytest.mark.parametrize("named", [{"a": 1}, "Some", 7, None, [], [None]])
def test_an_architecture_may_be_anything(named: object, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"architectures": named}))
    assert identify(checkpoint).architecture == ("None" if named == [None] else "unknown")


def test_weights_that_are_written_to_are_no_broken_ones(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while they are downloaded: they may be whole another time."""
    file, parse = checkpoint / "model.safetensors", headers.parse_json

    def grow(data: bytes, *, strict: bool = False) -> object:
        with file.open("ab") as opened:
            opened.write(b"more")
        return parse(data[:-1], strict=strict)

    monkeypatch.setattr(headers, "parse_json", grow)
    with pytest.raises(TryAgain, match="was changed while it was read"):
        find_weights(checkpoint)


# Digests


def test_digests_see_the_whole_path(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    write_index(checkpoint, a="a/model.safetensors", b="b/model.safetensors")

    def digest(a: bytes, b: bytes) -> str:
        for name, data in (("a", a), ("b", b)):
            (checkpoint / name).mkdir(exist_ok=True)
            write_safetensors(checkpoint / name / "model.safetensors", {name: ([1], data)})
        return identify(checkpoint).digest

    before = digest(b"1", b"2")
    assert digest(b"3", b"2") != before
    assert digest(b"1", b"4") != before
    assert digest(b"1", b"2") == before


def test_digests_cover_code_that_runs(checkpoint: Path) -> None:
    """All of it, whoever imports it; not a byte where it does not run."""
    config = {"auto_map": {"AutoModelForCausalLM": "modeling_my.MyModel"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "modeling_my.py").write_text("from .parts import layers\n")
    (checkpoint / "parts" / "deep").mkdir(parents=True)
    (checkpoint / "parts" / "deep" / "layers.py").write_text("SCALE = 1\n")
    idle, runs = identify(checkpoint), identify(checkpoint, trust_remote_code=True)
    assert idle.digest != runs.digest
    assert "own code does not run (auto_map: modeling_my.MyModel)" in idle.notices[0]
    assert runs.notices == []
    (checkpoint / "parts" / "deep" / "layers.py").write_text("SCALE = 2\n")
    assert identify(checkpoint) == idle
    changed = identify(checkpoint, trust_remote_code=True)
    assert changed.digest not in (idle.digest, runs.digest)
    (checkpoint / "parts" / "more.py").write_text("")
    assert identify(checkpoint, trust_remote_code=True).digest != changed.digest


def test_code_of_another_repository_is_refused(checkpoint: Path) -> None:
    config = {"auto_map": {"AutoModelForCausalLM": "owner/base--modeling_my.MyModel"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert identify(checkpoint).notices
    with pytest.raises(UserError, match="owner/base--modeling_my"):
        identify(checkpoint, trust_remote_code=True)


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model", "qwen.tiktoken", "tekken.json"])
def test_digests_cover_what_a_tokenizer_is_made_from(name: str, checkpoint: Path) -> None:
    """Beside a tokenizer.json, nobody reads it."""
    plain = identify(checkpoint).tokenizer_digest
    (checkpoint / name).write_text("one")
    assert identify(checkpoint).tokenizer_digest == plain
    (checkpoint / "tokenizer.json").rename(checkpoint / "tokenizer_config.json")
    one = identify(checkpoint).tokenizer_digest
    (checkpoint / name).write_text("two")
    assert identify(checkpoint).tokenizer_digest != one


def test_links_count_as_what_they_lead_to(checkpoint: Path, tmp_path: Path) -> None:
    """As caches of the hub keep files."""
    plain = identify(checkpoint)
    (tmp_path / "blobs").mkdir()
    for file in list(checkpoint.iterdir()):
        blob = file.rename(tmp_path / "blobs" / hashlib.sha256(file.name.encode()).hexdigest())
        file.symlink_to(Path("..") / "blobs" / blob.name)
    assert identify(checkpoint) == plain


# As commit 40ef52d, before digests saw whole paths, has them.
SINGLE_DIGEST = "19e161b39f9beb4a998ab8db53f483eabfe8c5ea435b8ae4500c8b0b0ffdc794"
SHARDED_DIGEST = "7c3f97605b723f76a1071fe95a02b9396137c9b4499f89aa26871f337f9794c1"
TOKENIZER_DIGEST = "283c63de3126245cd0577f7620f390e1733561961eacac97448351e7ea1de9af"
PROCESSOR_DIGEST = "46c751b05585be1b6249d431988af8b645254c907ba9b40b98d645d0fbb91428"


def test_golden_digests(tmp_path: Path) -> None:
    """Those of the first version: results are found by them."""
    single, shards = tmp_path / "single", tmp_path / "shards"
    for path in (single, shards):
        path.mkdir()
        (path / "config.json").write_bytes(b'{"architectures": ["Some"], "model_type": "some"}')
        (path / "tokenizer.json").write_bytes(b"{}")
        (path / "preprocessor_config.json").write_bytes(b'{"patch_size": 16}')
    write_safetensors(single / "model.safetensors", {"a": ([2, 3], b"abcdef"), "b": ([1], b"g")})
    write_safetensors(shards / ONE, {"a": ([2, 3], b"abcdef")})
    write_safetensors(shards / TWO, {"b": ([1], b"g")})
    write_index(shards, a=ONE, b=TWO)
    found = {path.name: identify(path) for path in (single, shards)}
    assert found["single"].digest == SINGLE_DIGEST
    assert found["shards"].digest == SHARDED_DIGEST
    for identity in found.values():
        assert identity.tokenizer_digest == TOKENIZER_DIGEST
        assert identity.processor_digest == PROCESSOR_DIGEST


def test_an_index_that_names_what_a_file_lacks_is_refused(sharded: Path) -> None:
    write_index(sharded, a=ONE, b=TWO, c=TWO)
    with pytest.raises(UserError) as caught:
        find_weights(sharded)
    assert caught.value.what == f"says that c is in {TWO}, which does not hold it"
    assert caught.value.where == str(sharded / "model.safetensors.index.json")
    write_index(sharded, a=TWO, b=ONE)
    with pytest.raises(UserError, match=f"a is in {TWO}, which does not hold it"):
        find_weights(sharded)
