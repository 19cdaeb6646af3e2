"""Whatever is in a checkpoint's files, or a hub's answers: used, or one message; never slow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).with_name("fuzz.py")
SECONDS = 12


def test_damaged_files_of_a_checkpoint_are_planned_or_refused(tmp_path: Path) -> None:
    """Headers, index, configurations, by a fixed seed for so many seconds."""
    ran = subprocess.run(
        [sys.executable, str(FUZZ), str(tmp_path), "14", str(SECONDS)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    *wrong, last = map(json.loads, ran.stdout.splitlines())
    assert wrong == []
    assert last["planned"] > 0
    assert last["tried"] > 2 * last["planned"]
    assert last["bytes"] < 1 << 30
    assert last["seconds"] < 20


def test_damaged_answers_of_a_hub_are_fetched_or_refused(tmp_path: Path) -> None:
    """Listings, files, redirects, ranges, by a fixed seed for so many seconds."""
    program = FUZZ.with_name("fuzz_hub.py")
    ran = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "hub"), "14", "6"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    *wrong, last = map(json.loads, ran.stdout.splitlines())
    assert wrong == []
    assert 0 < last["fetched"] < last["tried"]
    assert last["bytes"] < 1 << 28
    assert last["seconds"] < 20
