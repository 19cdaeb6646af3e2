"""Whatever is in a file that somebody else wrote: it is read, or one message; never slow, large."""

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
