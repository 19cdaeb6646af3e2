"""Where the language model, the vision tower and the head of a checkpoint are.

Read without torch: planning knows a model by the ``model_type`` of ``config.json``, by what ``qsens
inspect`` found of it, or by patterns in its model file.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qsens.checkpoint.files import read_config
from qsens.checkpoint.quantized import shapes
from qsens.checkpoint.structure import EXPERT_COUNTS, Structure, known_types, structure_of
from qsens.checksums import digest_file, digest_of
from qsens.config import ModelConfig, Roots
from qsens.errors import UserError
from qsens.reading import files_in, has_file, read_json, shown
from qsens.store import INSPECTIONS

_SHOWN = 8
_LIST = "docs/zoo.md"
_AGAIN = "Run `qsens inspect` again."


def resolve_components(config: ModelConfig, results: Path | None = None) -> ModelConfig:
    """Return ``config`` with the patterns of the checkpoint's structure where it gives none.

    Args:
        config: The checkpoint.
        results: Results root, where ``qsens inspect`` keeps what it found; that of the environment
            when not given.

    Raises:
        UserError: The checkpoint cannot be scored, or is of a type that is not known here while its
            model file says nothing; the message shows how to find out.
    """
    return with_patterns(config, find_structure(config, results))


def with_patterns(config: ModelConfig, structure: Structure | None) -> ModelConfig:
    """Return ``config`` with the patterns of a structure, if there is one, where it gives none."""
    if structure is None:
        return config
    return config.model_copy(
        update={
            "language_patterns": config.language_patterns or structure.language,
            "vision_patterns": config.vision_patterns or structure.vision,
            "head_patterns": config.head_patterns or structure.head,
        }
    )


def find_structure(config: ModelConfig, results: Path | None = None) -> Structure | None:
    """Return a checkpoint's structure; none where its model file alone says what it is made of.

    The arguments and errors are those of :func:`resolve_components`.
    """
    described = read_config(config.path)
    kind = str(described.get("model_type", "unknown"))
    where = f"model.path = {config.path}"
    found = inspected(config, results) or structure_of(kind)
    if isinstance(found, str):
        raise UserError(
            f"model type '{shown(kind)}' cannot be scored: {found}",
            where=where,
            remedy=f"Choose a checkpoint of another type; {_LIST} has those that can be.",
        )
    if found is None:
        _refuse_experts(described, kind, config.path)
        if not (config.language_patterns and config.head_patterns):
            raise UserError(
                f"model type '{shown(kind)}' is not among the {len(known_types())} types that "
                "qsens knows",
                where=where,
                remedy=f"Run `qsens inspect {config.path}` where torch is installed; or "
                + _how_to_write(_places(config.path)),
            )
    return found


def inspection(config: ModelConfig, results: Path | None = None) -> Path:
    """Return where ``qsens inspect`` keeps what it finds of a checkpoint.

    It is named after the digests of all that decides it: ``config.json``, the checkpoint's own code
    where it runs, and the version of transformers.
    """
    root = Roots.from_environment().results if results is None else results
    files = [config.path / "config.json"]
    if config.trust_remote_code:
        files += [file for file in files_in(config.path, remedy=_AGAIN) if file.suffix == ".py"]
    held = {file.name: digest_file(file, remedy=_AGAIN) for file in sorted(files)}
    with contextlib.suppress(PackageNotFoundError):
        held["transformers"] = version("transformers")
    return root / INSPECTIONS / f"{digest_of(held)}.json"


def inspected(config: ModelConfig, results: Path | None = None) -> Structure | str | None:
    """Return what ``qsens inspect`` found of a checkpoint; a reason where it cannot be scored."""
    file = inspection(config, results)
    if not has_file(file, remedy=_AGAIN):
        return None
    held = read_json(file, remedy=_AGAIN)
    try:
        return str(held["refused"]) if "refused" in held else Structure.read(held)
    except (KeyError, TypeError):
        raise UserError("is no inspection", where=str(file), remedy=_AGAIN) from None


def find_head(names: Iterable[str], config: ModelConfig) -> str:
    """Return the head's name; every module must be in one part.

    Args:
        names: Names of all linear and convolution modules of the loaded model.
        config: With its patterns resolved.

    Raises:
        UserError: A module is in no part or in several, there is no language model, or not one
            head. The message names modules and patterns.
    """
    members: dict[str, list[str]] = {"language": [], "vision": [], "head": []}
    patterns = {
        "language": config.language_patterns,
        "vision": config.vision_patterns,
        "head": config.head_patterns,
    }
    unmatched = []
    for name in names:
        parts = [part for part, given in patterns.items() if _matches(name, given)]
        if len(parts) == 1:
            members[parts[0]].append(name)
        else:
            unmatched.append((name, parts))
    where = f"model.path = {config.path}"
    if unmatched:
        name, parts = unmatched[0]
        which = f"several parts ({', '.join(parts)})" if parts else "no part"
        raise UserError(
            f"{len(unmatched)} modules are in {which} of the model, the first is {name}",
            where=where,
            remedy=_how_to_write(_grouped(name for name, _ in unmatched)),
        )
    if len(members["head"]) != 1 or not members["language"]:
        part = "language" if not members["language"] else "head"
        matched = ", ".join(members[part][:3]) or "no module"
        raise UserError(
            f"model.{part}_patterns = {', '.join(patterns[part])} match {matched}",
            where=where,
            remedy=_how_to_write(
                _grouped([*members["language"], *members["vision"], *members["head"]])
            ),
        )
    return members["head"][0]


def _refuse_experts(described: Mapping[str, Any], kind: str, path: Path) -> None:
    text = described.get("text_config")
    for section in (described, text if isinstance(text, Mapping) else {}):
        for key in EXPERT_COUNTS:
            count = section.get(key)
            if isinstance(count, int) and count > 1:
                raise UserError(
                    f"model type '{shown(kind)}' is a mixture of {shown(count)} experts, and is "
                    f"not among the {len(known_types())} types that qsens knows",
                    where=f"model.path = {path}",
                    remedy=f"Run `qsens inspect {path}` where torch is installed.",
                )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _places(path: Path) -> list[str]:
    """Return where a checkpoint's matrices lie."""
    names = (name for name, shape in shapes(path).items() if len(shape) >= 2)
    return _grouped(name.removesuffix(".weight") for name in names)


def _grouped(names: Iterable[str]) -> list[str]:
    """Return names up to their first number, each once: ``model.layers.*``."""
    places: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        places[name if at is None else ".".join((*parts[:at], "*"))] = None
    return list(places)


def _how_to_write(places: Sequence[str]) -> str:
    listed = ", ".join(places[:_SHOWN]) + (", ..." if len(places) > _SHOWN else "")
    return (
        "say in its model file where the linear modules of each part are, by name or fnmatch "
        'pattern, for example: language_patterns: ["model.layers.*"], vision_patterns: '
        '["model.vision_tower.*"] (none without a tower), head_patterns: ["lm_head"]. '
        f"Here there are: {listed}."
    )
