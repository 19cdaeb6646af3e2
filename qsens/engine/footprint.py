"""The bytes that a pass takes above the weights, as far as shapes tell. Needs torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qsens.checkpoint.experts import expert_weights, is_experts
from qsens.checkpoint.groups import Group, tower_of
from qsens.checkpoint.modules import is_linear, layers_of, weight_of
from qsens.checkpoint.structure import head_of, traits_of
from qsens.data.samples import Samples
from qsens.engine.candidates import Candidates
from qsens.engine.head import HEAD_ROWS
from qsens.engine.quantizer import WEIGHT_CHUNK

# How configurations name the experts that a token goes to.
_CHOSEN = (
    "num_experts_per_tok",
    "top_k_experts",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "num_experts_per_token",
)


@dataclass(frozen=True)
class Footprint:
    """What a pass takes.

    Attributes:
        fixed: Bytes that depend on no token.
        per_token: Bytes of a token in flight.
        records: Bytes of a token's records, where those of all layers are kept.
        size: Bytes of a value that the model makes.
        patches: Patches of pictures that a token brings along, at most.
    """

    fixed: float
    per_token: float
    records: float
    size: int
    patches: float


def footprint(
    model: nn.Module,
    groups: Sequence[Group],
    candidates: Candidates,
    losses: int,
    samples: Samples | None = None,
) -> Footprint:
    """Return what a pass takes above the weights.

    Args:
        model: The model, wherever it lies.
        groups: Its groups.
        candidates: What the pass computes.
        losses: Losses that go backward, each with gradients of its own; 0 where nothing does.
        samples: The samples: how many patches of pictures a token brings along.
    """
    rows = _Rows.of(model, groups, samples)
    head = head_of(model)
    stored = head.weight.element_size()
    # Measured divergences are taken in float32; so are changes of outputs under several losses.
    wide = stored if losses == 1 else max(4, stored)
    size = stored if losses else wide
    # Outputs made anew, inputs in the parts that a product in float32 takes them in.
    anew = wide if wide > size else 0
    parts = 6 if wide > stored else 0
    more = max(0, losses - 1)  # gradients beside those that the record counts
    # A candidate of a small size scores few of the tokens: counted as the share that it does.
    share = [scored / max(candidates.scored) for scored in candidates.scored]
    of_weight: Counter[int] = Counter()
    of_input: dict[int, float] = {}
    for (weight_index, entry), part in zip(candidates.pairs, share, strict=True):
        of_weight[weight_index] += part  # type: ignore[assignment]
        of_input[entry] = max(of_input.get(entry, 0.0), part)
    most = max(of_weight.values())
    inside: dict[str, float] = {}
    gradients: dict[str, float] = {}
    widest = largest = 0.0
    for group in groups:
        if not group.covered:
            continue
        for name in group.members:
            module = model.get_submodule(name)
            if is_experts(module):
                layer, _ = rows.of_module(name, module)
                held, kept, working = _of_experts(model, module, size, wide, most, losses)
                largest = max(largest, held)
                inside[layer] = inside.get(layer, 0.0) + kept
                hidden = expert_weights(module)[0].shape[2]
                gradients[layer] = gradients.get(layer, 0.0) + more * size * hidden
                stacked = 2 * sum(of_input.values()) + most
                widest = max(widest, hidden * (size * 3 + wide * (stacked + most)) + working)
                continue
            weight = weight_of(module)
            largest = max(largest, weight.numel())
            if module is head:
                continue
            layer, each = rows.of_module(name, module)
            out, into = each * weight.shape[0], each * weight[0].numel()
            # One layer at a time: what autograd keeps while it runs again, and the rows taken.
            inside[layer] = inside.get(layer, 0.0) + 1.5 * size * (into + out)
            gradients[layer] = gradients.get(layer, 0.0) + more * size * out
            # Quantized inputs, also stacked for two kinds of weights; the rows; one product.
            stacked = 2 * sum(of_input.values()) + most
            products = out * (2 * size + most * wide + anew)
            widest = max(widest, into * (size + wide * stacked + parts * most) + products)
    hidden, vocabulary = head.weight.shape[1], head.weight.shape[0]
    chunk = min(largest, WEIGHT_CHUNK)
    held = size + (wide if wide > stored else 0)
    fixed = largest * held + chunk * 3 * 4 + HEAD_ROWS * vocabulary * (3 * 4 + 2 * size)
    at_head = hidden * (size * 3 + wide * most)
    per_token = rows.kept * size * 1.1 + max(
        max(inside.values(), default=0.0) + max(gradients.values(), default=0.0) + widest,
        at_head,
    )
    records = sum(inside.values()) - max(inside.values(), default=0.0)
    return Footprint(fixed, per_token, records, size, rows.patches)


@dataclass(frozen=True)
class _Rows:
    """How many rows a token is to each part of a model, at most over the samples.

    Attributes:
        layers: Names of the layers.
        tower: Names of the modules that read pictures.
        patches: Patches of pictures a token.
        visual: The same once they are merged.
        kept: Values a token that are kept between the layers: what goes in.
    """

    layers: tuple[str, ...]
    tower: frozenset[str]
    patches: float
    visual: float
    kept: float

    @classmethod
    def of(cls, model: nn.Module, groups: Sequence[Group], samples: Samples | None) -> _Rows:
        """Return those of a model and samples."""
        tower = tower_of(groups)
        counts = []
        if samples is not None and samples.pictures:
            counts = [
                (picture.patches / len(ids), picture.shown / len(ids))
                for picture, ids in zip(samples.pictures, samples.ids, strict=True)
            ]
        patches = max((each for each, _ in counts), default=0.0)
        visual = max((each for _, each in counts), default=0.0)
        kept = 0.0
        # What is not run again is one layer: all of it is held at once.
        layers = layers_of(model) if traits_of(model).chained else {}
        for name, layer in layers.items():
            inner = [part for part in layer.modules() if is_linear(part)]
            width = weight_of(inner[0]).shape[1] if inner else 0
            reads = any(module.startswith(f"{name}.") for module in tower)
            kept += width * (patches if reads else 1.0)
        return cls(tuple(layers), tower, patches, visual, kept)

    def of_module(self, name: str, module: nn.Module) -> tuple[str, float]:
        """Return the layer of a module, empty where it is in none, and its rows a token."""
        layer = next((layer for layer in self.layers if name.startswith(f"{layer}.")), "")
        if name not in self.tower:
            return layer, 1.0
        at_patches = layer or not isinstance(module, nn.Linear)
        return layer, self.patches if at_patches else self.visual


def _of_experts(
    model: nn.Module, module: nn.Module, size: int, wide: int, most: float, losses: int
) -> tuple[int, float, float]:
    """Return elements of all weights, and bytes a token: the record, the work beside it.

    Args:
        most: Candidates that one weight format has.
    """
    first, second = expert_weights(module)
    hidden, inner = second.shape[1:]
    chosen = _experts_of_token(model, len(first))
    # Autograd keeps what every expert of a token reads, its two halves, and what it adds.
    kept = size * (2 * hidden + chosen * (3 * hidden + 4 * inner))
    # What experts add, as they are and under one input format at a time; norms of all pairs.
    norms = chosen * most * (1 + losses) * 4
    working = chosen * (size * hidden + wide * (3 * hidden + 4 * inner)) + norms
    return first.numel() + second.numel(), kept, working


def _experts_of_token(model: Any, count: int) -> int:
    """Return how many experts a token goes to, as configurations say it; all where none does."""
    config = model.config.get_text_config()
    given = (getattr(config, key, None) for key in _CHOSEN)
    return next((each for each in given if isinstance(each, int)), count)
