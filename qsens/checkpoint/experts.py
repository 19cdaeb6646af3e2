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
from functools import cached_property
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
        experts: The expert of each pair, ``(pairs,)``.
        ends: Where the pairs of each expert end, ``(experts,)``, int32.
        most: Experts of a row at most.
    """

    rows: torch.Tensor
    gates: torch.Tensor
    experts: torch.Tensor
    ends: torch.Tensor
    most: int

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Return where the pairs of each expert begin, and where the last end."""
        return (0, *self.ends.tolist())

    def share(self, expert: int) -> slice:
        """Return where the pairs of an expert lie."""
        return slice(self.starts[expert], self.starts[expert + 1])

    def busy(self) -> Iterator[int]:
        """Return the experts that get a row."""
        return (e for e in range(len(self.starts) - 1) if self.starts[e] < self.starts[e + 1])

    @cached_property
    def by_row(self) -> torch.Tensor | None:
        """Return the pairs of each row in order, ``(rows, most)``; none where some have fewer."""
        order = self.rows.argsort(stable=True)
        counts = torch.bincount(self.rows)
        whole = len(order) == self.most * len(counts) and bool((counts == self.most).all())
        return order.view(-1, self.most) if whole else None


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
    ends = counts.cumsum(0)
    order = order[: int(ends[-1])]
    gates = gates.flatten()[order][:, None]
    return Routing(order // chosen.shape[1], gates, flat[order], ends.int(), chosen.shape[1])


def products(
    x: torch.Tensor,
    weight: torch.Tensor,
    routing: Routing,
    bias: torch.Tensor | None = None,
    *,
    grouped: bool = True,
) -> torch.Tensor:
    """Return each pair's product with the weight of its expert, ``(pairs, out)``.

    In bfloat16 on a GPU it is one grouped product; else one product an expert.

    Args:
        x: What pairs read, ``(pairs, in)``.
        weight: The weights of all experts, ``(experts, out, in)``.
        routing: Which pairs are whose.
        bias: The biases of all experts, ``(experts, out)``.
        grouped: Whether it may be grouped: such a product gives the data type that it is given.
    """
    if grouped and _groups(x, weight):
        output = F.grouped_mm(x, weight.transpose(1, 2), offs=routing.ends)
        return output if bias is None else output.add_(bias[routing.experts])
    parts = [x.new_empty(0, weight.shape[1])]
    for expert in routing.busy():
        own = None if bias is None else bias[expert]
        parts.append(F.linear(x[routing.share(expert)], weight[expert], own))
    return torch.cat(parts)


def between(
    module: Any,
    x: torch.Tensor,
    routing: Routing,
    weight: torch.Tensor | None = None,
    *,
    grouped: bool = True,
) -> torch.Tensor:
    """Return what stands between the products of each pair's expert, ``(pairs, inner)``.

    Args:
        module: The experts.
        x: What pairs read, ``(pairs, hidden)``.
        routing: Which pairs are whose.
        weight: The first weights of all experts; their own when not given.
        grouped: As of :func:`products`.
    """
    first = expert_weights(module)[0] if weight is None else weight
    product = products(x, first, routing, expert_biases(module)[0], grouped=grouped)
    hidden: torch.Tensor = (
        module._apply_gate(product) if module.has_gate else module.act_fn(product)
    )
    return hidden


def contributions(
    module: nn.Module,
    x: torch.Tensor,
    routing: Routing,
    weights: Sequence[torch.Tensor] | None = None,
    inner: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    grouped: bool = True,
) -> torch.Tensor:
    """Return what every pair of a row and an expert adds to the output, ``(pairs, hidden)``.

    Args:
        module: The experts.
        x: What the module reads, ``(rows, hidden)``.
        routing: Which rows go to which experts.
        weights: The weights of all experts; their own when not given.
        inner: Called with what stands between the products.
        grouped: As of :func:`products`.
    """
    first, second = expert_weights(module) if weights is None else weights
    hidden = between(module, x[routing.rows], routing, first, grouped=grouped)
    hidden = hidden if inner is None else inner(hidden)
    bias = expert_biases(module)[1]
    return products(hidden, second, routing, bias, grouped=grouped) * routing.gates


def summed(added: torch.Tensor, routing: Routing, rows: int) -> torch.Tensor:
    """Return what experts give, ``(rows, hidden)``: of each row what its experts add, in order.

    Args:
        added: What pairs add, as :func:`contributions` gives it.
        routing: Which rows they are of.
        rows: Rows of the module.
    """
    if added.is_cuda and routing.by_row is not None and len(routing.by_row) == rows:
        # In an order that is always the same, which atomic additions have not.
        first, *others = added[routing.by_row].unbind(dim=1)
        output = first.clone()
        for each in others:
            output += each
        return output
    return added.new_zeros(rows, added.shape[1]).index_add_(0, routing.rows, added)


def outputs(
    module: nn.Module,
    x: torch.Tensor,
    chosen: torch.Tensor,
    gates: torch.Tensor,
    weights: Sequence[torch.Tensor],
    inner: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return what experts give with other weights, ``(rows, hidden)``.

    Args:
        module: The experts.
        x: What they read, ``(rows, hidden)``.
        chosen: The experts of each row, ``(rows, experts of a row)``.
        gates: What the router weighs them with, same shape.
        weights: The weights of all experts.
        inner: Called with what stands between the products.
    """
    routing = route(chosen, gates, len(weights[0]))
    return summed(contributions(module, x, routing, weights, inner), routing, len(x))


def expert_inputs(
    name: str,
    module: nn.Module,
    args: Sequence[torch.Tensor],
    shape: Sequence[int],
    real: torch.Tensor | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what quantizers of experts read, with its name.

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
    routing = route(chosen, gates, len(expert_weights(module)[0]))
    yield second, between(module, hidden[routing.rows], routing)


def _groups(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether torch's grouped product takes these: bfloat16, rows of whole 16 bytes."""
    return (
        x.is_cuda
        and x.dtype == weight.dtype == torch.bfloat16
        and weight.shape[1] % 8 == 0
        and weight.shape[2] % 8 == 0
        and len(x) > 0
        and hasattr(F, "grouped_mm")
    )
