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

Where layers are streamed, see :mod:`qsens.engine.layer_stream`, the batches of a window go forward
in turns as well, all through one layer before any goes on: weights cross the bus once each way.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

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
from qsens.engine.layer_stream import IN_TURNS, device_of, run_in_turns, stream_of

T = TypeVar("T")

Tap = Callable[[Batch, str, torch.Tensor], None]
"""Called with a batch, the name of a module's input and the input itself.

The names are those of :func:`qsens.checkpoint.experts.input_names`.
"""


def _silent(done: int) -> None:
    pass


@dataclass
class _Run:
    """A batch on its way forward.

    Attributes:
        batch: The batch, on the model's device.
        saved: Receives what goes backward; none where the tap alone wants to see it.
        calls: How many times each module has run.
    """

    batch: Batch
    saved: SavedForward | None = None
    calls: Counter[str] = field(default_factory=Counter)


class RecomputedModel:
    """Runs batches through a model up to, and without, its head.

    Args:
        model: A Hugging Face model with an output embedding that is a linear module.
        modules: The modules to hand out, by name. The head may be among them: it does not run, and
            what it reads is all that is handed out of it.
        tower: Names of those that read pictures.

    Raises:
        UserError: What the model does after its head is more than a linear module.
    """

    def __init__(
        self, model: Any, modules: Mapping[str, nn.Module], tower: Collection[str] = ()
    ) -> None:
        self.model = model
        self.device = device_of(model)
        self._stream = stream_of(model)
        self.head = Head.of(model)
        self.modules = {
            name: module for name, module in modules.items() if module is not self.head.module
        }
        self._head_name = next((n for n, each in modules.items() if each is self.head.module), None)
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
        self._tap: Tap | None = None
        self._run: _Run | None = None
        self._again: Counter[str] | None = None  # of a layer that runs by itself, its calls
        self._collector = ActivationBuffer(Extent(), 1)
        self._keeps = False

    @contextmanager
    def watched(self, tap: Tap) -> Iterator[None]:
        """Make ``look`` call ``tap`` before a module runs, while the context lasts."""
        with self._hooked([], tap):
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
        self._forwards = {name: layer.forward for name, layer in self._layers.items()}
        for name, layer in self._layers.items():
            layer.forward = functools.partial(self._run_layer, name)
        try:
            with self._hooked(handles, tap):
                yield
        finally:
            for layer in self._layers.values():
                del layer.forward

    @contextmanager
    def _hooked(self, handles: list[RemovableHandle], tap: Tap | None) -> Iterator[None]:
        """Keep the head out and call a tap while the context lasts; then take away all hooks."""
        self._tap = tap
        if tap is not None:
            handles += [
                module.register_forward_pre_hook(functools.partial(self._pre_hook, name))
                for name, module in self.modules.items()
            ]
        try:
            with without_head(self.head.module):
                yield
        finally:
            self._tap = None
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def look(self, batches: Sequence[Batch], progress: Callable[[int], None] = _silent) -> None:
        """Run batches forward for the tap alone.

        Args:
            batches: The batches.
            progress: Called with how many are done.
        """
        together = 1 if self._stream is None else IN_TURNS
        for start in range(0, len(batches), together):
            runs = [_Run(batch.to(self.device)) for batch in batches[start : start + together]]
            self._in_turns(runs, self._hidden)
            progress(start + len(runs))

    def forward(self, batches: Sequence[Batch]) -> list[SavedForward]:
        """Run batches forward; keep each layer's input and output."""
        runs = []
        for batch in batches:
            real = batch.real_tokens()
            moved = batch.to(self.device)
            real = None if real is None else real.to(self.device)
            runs.append(_Run(moved, SavedForward(moved, real, Extent.of(batch))))
        return self._in_turns(runs, self._kept)

    def _in_turns(self, runs: Sequence[_Run], run: Callable[[_Run], T]) -> list[T]:
        """Take runs forward; note which of them is at work."""

        def resumed(index: int) -> None:
            self._run = runs[index]

        try:
            return run_in_turns(
                self.model, [functools.partial(run, each) for each in runs], resumed
            )
        finally:
            self._run = None

    def _hidden(self, run: _Run) -> torch.Tensor:
        hidden = head_input(self.model, run.batch)
        if self._tap is not None and self._head_name is not None:
            self._tap(run.batch, self._head_name, hidden)
        return hidden

    @torch.enable_grad()
    def _kept(self, run: _Run) -> SavedForward:
        assert run.saved is not None
        run.saved.hidden = self._hidden(run)
        return run.saved

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
                    call = saved.calls.pop()
                    if self._stream is not None:
                        before = saved.calls[-1].name if saved.calls else None
                        self._stream.fetch(call.name, before)
                    self._backward_layer(saved, call)
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
        self._again = Counter()
        try:
            with torch.enable_grad():
                return inner, self._forwards[name](inner, *args, **kwargs)
        finally:
            self._again = None

    def _run_layer(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run a layer, its record kept or not; what it gives starts a new one."""
        if args:
            hidden, args = args[0], args[1:]
        else:  # what a layer reads is its first parameter
            hidden = kwargs.pop(next(iter(inspect.signature(self._forwards[name]).parameters)))
        # A tower that is not covered, below all that is: no gradient has to pass it.
        idle = name in self._idle and not hidden.requires_grad
        saved = self._run.saved if self._run is not None else None
        if saved is None or idle:
            return self._forwards[name](hidden, *args, **kwargs)
        record = None
        if self._keeps:
            record = self._record(name, hidden, args, kwargs)
            result = record[1]
        else:
            with torch.no_grad():
                result = self._forwards[name](hidden, *args, **kwargs)
        output = _first(result).detach().requires_grad_()
        saved.calls.append(SavedLayer(name, hidden, args, kwargs, output, record))
        return (output, *result[1:]) if isinstance(result, tuple) else output

    @torch.no_grad()
    def _pre_hook(self, name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Hand out a module's input; of experts also what stands between their products.

        Of the language model's modules ``(samples, longest, channels)``, of a tower's ``(rows,
        channels)``, however they are called.
        """
        tap = self._tap
        if tap is None or self._run is None:  # a layer runs again
            return
        batch = self._run.batch
        shape = batch.input_ids.shape
        if not is_experts(module):
            if name in self._tower and not is_convolution(module):
                tap(batch, name, args[0].flatten(0, -2))
            elif args[0].shape[:-1].numel() == shape.numel() and args[0].ndim == 2:
                tap(batch, name, args[0].view(*shape, -1))
            else:
                tap(batch, name, args[0])
            return
        for each, rows in expert_inputs(name, module, args, shape, batch.real_tokens()):
            tap(batch, each, rows)

    def _forward_hook(
        self, name: str, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        calls = self._again
        if calls is None and name in self._outside and self._run is not None and self._run.saved:
            calls = self._run.calls
        if calls is None:
            return None
        entered, left = args[0].detach(), output.detach()
        routing = tuple(part.detach() for part in args[1:3]) if is_experts(module) else ()
        convolution = is_convolution(module)
        if convolution:
            entered, left = patches_of(module, entered).flatten(1), channels_last(left)
        call = Call(name, calls[name])
        calls[name] += 1
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
