"""Tokenizers that nobody could load are refused by their files alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qsens.checkpoint.tokenizer_files import check_tokenizer
from qsens.errors import UserError

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult

BROKEN = [
    ("tokenizer.json", b"garbage", "is no tokenizer: expected value at line 1"),
    ("tokenizer.json", b"[]", "is no tokenizer: "),
    ("tokenizer.json", b'{"version": "1.0"}', "is no tokenizer: "),
    ("tokenizer.json", b'{"model": {"type": "Nothing"}}', "is no tokenizer: "),
    ("tokenizer.json", b"[" * 100_000, "is no tokenizer: "),
    ("tokenizer.json", b"\xff", "is no tokenizer: 'utf-8' codec"),
    ("tokenizer_config.json", b"[]", "is no JSON object"),
    ("tokenizer_config.json", b"{", "is broken: "),
    ("special_tokens_map.json", b'"x"', "is no JSON object"),
    ("added_tokens.json", b"1", "is no JSON object"),
    ("vocab.json", b'{"a": ' + b"9" * 5000 + b"}", "is broken: Exceeds the limit"),
]


@pytest.mark.parametrize(("name", "content", "said"), BROKEN)
def test_what_no_tokenizer_is_made_of_is_refused(
    name: str, content: bytes, said: str, demo_checkpoint: DemoResult, tmp_path: Path
) -> None:
    shutil.copy(demo_checkpoint.directory / "tokenizer.json", tmp_path)
    check_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        check_tokenizer(tmp_path)
    assert caught.value.what.startswith(said)
    assert caught.value.where == str(tmp_path / name)


def test_a_plan_refuses_it_without_torch(demo_checkpoint: DemoResult, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(demo_checkpoint.directory, checkpoint)
    held = json.loads((checkpoint / "tokenizer.json").read_text())
    held["model"]["type"] = "WordPiece"
    (checkpoint / "tokenizer.json").chmod(0o644)
    (checkpoint / "tokenizer.json").write_text(json.dumps(held))
    program = (
        "import sys\n"
        "from qsens.errors import UserError\n"
        "from qsens.pipeline.plan import plan_sweep\n"
        "try:\n"
        f"    plan_sweep('demo-text', ['model.path={checkpoint}'])\n"
        "except UserError as error:\n"
        "    print(error.what, 'torch' in sys.modules)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert said.startswith("is no tokenizer: ")
    assert said.endswith(" False\n")
