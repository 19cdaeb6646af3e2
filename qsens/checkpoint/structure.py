"""What a checkpoint's model is made of, and how it runs. Read without torch.

Known by the ``model_type`` of ``config.json`` for the types of transformers: ``structures.json``,
which ``make zoo`` writes, has what :mod:`qsens.engine.discovery` found by running a shrunk twin of
each. Of another type ``qsens inspect`` finds the same, and keeps it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

_FILE = Path(__file__).with_name("structures.json")
# How configurations of mixtures of experts name the number of experts.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Traits of loaded models, which nothing is written on.
_TRAITS: WeakKeyDictionary[Any, Traits] = WeakKeyDictionary()


@dataclass(frozen=True)
class Traits:
    """How a model runs, as far as a pass has to know.

    Attributes:
        head: Name of the module that makes logits; none where the model itself says which it is.
        pads: Whether padding on the right leaves every real token as it is without a mask.
        chained: Whether a gradient reaches a layer through what it reads from the layer before
            alone.
        in_place: Whether what a module gives is changed in place by what comes after it.
        left_alone: Names of linear modules that no format is for, such as routers; an index in them
            is left open.
    """

    head: str | None = None
    pads: bool = True
    chained: bool = True
    in_place: bool = False
    left_alone: tuple[str, ...] = ()


@dataclass(frozen=True)
class Structure:
    """What a model is made of.

    Attributes:
        language: Patterns (fnmatch) of the names of the language model's modules, without the head.
        vision: The same of the towers with what projects their outputs; empty without one. They
            match the names in files as well, which may be older than the modules'.
        head: The same of the output embedding.
        traits: How it runs.
        tied: Whether its head is its embedding where ``config.json`` is silent.
    """

    language: tuple[str, ...]
    vision: tuple[str, ...]
    head: tuple[str, ...]
    traits: Traits = Traits()
    tied: bool = False

    @classmethod
    def read(cls, held: Mapping[str, Any]) -> Structure:
        """Return a structure from what :meth:`as_dict` gave."""
        traits = held.get("traits", {})
        lists = {key: tuple(held[key]) for key in ("language", "vision", "head")}
        left_alone = tuple(traits.get("left_alone", ()))
        return cls(
            **lists,
            traits=Traits(**{**traits, "left_alone": left_alone}),
            tied=held["tied"],
        )

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)


def structure_of(model_type: str) -> Structure | str | None:
    """Return the structure of a type of transformers; a reason where it cannot be scored.

    Args:
        model_type: As ``config.json`` names it.

    Returns:
        None for a type that is not known.
    """
    held = _known()["types"].get(model_type)
    if held is None:
        return None
    refused: str | None = held.get("refused")
    return refused if refused is not None else Structure.read(held)


def known_types() -> tuple[str, ...]:
    """Return the types that can be scored, sorted."""
    types = _known()["types"]
    return tuple(sorted(name for name, held in types.items() if "refused" not in held))


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


@cache
def _known() -> Mapping[str, Any]:
    held: Mapping[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return held
