"""Cut what one image needs out of ``constraints.txt``, with the hashes.

``python docker/requirements.py airflow`` prints what every service needs; ``... gpu`` what a GPU
worker needs on top of it, beside torch; ``... build`` what builds the package. What needs what
stands in the file itself, at ``# via``. Standard library only: nothing is installed before it runs.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# What computes, and only that: these make an image several gigabytes larger. torch has a file of
# its own, constraints-torch.txt.
GPU = ("torch", "transformers", "nvidia-modelopt")
EXTRAS = ("airflow", "stack")
_PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(\[[^\]]*\])?==")


@dataclass
class Pin:
    """A pinned package.

    Attributes:
        lines: Its lines in the file: version, hashes, who needs it.
        parents: Normalised names of the packages that need it.
    """

    lines: list[str]
    parents: set[str]


def requirements(image: str, directory: Path) -> str:
    """Return the part of ``constraints.txt`` that an image installs.

    Args:
        image: ``airflow``, ``gpu`` or ``build``.
        directory: Holds ``pyproject.toml`` and ``constraints.txt``.

    Raises:
        KeyError: A requirement is not pinned.
    """
    pins = read_pins(directory / "constraints.txt")
    content = tomllib.loads((directory / "pyproject.toml").read_text(encoding="utf-8"))
    project = content["project"]
    declared = list(project["dependencies"])
    for extra in EXTRAS:
        declared += project["optional-dependencies"][extra]
    computing = set(GPU)
    services = closure({name_of(line) for line in declared} - computing, pins)
    wanted = {
        "airflow": services,
        "gpu": closure(computing - {"torch"}, pins) - services,
        "build": closure(map(name_of, content["build-system"]["requires"]), pins),
    }[image]
    return "\n".join(line for name in sorted(wanted) for line in pins[name].lines)


def closure(roots: Iterable[str], pins: dict[str, Pin]) -> set[str]:
    """Return ``roots`` and all that they need."""
    found = set(roots)
    if missing := found - set(pins):
        raise KeyError(f"not pinned in constraints.txt: {', '.join(sorted(missing))}")
    new = found
    while new:
        new = {name for name, pin in pins.items() if pin.parents & new} - found
        found = found | new
    return found


def read_pins(file: Path) -> dict[str, Pin]:
    """Return every package that a file pins, by normalised name."""
    pins: dict[str, Pin] = {}
    pin: Pin | None = None
    for line in file.read_text(encoding="utf-8").splitlines():
        if match := _PIN.match(line):
            pin = pins[normalised(match["name"])] = Pin([], set())
        if pin is None:  # the head of the file
            continue
        pin.lines.append(line)
        _, via, parents = line.partition("# via ")
        if via:
            pin.parents.update(name_of(parent) for parent in parents.split(", "))
    return pins


def name_of(requirement: str) -> str:
    """Return the normalised name that a requirement starts with."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement
    return normalised(match[0])


def normalised(name: str) -> str:
    """Return a distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    if sys.argv[1:] not in (["airflow"], ["gpu"], ["build"]):
        sys.exit("usage: python docker/requirements.py airflow|gpu|build")
    print(requirements(sys.argv[1], Path(__file__).resolve().parents[1]))
