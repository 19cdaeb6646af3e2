"""Batches through a model, layer by layer, with the modules' inputs, outputs and gradients.

Needs torch. Weights stay frozen, and the head is left out of the forward pass: what reads it works
on its inputs in chunks, since a vocabulary-sized row a token is most of what a naive pass holds.

The forward pass keeps each layer's input and output and nothing between. The backward pass takes
one layer at a time for *all* batches of a wave: the layer runs again, now with a record, and its
modules hand out their rows. So memory does not grow with depth, and whoever works on a module's
weight does it once a wave, however many batches there are. No code of a model is repeated here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from qsens.engine.samples import Batch
from qsens.errors import UserError

# Rows of the head's output that are held at once in more than the model's own data type.
HEAD_ROWS = 512

Tap = Callable[[str, torch.Tensor], None]
"""Called with a module's name and its input."""


@dataclass
class Rows:
    """The real tokens of one module over a batch.

    Attributes:
        inputs: ``(tokens, in)``; the very same object where modules read one input.
        outputs: ``(tokens, out)``.
        slopes: Gradient of the samples' summed losses at the output, ``(tokens, out)``.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    slopes: torch.Tensor


@dataclass
class _Call:
    """One run of a layer: what went in, what came out."""

    name: str
    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor


@dataclass
class Flight:
    """A batch between its forward and its backward pass.

    Attributes:
        batch: The batch, on the model's device.
        hidden: The head's input, ``(samples, longest, hidden)``.
        real: Indices of the real tokens, padding counted; none where nothing is padded.
    """

    batch: Batch
    real: torch.Tensor | None
    hidden: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    calls: list[_Call] = field(default_factory=list)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the real tokens of ``(samples, longest, channels)``, ``(tokens, channels)``."""
        flat = tensor.flatten(0, -2)
        return flat if self.real is None else flat[self.real]


class ModelPass:
    """Runs batches through a model up to, and without, its head.

    Args:
        model: A Hugging Face model with an output embedding that is a linear module.
        modules: The modules to hand out, by name; the head may be among them and is left out.

    Raises:
        UserError: What the model does after its head is more than a linear module.
    """

    def __init__(self, model: Any, modules: Mapping[str, nn.Module]) -> None:
        self.model = model
        self.device: torch.device = next(model.parameters()).device
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
        self._layers = layers_of(model)
        self._flight: Flight | None = None
        self._found: dict[str, Rows] = {}
        self._inputs: dict[int, torch.Tensor] = {}

    @contextmanager
    def watched(self, tap: Tap) -> Iterator[None]:
        """Call ``tap`` before a module runs, and keep the head out, while the context lasts."""
        handles = [
            module.register_forward_pre_hook(functools.partial(_pre_hook, tap, name))
            for name, module in self.modules.items()
        ]
        with self._without_head(handles):
            yield

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Make ``forward`` and ``backward`` work while the context lasts."""
        handles = [
            module.register_forward_hook(functools.partial(self._forward_hook, name))
            for name, module in self.modules.items()
        ]
        self._forwards = {name: layer.forward for name, layer in self._layers.items()}
        for name, layer in self._layers.items():
            layer.forward = functools.partial(self._run_layer, name)
        try:
            with self._without_head(handles):
                yield
        finally:
            for layer in self._layers.values():
                del layer.forward

    @contextmanager
    def _without_head(self, handles: Sequence[RemovableHandle]) -> Iterator[None]:
        """Keep the head out while the context lasts; then take the hooks away as well."""
        self.head.forward = _identity  # type: ignore
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            del self.head.forward

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Return the head's input, ``(samples, longest, hidden)``; ``batch`` on the device."""
        output = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
        hidden: torch.Tensor = output.logits
        return hidden

    def forward(self, batch: Batch) -> Flight:
        """Run a batch forward; keep each layer's input and output."""
        real = batch.real_tokens()
        moved = batch.to(self.device)
        real = None if real is None else real.to(self.device)
        flight = Flight(moved, real)
        self._flight = flight
        with torch.enable_grad():
            flight.hidden = self.hidden(moved)
        self._flight = None
        return flight

    def backward(
        self, flights: Sequence[Flight], slopes: Sequence[torch.Tensor]
    ) -> Iterator[dict[str, list[Rows]]]:
        """Run a wave backward, a layer at a time; each layer's modules hand out their rows.

        Args:
            flights: The batches, all through ``forward``.
            slopes: Gradient at each batch's ``hidden``.

        Yields:
            By module: its rows in each batch, in order. A module that no gradient reached is not
            there.
        """
        for flight, slope in zip(flights, slopes, strict=True):
            torch.autograd.backward(flight.hidden, slope)
        while any(flight.calls for flight in flights):
            collected: dict[str, list[Rows]] = {}
            for flight in flights:
                for name, rows in self._backward_layer(flight, flight.calls.pop()).items():
                    collected.setdefault(name, []).append(rows)
            yield collected

    def _backward_layer(self, flight: Flight, call: _Call) -> dict[str, Rows]:
        slope, call.output.grad = call.output.grad, None
        if slope is None:
            return {}
        self._flight, self._found, self._inputs = flight, {}, {}
        inner = call.hidden.detach().requires_grad_()
        with torch.enable_grad():
            output = _first(self._forwards[call.name](inner, *call.args, **call.kwargs))
        torch.autograd.backward(output, slope)
        if call.hidden.requires_grad:
            torch.autograd.backward(call.hidden, inner.grad)
        self._flight = None
        return self._found

    def _run_layer(self, name: str, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run a layer without a record; what it gives starts a new one."""
        with torch.no_grad():
            result = self._forwards[name](hidden, *args, **kwargs)
        output = _first(result).detach().requires_grad_()
        assert self._flight is not None
        self._flight.calls.append(_Call(name, hidden, args, kwargs, output))
        return (output, *result[1:]) if isinstance(result, tuple) else output

    def _forward_hook(
        self, name: str, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        if not output.requires_grad or self._flight is None:
            return
        flight, found, inputs = self._flight, self._found, self._inputs
        entered, left = args[0].detach(), output.detach()

        def keep(slope: torch.Tensor) -> None:
            # q, k and v read one tensor: its rows are taken once and are one object.
            where = entered.data_ptr()
            if where not in inputs:
                inputs[where] = flight.rows(entered)
            found[name] = Rows(inputs[where], flight.rows(left), flight.rows(slope))

        output.register_hook(keep)  # type: ignore[no-untyped-call]


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that transformers can recompute, by name: decoder and vision layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer)
    }


def _first(result: Any) -> torch.Tensor:
    tensor: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return tensor


def _pre_hook(tap: Tap, name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    tap(name, args[0])


def _identity(hidden: torch.Tensor) -> torch.Tensor:
    return hidden
