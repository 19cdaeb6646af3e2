"""Whatever somebody else wrote, or a hub answers: used, or one message; never slow, never large.

By a fixed seed, for so many seconds of the processor's time or the clock's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run(program: str, directory: Path, seconds: float) -> tuple[list[Any], Any]:
    """Return what went wrong, and what was counted and measured at the end."""
    ran = subprocess.run(
        [sys.executable, "-m", f"tests.{program}", str(directory), "14", str(seconds)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr
    *wrong, last = map(json.loads, ran.stdout.splitlines())
    return wrong, last


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    """Checkpoints, what is stored and published, samples, annotations, configurations."""
    wrong, last = run("pipeline.fuzz", tmp_path, 12)
    assert wrong == []
    kinds = {"Checkpoint", "Stored", "Samples", "Annotations", "Configuration"}
    assert set(last["counts"]) == kinds
    for counts in last["counts"].values():
        assert 0 < counts["read"] < counts["tried"]
    assert last["bytes"] < 1 << 30
    assert last["seconds"] < 20


def test_damaged_answers_of_a_hub_are_fetched_or_refused(tmp_path: Path) -> None:
    """Listings, files, redirects, ranges."""
    wrong, last = run("tools.fuzz_hub", tmp_path / "hub", 6)
    assert wrong == []
    assert 0 < last["fetched"] < last["tried"]
    assert last["bytes"] < 1 << 29
    assert last["seconds"] < 20
