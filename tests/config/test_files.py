"""The YAML files of a configuration: whatever they hold, a mapping or one message, at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qsens.config import Roots, choices, load_sweep
from qsens.config.files import read_mapping
from qsens.errors import UserError

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)
REFUSED = {
    "says more than 10000 values": LAUGHS.encode(),
    "nests deeper than 100 levels": b"a: " + b"[" * 60_000,
    "nests deeper": b"a: &a [*a]",
    "has 65537 bytes, and at most 65536 are read": b"#" * 65537,
    "4300 digits": b"a: " + b"9" * 5000,
    "half of a surrogate pair": b'a: "\\ud800"',
    "is a date, which no key takes: put it in quotes": b"a: 2024-01-01",
    "is a set": b"a: !!set {b}",
    "month must be in 1..12": b"a: 2024-99-99",
    "can't decode byte 0xe4": b"a: \xe4",
    "special characters are not allowed": b"a: \0",
    "the key None is no text": b"~: 1",
    "more than 16 interpolations": b"a: '" + b"${b}" * 17 + b"'",
    "python/object": b"a: !!python/object/apply:os.system [ls]",
    "is no mapping": b"- 1",
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_no_key_takes_is_one_message(said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(REFUSED[said])
    with pytest.raises(UserError) as caught:
        read_mapping(path)
    assert said in caught.value.what
    assert caught.value.what.isprintable()
    assert caught.value.where == str(path)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "directory.yaml").mkdir()
    with pytest.raises(UserError, match="is a pipe, and no file"):
        read_mapping(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match="is a directory, and no file"):
        read_mapping(tmp_path / "directory.yaml")


def test_what_is_written_by_hand_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("\ufeffbase: &base {x: 1}\nnested: {<<: *base, y: [1.5, on, ~, ä]}\n")
    assert read_mapping(path) == {
        "base": {"x": 1},
        "nested": {"x": 1, "y": [1.5, True, None, "ä"]},
    }
    path.write_bytes(b"")
    assert read_mapping(path) == {}
    for group in ("model", "dataset", "quant_pair", "quant_granularity", "runtime", "sweep"):
        assert all(read_mapping(file) for file in choices(group).values())


def test_a_sweep_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text(LAUGHS)
    roots = Roots.from_environment()
    mine = Roots(root=tmp_path, results=tmp_path, configs=(tmp_path, *roots.configs))
    with pytest.raises(UserError, match="says more than 10000 values") as caught:
        load_sweep("mine", roots=mine)
    assert caught.value.where == str(tmp_path / "sweep" / "mine.yaml")
