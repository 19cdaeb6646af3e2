"""The files of runtimes: each loads, and a broken one is refused by file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsens.config import Roots, choices
from qsens.config.runtime import load_runtime
from qsens.errors import UserError

GOOD = "title: Mine\nversion: '1'\nlayout: modelopt\n"
ONE = "formats: [{what: a, weights: {number: int8}, runs: [cpu]}]\n"


def mine(directory: Path, text: str) -> Roots:
    (directory / "runtime").mkdir(exist_ok=True)
    (directory / "runtime" / "vllm.yaml").write_text(text)
    there = Roots.from_environment()
    return Roots(root=directory, results=directory, configs=(directory, *there.configs))


def test_each_file_loads_under_its_name() -> None:
    assert list(choices("runtime")) == ["sglang", "tensorrt_llm", "transformers", "vllm"]
    for name in choices("runtime"):
        loaded = load_runtime(name)
        assert loaded.name == name
        assert loaded.version
        assert loaded.formats


def test_ones_own_file_wins(tmp_path: Path) -> None:
    loaded = load_runtime("vllm", mine(tmp_path, GOOD + ONE))
    assert (loaded.words, len(loaded.formats)) == ("Mine 1", 1)


@pytest.mark.parametrize(
    ("text", "key", "said"),
    [
        (ONE, "title", "required"),
        (GOOD + ONE + "never_: {}\n", "never_", "no key of a runtime"),
        (GOOD + ONE.replace("cpu", "volta"), "formats.0.runs.0", "turing"),
        (GOOD + ONE.replace("int8", "int3"), "formats.0.weights.number", "int4"),
        (GOOD + ONE.replace(", runs: [cpu]", ""), "formats.0", "say where it is loaded"),
        (
            GOOD + ONE.replace("[cpu]", "[cpu], otherwise: {cpu: slowly}"),
            "formats.0",
            "cpu both runs it as it is and otherwise",
        ),
        (GOOD + ONE.replace("[cpu]", "[cpu], misread: so"), "formats.0", "one or the other"),
        (GOOD + ONE + "name: another\n", "name", "equal to the file's name"),
    ],
)
def test_a_broken_file_is_refused_by_file_and_key(
    text: str, key: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_runtime("vllm", mine(tmp_path, text))
    assert caught.value.where == f"{key} ({tmp_path / 'runtime' / 'vllm.yaml'})"
    assert "\n" not in caught.value.what


def test_an_unknown_one_names_those_there_are() -> None:
    with pytest.raises(UserError, match="unknown runtime 'vlm'") as caught:
        load_runtime("vlm")
    assert caught.value.where == "--for"
    assert "Did you mean vllm?" in caught.value.remedy
