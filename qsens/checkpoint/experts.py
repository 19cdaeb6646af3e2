"""Experts of a mixture that share two weights, and which tokens each of them gets. Needs torch.

A module of ``E`` experts holds ``gate_up_proj`` ``(E, 2 * inner, hidden)``, or ``up_proj``
``(E, inner, hidden)`` where nothing is gated, and ``down_proj`` ``(E, hidden, inner)``; or all of
them with their last two dimensions swapped, and perhaps a bias for each. An expert gives
``down(act(gate(x)) * up(x))``, and a token the sum of what its experts give, each times the
router's weight. How a layout differs stands in flags of the class (``has_gate``,
``is_transposed``, ``has_bias``, ``_apply_gate``), which transformers'
``use_experts_implementation`` sets. As in ModelOpt, every expert's weights have quantizers of their
own, while all experts share one quantizer of what the module reads and one of what stands between
their two products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_FIRST = ("gate_up_proj", "up_proj")
_SECOND = "down_proj"


@dataclass(frozen=True)
class Routing:
    """Which experts the rows of a module go to.

    Attributes:
        rows: Row of each pair of a row and an expert, by expert and then ascending, ``(pairs,)``.
        gates: The router's weight of each pair, ``(pairs, 1)``.
        starts: Where the pairs of each expert begin, and where the last end.
    """

    rows: torch.Tensor
    gates: torch.Tensor
    starts: tuple[int, ...]

    def share(self, expert: int) -> slice:
        """Return where the pairs of an expert lie."""
        return slice(self.starts[expert], self.starts[expert + 1])

    def busy(self) -> Iterator[int]:
        """Return the experts that get a row."""
        return (e for e in range(len(self.starts) - 1) if self.starts[e] < self.starts[e + 1])


def is_experts(module: nn.Module) -> bool:
    """Return whether a module is experts in the layout that transformers' own products take."""
    weights = [getattr(module, name, None) for name in weight_names(module)]
    return hasattr(module, "is_concatenated") and all(
        isinstance(weight, torch.Tensor) and weight.ndim == 3 for weight in weights
    )


def weight_names(module: nn.Module) -> tuple[str, str]:
    """Return what the two weights of experts are called."""
    gated = getattr(module, "has_gate", True)
    return _FIRST[0 if gated else 1], _SECOND


def expert_weights(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two weights of all experts, ``(experts, out, in)``."""
    first, second = (module.get_parameter(name) for name in weight_names(module))
    if module.is_transposed:
        return first.transpose(1, 2), second.transpose(1, 2)
    return first, second


def expert_biases(module: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the two biases of all experts, ``(experts, out)``; none where there are none."""
    if not module.has_bias:
        return None, None
    first, second = (module.get_parameter(f"{name}_bias") for name in weight_names(module))
    return first, second


def input_names(name: str, module: nn.Module) -> tuple[str, ...]:
    """Return the names of the inputs of a module that a quantizer reads: one, or experts' two."""
    if not is_experts(module):
        return (name,)
    first, second = weight_names(module)
    return f"{name}.{first}", f"{name}.{second}"


def route(chosen: torch.Tensor, gates: torch.Tensor, experts: int) -> Routing:
    """Return which rows go to each expert.

    Args:
        chosen: The experts of each row, ``(rows, experts of a row)``, int64; what is no index of
            an expert goes to none.
        gates: The router's weights of them, same shape.
        experts: How many there are.
    """
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts)[:experts]
    starts = (0, *counts.cumsum(0).tolist())
    order = order[: starts[-1]]
    return Routing(order // chosen.shape[1], gates.flatten()[order][:, None], starts)


def between(
    module: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what stands between the products of one expert, ``(rows, inner)``.

    Args:
        module: The experts.
        x: Its rows, ``(rows, hidden)``.
        weight: Its first weight, ``(2 * inner, hidden)``, or ``(inner, hidden)`` without a gate.
        bias: Its first bias, ``(2 * inner,)`` or ``(inner,)``.
    """
    product = F.linear(x, weight, bias)
    hidden: torch.Tensor = (
        module._apply_gate(product) if module.has_gate else module.act_fn(product)
    )
    return hidden


def run_experts(
    module: nn.Module,
    x: torch.Tensor,
    chosen: torch.Tensor,
    gates: torch.Tensor,
    *,
    weights: Callable[[torch.Tensor], torch.Tensor],
    inner: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return what experts give, ``(rows, hidden)``.

    Args:
        module: The experts.
        x: What they read, ``(rows, hidden)``.
        chosen: As :func:`route` takes it.
        gates: As :func:`route` takes it.
        weights: Called with each weight of one expert before it is used.
        inner: Called with what stands between the products of one expert.
    """
    routing = route(chosen, gates, len(expert_weights(module)[0]))
    output = torch.zeros_like(x)
    for share, added in _added(module, x, routing, weights, inner):
        output.index_add_(0, routing.rows[share], added)
    return output


def expert_inputs(
    name: str,
    module: nn.Module,
    args: Sequence[torch.Tensor],
    shape: Sequence[int],
    real: torch.Tensor | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what quantizers of experts read, with its name; the second input expert by expert.

    Args:
        name: Name of the module.
        module: The experts.
        args: What they are called with, padding included: hidden states, experts, weights.
        shape: Samples and tokens of the batch.
        real: Indices of the real tokens; none where nothing is padded.
    """
    first, second = input_names(name, module)
    yield first, args[0].view(*shape, -1)
    args = [part.flatten(0, -2) for part in args]
    hidden, chosen, gates = args if real is None else (part[real] for part in args)
    weight, _ = expert_weights(module)
    bias, _ = expert_biases(module)
    routing = route(chosen, gates, len(weight))
    for expert in routing.busy():
        rows = hidden[routing.rows[routing.share(expert)]]
        yield second, between(module, rows, weight[expert], of_expert(bias, expert))


def contributions(module: nn.Module, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Return what every pair of a row and an expert adds to the output, ``(pairs, hidden)``."""
    added = [part for _, part in _added(module, x, routing, _same, _same)]
    return torch.cat([x.new_empty(0, x.shape[1]), *added])


def _added(
    module: nn.Module,
    x: torch.Tensor,
    routing: Routing,
    weights: Callable[[torch.Tensor], torch.Tensor],
    inner: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield what each expert's pairs of a row and an expert add, with where these pairs lie."""
    first, second = expert_weights(module)
    biases = expert_biases(module)
    for expert in routing.busy():
        share = routing.share(expert)
        entering, leaving = (of_expert(bias, expert) for bias in biases)
        hidden = inner(between(module, x[routing.rows[share]], weights(first[expert]), entering))
        yield share, F.linear(hidden, weights(second[expert]), leaving) * routing.gates[share]


def of_expert(bias: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    """Return the bias of one expert; none where there is none."""
    return None if bias is None else bias[expert]


def _same(x: torch.Tensor) -> torch.Tensor:
    return x
