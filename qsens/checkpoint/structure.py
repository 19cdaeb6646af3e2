"""Where the language model, the vision tower and the head of a checkpoint are.

Read without torch: planning knows a family by the ``model_type`` of ``config.json``. A checkpoint
outside the table says it by patterns in its model file.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from qsens.checkpoint.files import read_config, shapes
from qsens.config import ModelConfig
from qsens.errors import UserError
from qsens.reading import shown


@dataclass(frozen=True)
class Components:
    """Patterns (fnmatch) of the names of linear and convolution modules, by part.

    Those of the tower match the names in files as well, which may be older than the modules'.

    Attributes:
        language: The language model's layers, without the head.
        vision: The vision tower with what projects its output; empty where there is none.
        head: The output embedding; one module.
    """

    language: tuple[str, ...]
    vision: tuple[str, ...]
    head: tuple[str, ...]


@dataclass(frozen=True)
class Traits:
    """How a model runs, as far as a pass has to know.

    Attributes:
        head: Name of the module that makes logits; none where the model itself says which it is.
        pads: Whether padding on the right leaves every real token as it is without a mask.
        chained: Whether a gradient reaches a layer through what it reads from the layer before
            alone.
    """

    head: str | None = None
    pads: bool = True
    chained: bool = True


@dataclass(frozen=True)
class Family:
    """Checkpoints whose modules are named alike.

    Attributes:
        name: The family, in words.
        model_types: ``model_type`` in ``config.json``.
        parts: Where its parts are.
        takes_images: Whether samples may hold pictures.
        is_moe: Whether its layers are mixtures of experts with shared weights.
    """

    name: str
    model_types: tuple[str, ...]
    parts: Components
    takes_images: bool = False
    is_moe: bool = False


_HEAD = ("lm_head",)
_DECODER = Components(language=("model.layers.*",), vision=(), head=_HEAD)
_QWEN_VL = Components(
    language=("model.language_model.*", "language_model.*"),
    vision=("model.visual.*", "visual.*"),
    head=_HEAD,
)
FAMILIES = (
    Family("Qwen3-VL", ("qwen3_vl",), _QWEN_VL, takes_images=True),
    Family("Qwen2.5-VL", ("qwen2_5_vl",), _QWEN_VL, takes_images=True),
    Family("Qwen3-VL-MoE", ("qwen3_vl_moe",), _QWEN_VL, takes_images=True, is_moe=True),
    Family("Qwen3", ("qwen3",), _DECODER),
    Family("Qwen3-MoE", ("qwen3_moe",), _DECODER, is_moe=True),
    Family("Llama", ("llama",), _DECODER),
    Family(
        "Gemma 3",
        ("gemma3",),
        Components(
            language=("model.language_model.*",),
            vision=(
                "model.vision_tower.*",
                "model.multi_modal_projector.*",
                "vision_tower.*",
                "multi_modal_projector.*",
            ),
            head=_HEAD,
        ),
    ),
    Family("Gemma 3, text alone", ("gemma3_text",), _DECODER),
)
# How configurations of mixtures of experts name the number of experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SHOWN = 8
# Traits of loaded models, which nothing is written on.
_TRAITS: WeakKeyDictionary[Any, Traits] = WeakKeyDictionary()


def family_of(model_type: str) -> Family | None:
    """Return the family of a ``model_type``, or none."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def resolve_components(config: ModelConfig) -> ModelConfig:
    """Return ``config`` with the patterns of the checkpoint's family where it gives none.

    Raises:
        UserError: The checkpoint is a mixture of experts of another family than those in the table,
            or of none there while its model file says nothing; the message shows how to write it.
    """
    described = read_config(config.path)
    kind = str(described.get("model_type", "unknown"))
    family = family_of(kind)
    if family is None or not family.is_moe:
        _refuse_experts(described, kind, config.path)
    if family is None and not (config.language_patterns and config.head_patterns):
        raise UserError(
            f"model type '{shown(kind)}' is of no family that qsens knows "
            f"({', '.join(family.name for family in FAMILIES)})",
            where=f"model.path = {config.path}",
            remedy=_how_to_write(_places(config.path)),
        )
    parts = family.parts if family is not None else Components((), (), ())
    return config.model_copy(
        update={
            "language_patterns": config.language_patterns or parts.language,
            "vision_patterns": config.vision_patterns or parts.vision,
            "head_patterns": config.head_patterns or parts.head,
        }
    )


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


def head_of(model: Any) -> Any:
    """Return the module that makes logits of hidden states.

    It is the one that its traits name, else what the model itself says it is.
    """
    name = traits_of(model).head
    return model.get_output_embeddings() if name is None else model.get_submodule(name)


def traits_of(model: Any) -> Traits:
    """Return the traits that :func:`remember_traits` has noted of a model, else those of most."""
    return _TRAITS.get(model, Traits())


def remember_traits(model: Any, traits: Traits) -> None:
    """Keep a model's traits for as long as it lives; a copy of it is another model."""
    _TRAITS[model] = traits


def _refuse_experts(described: Mapping[str, Any], kind: str, path: Path) -> None:
    text = described.get("text_config")
    for section in (described, text if isinstance(text, Mapping) else {}):
        for key in _EXPERTS:
            count = section.get(key)
            if isinstance(count, int) and count > 1:
                known = ", ".join(family.name for family in FAMILIES if family.is_moe)
                raise UserError(
                    f"model type '{shown(kind)}' is a mixture of {shown(count)} experts of a "
                    f"family that qsens cannot score; of mixtures, it knows {known}",
                    where=f"model.path = {path}",
                    remedy="Choose a checkpoint of those families, or a dense one.",
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
        "Say in its model file where the linear modules of each part are, by name or fnmatch "
        'pattern, for example: language_patterns: ["model.layers.*"], vision_patterns: '
        '["model.vision_tower.*"] (none without a tower), head_patterns: ["lm_head"]. '
        f"Here there are: {listed}."
    )
