"""Where things lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsens.config import Roots
from qsens.errors import UserError


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QSENS_ROOT", "QSENS_RESULTS", "QSENS_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_the_nearest_parent_with_configs_is_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert Roots.from_environment().root == tmp_path


def test_without_configs_the_working_directory_is_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    roots = Roots.from_environment()
    assert roots.root == roots.results == tmp_path
    assert (roots.configs[-1] / "sweep" / "demo.yaml").is_file()


def test_variables_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("root", "own"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("QSENS_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("QSENS_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("QSENS_CONFIG_DIR", str(tmp_path / "own"))
    roots = Roots.from_environment()
    assert roots.root == tmp_path / "root"
    assert roots.results == tmp_path / "results"
    assert roots.configs[0] == tmp_path / "own"
    assert roots.resolve("x/../y") == tmp_path / "root" / "y"


def test_a_root_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSENS_ROOT", "/nowhere/at/all")
    with pytest.raises(UserError, match="QSENS_ROOT"):
        Roots.from_environment()
