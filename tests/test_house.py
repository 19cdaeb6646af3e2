"""No two files of the repository import each other, by whatever way round."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Where a package starts, and the directory that it is imported from.
PACKAGES = {"qsens": ROOT, "qsens_airflow": ROOT / "plugins", "benchmarks": ROOT, "tests": ROOT}


def modules() -> dict[str, Path]:
    """Return every file by the name that it is imported by."""
    named = {"qsens_sweep": ROOT / "dags" / "qsens_sweep.py"}
    for package, base in PACKAGES.items():
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """Return what a file imports of the repository, within functions and for types alone too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = node.module or ""
            # `from package import module`, or a name out of a module.
            within = {f"{module}.{alias.name}" for alias in node.names}
            names.update(within & known.keys() or {module})
    return {name for name in names if known.get(name, path) != path}


def test_no_circle() -> None:
    known = modules()
    graph = {name: imported(path, known) for name, path in known.items()}
    assert len(graph) > 300
    assert "qsens.config.models" in graph["qsens.grid"]  # it sees what is there
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None
