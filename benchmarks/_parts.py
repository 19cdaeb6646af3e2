"""Expensive parts of a benchmark, each kept in a file, so that a second call goes on."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qsens.writing import write_text


class Parts:
    """The parts of one subject.

    Args:
        work: Directory of all subjects.
        identity: All that parts depend on: one subject with another identity has its own parts.
    """

    def __init__(self, work: Path, identity: Mapping[str, Any]) -> None:
        text = json.dumps(identity, indent=1, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        self.directory = work / f"{identity['model']}-{digest}"
        self.frozen = False
        write_text(self.directory / "identity.json", text + "\n")

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a part, made and kept where it is not there.

        Raises:
            LookupError: It is not there, and nothing is to be made.
        """
        path = self.directory / f"{name}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        self.refuse(name)
        print(f"{self.directory.name}: {name}", end="", file=sys.stderr, flush=True)
        started = time.monotonic()
        made = make()
        print(f", {time.monotonic() - started:.1f} s", file=sys.stderr)
        write_text(path, json.dumps(made, indent=1) + "\n")
        return json.loads(path.read_text(encoding="utf-8"))

    def refuse(self, name: str) -> None:
        """Raise a LookupError if nothing is to be made."""
        if self.frozen:
            raise LookupError(name)

    def known(self, make: Callable[[], Any]) -> Any:
        """Return what ``make`` puts together of parts; none where one of them is not there."""
        self.frozen = True
        try:
            return make()
        except LookupError:
            return None
        finally:
            self.frozen = False
