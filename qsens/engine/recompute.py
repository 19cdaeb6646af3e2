"""Batches through a model, layer by layer, with the modules' inputs, outputs and gradients.

Needs torch. Weights stay frozen, and the head is left out of the forward pass: what reads it works
on its inputs in chunks, since a vocabulary-sized row a token is most of what a naive pass holds.

The forward pass keeps each layer's input and output and nothing between, unless there is memory to
keep its record as well. The backward pass takes one layer at a time for *all* batches of a window:
a layer without a record runs again, now with one, and its modules hand out their rows. So memory
need not grow with depth, and whoever works on a module's weight does it once a window, however many
batches there are. Modules outside the layers (a vision tower's patch embedding and mergers) keep
their record, and hand out their rows with the layer that their gradient comes from. No code of a
model is repeated here.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from qsens.checkpoint.experts import expert_inputs, is_experts
from qsens.checkpoint.modules import channels_last, is_convolution, layers_of, patches_of
from qsens.checkpoint.structure import traits_of
from qsens.data.samples import Batch
from qsens.engine.activations import (
    ActivationBuffer,
    Call,
    Extent,
    ModuleActivations,
    SavedForward,
    SavedLayer,
)
from qsens.engine.head import Head, head_input, without_head

Tap = Callable[[str, torch.Tensor], None]
"""Called with the name of a module's input and the input itself.

The names are those of :func:`qsens.checkpoint.experts.input_names`.
"""


class RecomputedModel:
    """Runs batches through a model up to, and without, its head.

    Args:
        model: A Hugging Face model with an output embedding that is a linear module.
        modules: The modules to hand out, by name; the head may be among them and is left out.
        tower: Names of those that read pictures.

    Raises:
        UserError: What the model does after its head is more than a linear module.
    """

    def __init__(
        self, model: Any, modules: Mapping[str, nn.Module], tower: Collection[str] = ()
    ) -> None:
        self.model = model
        self.device: torch.device = next(model.parameters()).device
        self.head = Head.of(model)
        self.modules = {
            name: module for name, module in modules.items() if module is not self.head.module
        }
        self._tower = frozenset(tower)
        traits = traits_of(model)
        # Where more than one layer's output reaches a layer, all are recorded as one.
        self._layers = layers_of(model) if traits.chained else {}
        self._in_place = traits.in_place
        self._outside = {
            name
            for name in self.modules
            if not any(name.startswith(f"{layer}.") for layer in self._layers)
        }
        self._idle = {
            layer
            for layer in self._layers
            if not any(name.startswith(f"{layer}.") for name in self.modules)
        }
        self._saved: SavedForward | None = None
        self._batch: Batch | None = None
        self._collector = ActivationBuffer(Extent(), 1)
        self._keeps = False
        self._looking = False
        self._inside = False
        self._runs: Counter[str] = Counter()

    @contextmanager
    def watched(self, tap: Tap) -> Iterator[None]:
        """Call ``tap`` before a module runs, and keep the head out, while the context lasts."""
        handles = [
            module.register_forward_pre_hook(functools.partial(self._tap, tap, name))
            for name, module in self.modules.items()
        ]
        with self._without_head(handles):
            yield

    @contextmanager
    def recorded(self, *, keep: bool = False, tap: Tap | None = None) -> Iterator[None]:
        """Make ``forward`` and ``backward`` work while the context lasts.

        Args:
            keep: Keep every layer's record, so that no layer runs twice.
            tap: Called before a module runs in ``forward``.
        """
        self._keeps = keep
        handles = [
            module.register_forward_hook(functools.partial(self._forward_hook, name))
            for name, module in self.modules.items()
        ]
        if tap is not None:
            handles += [
                module.register_forward_pre_hook(functools.partial(self._tap_hook, tap, name))
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
        try:
            with without_head(self.head.module):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Return the head's input, ``(samples, longest, hidden)``."""
        self._batch = batch
        return head_input(self.model, batch.to(self.device))

    @torch.no_grad()
    def look(self, batch: Batch) -> torch.Tensor:
        """Run a batch forward for the tap alone; return the head's input."""
        self._looking = True
        try:
            return self.hidden(batch)
        finally:
            self._looking = False

    def forward(self, batch: Batch) -> SavedForward:
        """Run a batch forward; keep each layer's input and output."""
        real = batch.real_tokens()
        moved = batch.to(self.device)
        real = None if real is None else real.to(self.device)
        saved = SavedForward(moved, real, Extent.of(batch))
        self._saved = saved
        self._runs.clear()
        with torch.enable_grad():
            saved.hidden = self.hidden(moved)
        self._saved = None
        return saved

    def backward(
        self, saved_forwards: Sequence[SavedForward], grad_output: Sequence[Sequence[torch.Tensor]]
    ) -> Iterator[dict[Call, ModuleActivations]]:
        """Run a window backward, a layer at a time; each layer's modules hand out their rows.

        Args:
            saved_forwards: The batches, all through ``forward``.
            grad_output: Gradients at each batch's ``hidden``, of every loss that goes backward.

        Yields:
            The rows of each run of a module. A module that no gradient reached is not there.
        """
        extents = (saved.extent for saved in saved_forwards)
        starts = list(itertools.accumulate(extents, initial=Extent()))
        self._collector = ActivationBuffer(starts[-1], len(grad_output[0]))
        for saved, start, given in zip(saved_forwards, starts, grad_output, strict=False):
            with self._collector.batch(saved, start):
                for index, grad in enumerate(given):
                    self._collector.loss = index
                    more = index + 1 < len(given)
                    torch.autograd.backward(saved.hidden, grad, retain_graph=more)
                    _hand_on(saved, index)
        yield self._collector.rows
        while any(saved.calls for saved in saved_forwards):
            self._collector = ActivationBuffer(starts[-1], len(grad_output[0]))
            for saved, start in zip(saved_forwards, starts, strict=False):
                with self._collector.batch(saved, start):
                    self._backward_layer(saved, saved.calls.pop())
            yield self._collector.rows

    def _backward_layer(self, saved: SavedForward, call: SavedLayer) -> None:
        if not call.grad_output:
            return
        inner, output = call.record or self._record(call.name, call.hidden, call.args, call.kwargs)
        for index, grad in call.grad_output.items():
            self._collector.loss, inner.grad = index, None
            keep = index + 1 < len(call.grad_output)
            torch.autograd.backward(_first(output), grad, retain_graph=keep)
            if call.hidden.requires_grad:
                torch.autograd.backward(call.hidden, inner.grad, retain_graph=keep)
                _hand_on(saved, index)

    def _record(
        self, name: str, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, Any]:
        """Run a layer with a record of its own; return its input there, and what it gives."""
        inner = hidden.detach().requires_grad_()
        self._inside = True
        outside, self._runs = self._runs, Counter()
        try:
            with torch.enable_grad():
                return inner, self._forwards[name](inner, *args, **kwargs)
        finally:
            self._inside = False
            self._runs = outside

    def _run_layer(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run a layer, its record kept or not; what it gives starts a new one."""
        if args:
            hidden, args = args[0], args[1:]
        else:  # what a layer reads is its first parameter
            hidden = kwargs.pop(next(iter(inspect.signature(self._forwards[name]).parameters)))
        # A tower that is not covered, below all that is: no gradient has to pass it.
        idle = name in self._idle and not hidden.requires_grad
        if self._looking or idle:
            return self._forwards[name](hidden, *args, **kwargs)
        record = None
        if self._keeps:
            record = self._record(name, hidden, args, kwargs)
            result = record[1]
        else:
            with torch.no_grad():
                result = self._forwards[name](hidden, *args, **kwargs)
        output = _first(result).detach().requires_grad_()
        assert self._saved is not None
        self._saved.calls.append(SavedLayer(name, hidden, args, kwargs, output, record))
        return (output, *result[1:]) if isinstance(result, tuple) else output

    def _tap_hook(
        self, tap: Tap, name: str, module: nn.Module, args: tuple[torch.Tensor, ...]
    ) -> None:
        if self._looking or self._saved is not None:  # not when a layer runs again
            self._tap(tap, name, module, args)

    @torch.no_grad()
    def _tap(self, tap: Tap, name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Hand out a module's input; of experts also what stands between their products.

        Of the language model's modules ``(samples, longest, channels)``, of a tower's ``(rows,
        channels)``, however they are called.
        """
        assert self._batch is not None
        if not is_experts(module):
            shape = self._batch.input_ids.shape
            if name in self._tower and not is_convolution(module):
                tap(name, args[0].flatten(0, -2))
            elif args[0].shape[:-1].numel() == shape.numel() and args[0].ndim == 2:
                tap(name, args[0].view(*shape, -1))
            else:
                tap(name, args[0])
            return
        real = self._batch.real_tokens()
        for each, rows in expert_inputs(name, module, args, self._batch.input_ids.shape, real):
            tap(each, rows)

    def _forward_hook(
        self, name: str, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        outside = name in self._outside and self._saved is not None
        if not (self._inside or outside):
            return None
        entered, left = args[0].detach(), output.detach()
        routing = tuple(part.detach() for part in args[1:3]) if is_experts(module) else ()
        convolution = is_convolution(module)
        if convolution:
            entered, left = patches_of(module, entered).flatten(1), channels_last(left)
        call = Call(name, self._runs[name])
        self._runs[name] += 1
        if not output.requires_grad:  # what the weights are frozen for; the first of a tower
            output = output.detach().requires_grad_()
            given = output.clone()  # in-place operations refuse a leaf
        else:
            given = output.clone() if self._in_place else output
        version = left._version

        def keep(grad: torch.Tensor) -> None:
            if left._version != version:
                raise RuntimeError(f"what {name} gives is changed in place after it")
            grad = channels_last(grad) if convolution else grad
            self._collector.take(call, entered, left, grad, routing, in_tower=name in self._tower)

        output.register_hook(keep)  # type: ignore[no-untyped-call]
        return given


def _hand_on(saved: SavedForward, loss: int) -> None:
    """Give the gradients of one loss, just found at the outputs of layers, to these layers."""
    for call in saved.calls:
        grad_output, call.output.grad = call.output.grad, None
        if grad_output is not None:
            before = call.grad_output.get(loss)
            call.grad_output[loss] = grad_output if before is None else before + grad_output


def _first(result: Any) -> torch.Tensor:
    tensor: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return tensor
