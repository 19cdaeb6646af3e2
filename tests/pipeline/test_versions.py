"""Versions in a plan, where another environment computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsens.pipeline.plan import installed_version


def test_a_version_that_is_not_installed_here_comes_from_the_pins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text("# pins\nno-such-torch==2.13.0\npydantic==0.0.1\n")
    monkeypatch.delenv("QSENS_CONSTRAINTS", raising=False)
    assert installed_version("no-such-torch") == "none"
    monkeypatch.setenv("QSENS_CONSTRAINTS", str(pins))
    assert installed_version("no-such-torch") == "2.13.0"
    assert installed_version("such-torch") == "none"
    # What is installed wins.
    assert installed_version("pydantic") != "0.0.1"
