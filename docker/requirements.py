"""Cut the requirements of one image from ``pyproject.toml``, pinned by ``constraints.txt``.

``python docker/requirements.py airflow`` prints what every service needs; ``... gpu`` what a GPU
worker needs on top of it. Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

# What computes, and only that: these make an image several gigabytes larger.
GPU = ("torch", "transformers", "nvidia-modelopt")
EXTRAS = ("airflow", "stack")


def requirements(image: str, directory: Path) -> list[str]:
    """Return requirements as ``name[extras]==version``, sorted.

    Args:
        image: ``airflow`` or ``gpu``.
        directory: Holds ``pyproject.toml`` and ``constraints.txt``.

    Raises:
        KeyError: A requirement is not pinned.
    """
    project = tomllib.loads((directory / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = list(project["dependencies"])
    for extra in EXTRAS:
        declared += project["optional-dependencies"][extra]
    pins = pinned(directory / "constraints.txt")
    found: dict[str, set[str]] = {}
    for line in declared:
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[([^\]]*)\])?", line)
        assert match is not None, line
        name = normalised(match[1])
        if (name in GPU) == (image == "gpu"):
            found.setdefault(name, set()).update(filter(None, (match[2] or "").split(",")))
    return [
        name + (f"[{','.join(sorted(extras))}]" if extras else "") + f"=={pins[name]}"
        for name, extras in sorted(found.items())
    ]


def pinned(file: Path) -> dict[str, str]:
    """Return the version of every package that a constraints file pins, by normalised name."""
    lines = file.read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==", 1) for line in lines if "==" in line and line[0] != "#"]
    return {normalised(name): version.strip() for name, version in pairs}


def normalised(name: str) -> str:
    """Return a distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


if __name__ == "__main__":
    if sys.argv[1:] not in (["airflow"], ["gpu"]):
        sys.exit("usage: python docker/requirements.py airflow|gpu")
    print("\n".join(requirements(sys.argv[1], Path(__file__).resolve().parents[1])))
