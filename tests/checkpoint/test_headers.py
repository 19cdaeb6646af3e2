"""Headers of safetensors files that do not tell the truth; the format's own parser is the judge."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors

from qsens.checkpoint.headers import read_tensors
from qsens.errors import UserError

HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "none": {"dtype": "F16", "shape": [0, 7], "data_offsets": [32, 32]},
    "one": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
}
DATA = bytes(range(40))
DEEP = "[" * 100_000 + "]" * 100_000


def write(path: Path, header: bytes | Any, data: bytes = DATA, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def edited(name: str = "b", **changes: Any) -> dict[str, Any]:
    return HEADER | {name: HEADER[name] | changes}


def is_good(file: Path) -> bool:
    """Return whether the format's own parser takes a file."""
    try:
        safetensors.deserialize(file.read_bytes())
    except safetensors.SafetensorError:
        return False
    return True


def refusal(file: Path) -> UserError:
    assert not is_good(file)
    with pytest.raises(UserError) as caught:
        read_tensors(file)
    error = caught.value
    assert error.where == str(file)
    assert error.remedy
    assert "\n" not in error.what
    assert len(error.what) < 400
    return error


def test_tensors_are_where_the_header_says(tmp_path: Path) -> None:
    file = write(tmp_path, HEADER)
    found = read_tensors(file)
    start = file.stat().st_size - len(DATA)
    assert {name: (one.dtype, one.shape) for name, one in found.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (4,)),
        "none": ("F16", (0, 7)),
        "one": ("I64", ()),
    }
    assert (found["b"].begin - start, found["b"].end - start) == (24, 32)
    assert is_good(file)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (edited(shape=[-4]), "the shape of b is [-4]"),
        (edited(shape=[-2, -2]), "the shape of b is [-2, -2]"),
        (edited(shape=[4.0]), "the shape of b is [4.0]"),
        (edited(shape=[1e308]), "the shape of b is [1e+308]"),
        (edited(shape=[True, 4]), "the shape of b is [True, 4]"),
        (edited(shape=[[4]]), "the shape of b is [[4]]"),
        (edited(shape="4"), "the shape of b is 4"),
        (edited(shape=None), "the shape of b is None"),
        (edited(shape={"0": 4}), "the shape of b is {'0': 4}"),
        (edited(shape=[1 << 62]), "too many numbers"),
        (edited(shape=[1 << 40, 1 << 40]), "too many numbers"),
        (edited(shape=[1 << 64]), "the shape of b is [18446744073709551616]"),
        (edited(shape=[10**4000]), "the shape of b is [1000"),
        (edited(shape=[3_000_000_001] * 100_000), "too many numbers"),
        (edited(shape=[5]), "b has 8 bytes, and BF16 of shape [5] has 80 bits"),
        (edited(data_offsets=[24, 33]), "b has 9 bytes, and BF16 of shape [4] has 64 bits"),
        (edited(dtype="F6_E2M3"), "b has 8 bytes, and F6_E2M3 of shape [4] has 24 bits"),
        (edited(data_offsets=[0]), "the data_offsets of b are [0]"),
        (edited(data_offsets=[24, 28, 32]), "the data_offsets of b are [24, 28, 32]"),
        (edited(data_offsets=[32, 24]), "the data_offsets of b are [32, 24]"),
        (edited(data_offsets=[-8, 0]), "the data_offsets of b are [-8, 0]"),
        (edited(data_offsets=[24.0, 32.0]), "the data_offsets of b are [24.0, 32.0]"),
        (edited(data_offsets=[24, True]), "the data_offsets of b are [24, True]"),
        (edited(data_offsets=[0, 8]), "a begins at byte 0 of the data, and"),
        (edited(data_offsets=[16, 24]), "b begins at byte 16 of the data, and"),
        (edited(data_offsets=[40, 48]), "one begins at byte 32 of the data, and"),
        (edited(dtype="F7"), "the dtype of b is F7"),
        (edited(dtype="bf16"), "the dtype of b is bf16"),
        (edited(dtype=16), "the dtype of b is 16"),
        (HEADER | {"b": None}, "b is described by None"),
        (HEADER | {"b": [1]}, "b is described by [1]"),
        (HEADER | {"x" * 5000: None}, "is described by None"),
        (HEADER | {"b": {}}, "the dtype of b is None"),
        (HEADER | {"__metadata__": {"format": 1}}, "__metadata__"),
        (HEADER | {"__metadata__": []}, "__metadata__"),
        ({name: one for name, one in HEADER.items() if name != "one"}, "it has"),
        ({name: one for name, one in HEADER.items() if name != "b"}, "none begins at byte 32"),
        (None, "no JSON object"),
        ([HEADER], "no JSON object"),
        (b"", "no JSON object"),
        (b"{", "Expecting property name"),
        (json.dumps(edited(shape="#")).replace('"#"', "9" * 5000).encode(), "4300 digits"),
        (json.dumps(edited(shape="#")).replace('"#"', DEEP).encode(), "nests deeper"),
        (json.dumps(edited(shape="#")).replace('"#"', "[NaN]").encode(), "NaN is no number"),
        (json.dumps(HEADER).encode().replace(b'"b"', b'"\xff"'), "invalid start byte"),
        (json.dumps(HEADER).encode().replace(b'"b"', rb'"\ud800"'), "surrogate"),
    ],
)
def test_a_header_that_lies_is_refused(header: Any, said: str, tmp_path: Path) -> None:
    assert said in refusal(write(tmp_path, header)).what


@pytest.mark.parametrize(
    ("length", "said"),
    [
        (1 << 63, "longer than the file"),
        ((1 << 64) - 1, "longer than the file"),
        (len(json.dumps(HEADER)) + len(DATA) + 1, "longer than the file"),
        (len(json.dumps(HEADER)) + 1, "is broken"),
        (len(json.dumps(HEADER)) - 1, "is broken"),
        (0, "no JSON object"),
    ],
)
def test_a_length_that_lies_is_refused(length: int, said: str, tmp_path: Path) -> None:
    assert said in refusal(write(tmp_path, HEADER, length=length)).what


@pytest.mark.parametrize("data", [DATA[:-1], DATA + b"0", b""])
def test_data_of_another_length_is_refused(data: bytes, tmp_path: Path) -> None:
    assert "where its header says" in refusal(write(tmp_path, HEADER, data)).what


@pytest.mark.parametrize("content", [b"", b"\x08", b"1234567"])
def test_a_file_without_a_header_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "it has" in refusal(tmp_path / "model.safetensors").what


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """Which of both is meant, parsers say otherwise."""
    text = json.dumps(HEADER).replace('"none"', '"b"')
    with pytest.raises(UserError, match="b stands there twice"):
        read_tensors(write(tmp_path, text.encode()))


def test_a_header_of_many_megabytes_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 80 << 20))
        file.truncate(90 << 20)
    assert "at most 16777216 are read" in refusal(tmp_path / "model.safetensors").what


VALUES = [None, True, -1, 0, 1, 2, 4, 24, 32, 40, 1 << 63, 2.5, "", "F32", "F4", "U8", [], {}]


def mutated(rng: random.Random) -> bytes:
    """Return the header with a change or two: of a value somewhere, or of some bytes."""
    header = json.loads(json.dumps(HEADER))
    for _ in range(rng.randint(1, 2)):
        entry = header[rng.choice(list(HEADER))]
        if not isinstance(entry, dict):
            continue
        key = rng.choice(list(entry))
        if isinstance(entry[key], list) and entry[key] and rng.random() < 0.7:
            entry[key][rng.randrange(len(entry[key]))] = rng.choice(VALUES)
        else:
            entry[key] = rng.choice(VALUES)
    text = bytearray(json.dumps(header).encode())
    if rng.random() < 0.3:
        text[rng.randrange(len(text))] = rng.randrange(32, 127)
    return bytes(text)


def test_what_is_taken_is_what_the_formats_own_parser_takes(tmp_path: Path) -> None:
    rng, taken = random.Random(14), 0
    for _ in range(3000):
        file = write(tmp_path, mutated(rng))
        said = ""
        try:
            read_tensors(file)
        except UserError as error:
            said = error.what
        assert is_good(file) is (not said) or "stands there twice" in said, file.read_bytes()
        taken += not said
    assert 100 < taken < 2900
