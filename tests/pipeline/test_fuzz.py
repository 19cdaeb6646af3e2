"""Whatever is in a checkpoint's files: planned, or one message; never slow, never large."""

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
