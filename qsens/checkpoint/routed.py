"""Llama 4's experts in the layout of all others. Needs torch.

Its own class multiplies every token with every expert, tokens of others as zeros, in one product of
``(experts, tokens, hidden)``; the router's weight stands before the experts, not behind them. With
one expert a token, as all of its checkpoints have, the same numbers come of an expert's own tokens
alone, in as many times fewer products as there are experts.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from qsens.errors import UserError

_MIXTURE = "Llama4TextMoe"


def route_experts(model: nn.Module, implementation: str) -> None:
    """Let the mixtures of Llama 4 hand each expert its own tokens; others stay as they are.

    Args:
        model: The model; changed in place. Names and weights are what they were.
        implementation: How transformers runs experts: ``eager`` or ``grouped_mm``.

    Raises:
        UserError: A token goes to more than one expert.
    """
    for module in model.modules():
        if type(module).__name__ == _MIXTURE:
            _route(module)
        if isinstance(module, RoutedExperts):
            vars(module)["config"] = SimpleNamespace(_experts_implementation=implementation)


def _route(mixture: Any) -> None:
    if mixture.top_k != 1:
        raise UserError(
            f"its tokens go to {mixture.top_k} experts each, and Llama 4's layout is read with one",
            where=_MIXTURE,
            remedy="Set num_experts_per_tok as the checkpoint has it.",
        )
    mixture.experts = RoutedExperts(SimpleNamespace(), mixture.experts)
    own = type(mixture)
    mixture.__class__ = type(own.__name__, (own,), {"forward": _forward, "__module__": __name__})


def _forward(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_states = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(hidden_states)
    chosen = logits.argmax(dim=1, keepdim=True)
    gates = scores.gather(1, chosen)
    routed = self.experts(hidden_states * gates, chosen, torch.ones_like(gates))
    return self.shared_expert(hidden_states) + routed, logits


@use_experts_implementation
class RoutedExperts(nn.Module):
    """Experts with the weights of others, which lie transposed.

    Args:
        config: How transformers runs them.
        experts: Those of Llama 4.
    """

    def __init__(self, config: Any, experts: Any) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        self.act_fn = experts.act_fn
        self.gate_up_proj = nn.Parameter(experts.gate_up_proj.transpose(1, 2))
        self.down_proj = nn.Parameter(experts.down_proj.transpose(1, 2))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return what each row's expert gives, ``(rows, hidden)``."""
        output = torch.zeros_like(hidden_states)
        for expert in sorted(set(top_k_index.flatten().tolist())):
            rows = (top_k_index[:, 0] == expert).nonzero()[:, 0]
            product = F.linear(hidden_states[rows], self.gate_up_proj[expert])
            product = F.linear(self._apply_gate(product), self.down_proj[expert])  # type: ignore[operator]
            output[rows] = product * top_k_weights[rows]
        return output
