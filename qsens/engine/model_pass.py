"""One pass of a batch through the model, with hooks on the modules of the groups. Needs torch.

Weights stay frozen. Gradients flow from the embedding's output, each decoder layer is recomputed
in the backward pass (so that memory does not grow with depth), and the head is left out of the
forward pass: what reads it works on its inputs in chunks, since a vocabulary-sized row a token is
most of what a naive pass would hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qsens.engine.samples import Batch
from qsens.errors import UserError

Tap = Callable[[str, nn.Module, torch.Tensor, torch.Tensor], None]
"""Called with a module's name, the module, its input and its output."""


class ModelPass:
    """Runs batches through a model up to, and without, its head.

    Args:
        model: A Hugging Face model with an output embedding that is a linear module.
        modules: The modules to tap, by name; the head may be among them and is never tapped.

    Raises:
        UserError: What the model does after its head is more than a linear module.
    """

    def __init__(self, model: Any, modules: Mapping[str, nn.Module]) -> None:
        self.model = model
        head = model.get_output_embeddings()
        config = model.config.get_text_config()
        bent = getattr(config, "final_logit_softcapping", None) or getattr(
            config, "logits_scaling", None
        )
        if not isinstance(head, nn.Linear) or bent:
            raise UserError(
                "its logits are not simply those of a linear head",
                where=type(model).__name__,
                remedy="Use autoquant.engine=modelopt for this model.",
            )
        self.head: nn.Linear = head
        self.modules = {name: module for name, module in modules.items() if module is not head}

    @contextmanager
    def tapped(self, tap: Tap) -> Iterator[None]:
        """Call ``tap`` whenever a module has run, and keep the head out, while the context lasts.

        Under a recomputed layer, only the run that records gradients is seen.
        """
        handles = [
            module.register_forward_hook(functools.partial(_forward_hook, tap, name))
            for name, module in self.modules.items()
        ]
        layers = [
            module
            for module in self.model.modules()
            if isinstance(module, GradientCheckpointingLayer)
        ]
        embedding = self.model.get_input_embeddings()
        handles.append(embedding.register_forward_hook(_ask_for_gradient))
        self.head.forward = _identity  # type: ignore
        for layer in layers:
            layer.forward = functools.partial(_recomputed, layer.forward)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            del self.head.forward
            for layer in layers:
                del layer.forward

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Return the head's input, ``(samples, longest, hidden)``; call inside ``tapped``."""
        output = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
        hidden: torch.Tensor = output.logits
        return hidden


def _forward_hook(
    tap: Tap, name: str, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
) -> None:
    tap(name, module, args[0], output)


def _ask_for_gradient(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _identity(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def _recomputed(
    forward: Callable[..., Any], hidden: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Run a layer without a record; it runs again, with one, in the backward pass."""
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return forward(hidden, *args, **kwargs)
    return checkpoint(
        functools.partial(forward, **kwargs),
        hidden,
        *args,
        use_reentrant=True,
        preserve_rng_state=False,
    )
