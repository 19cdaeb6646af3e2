"""Whatever somebody else wrote, or a hub answers: used, or one message; never slow, never large."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Of the processor's time: another process may take the clock's.
SECONDS = 12


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    """Checkpoints, what is stored and published, samples, annotations, configurations."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.pipeline.fuzz", str(tmp_path), "14", str(SECONDS)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=600,
    )
    *wrong, last = map(json.loads, ran.stdout.splitlines())
    assert wrong == []
    assert set(last["counts"]) == {
        "Checkpoint",
        "Stored",
        "Samples",
        "Annotations",
        "Configuration",
    }
    for counts in last["counts"].values():
        assert 0 < counts["read"] < counts["tried"]
    assert last["bytes"] < 1 << 30
    assert last["seconds"] < 20


def test_damaged_answers_of_a_hub_are_fetched_or_refused(tmp_path: Path) -> None:
    """Listings, files, redirects, ranges, by a fixed seed for so many seconds."""
    program = Path(__file__).with_name("fuzz_hub.py")
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
