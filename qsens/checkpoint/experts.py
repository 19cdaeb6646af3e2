"""Experts of a mixture that share two weights, and which tokens each of them gets. Needs torch.

A module of ``E`` experts holds ``gate_up_proj`` ``(E, 2 * inner, hidden)`` and ``down_proj``
``(E, hidden, inner)``. An expert gives ``down(act(gate(x)) * up(x))``, and a token the sum of what
its experts give, each times the router's weight. As in ModelOpt, every expert's weights have
quantizers of their own, while all experts share one quantizer of what the module reads and one of
what stands between their two products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

FIRST, SECOND = "gate_up_proj", "down_proj"


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
    """Return whether a module is what ModelOpt quantizes as gated experts with shared weights."""
    weights = [getattr(module, name, None) for name in (FIRST, SECOND)]
    return hasattr(module, "num_experts") and all(
        isinstance(weight, torch.Tensor) and weight.ndim == 3 for weight in weights
    )


def expert_weights(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two weights of all experts, ``(experts, out, in)``."""
    return module.get_parameter(FIRST), module.get_parameter(SECOND)


def input_names(name: str, module: nn.Module) -> tuple[str, ...]:
    """Return the names of the inputs of a module that a quantizer reads: one, or experts' two."""
    return (f"{name}.{FIRST}", f"{name}.{SECOND}") if is_experts(module) else (name,)


def route(chosen: torch.Tensor, gates: torch.Tensor, experts: int) -> Routing:
    """Return which rows go to each expert.

    Args:
        chosen: The experts of each row, ``(rows, experts of a row)``, int64.
        gates: The router's weights of them, same shape.
        experts: How many there are.
    """
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts)
    starts = (0, *counts.cumsum(0).tolist())
    return Routing(order // chosen.shape[1], gates.flatten()[order][:, None], starts)


def between(module: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return what stands between the products of one expert, ``(rows, inner)``.

    Args:
        module: The experts.
        x: Its rows, ``(rows, hidden)``.
        weight: Its first weight, ``(2 * inner, hidden)``.
    """
    gate, up = F.linear(x, weight).chunk(2, dim=-1)
    hidden: torch.Tensor = module.act_fn(gate) * up
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
    hidden, chosen, gates = args if real is None else (part[real] for part in args)
    weight, _ = expert_weights(module)
    routing = route(chosen, gates, len(weight))
    for expert in routing.busy():
        rows = hidden[routing.rows[routing.share(expert)]]
        yield second, between(module, rows, weight[expert])


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
    for expert in routing.busy():
        share = routing.share(expert)
        hidden = inner(between(module, x[routing.rows[share]], weights(first[expert])))
        yield share, F.linear(hidden, weights(second[expert])) * routing.gates[share]


def _same(x: torch.Tensor) -> torch.Tensor:
    return x
