"""Layers whose weights lie in host memory, and come to the device as they are needed. Needs torch.

Two layers at most are on the device: the one at work, and the one that comes next, which is copied
beside it. What is read is the checkpoint's mapped files where the model's weights still lie in
them; on the way to a GPU a few pinned buffers stand between, filled by several threads, since one
copies about 10 GB a second out of mapped files, and pinning a checkpoint would take half a second
a GiB.

Everything else of a model stays on the device: what is outside of its layers, vectors, and a matrix
that two layers share.
"""

from __future__ import annotations

import ctypes
import functools
import queue
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from qsens.checkpoint.modules import layers_of
from qsens.checkpoint.weight_sizes import SLOTS
from qsens.engine.interleave import Interleaved

T = TypeVar("T")

IN_TURNS = 8
"""Batches that go through a layer before it gives way to the next, where memory is no matter."""

_ALIGNED = 512  # bytes
_THREADS = 8
_STAGING, _BUFFERS = 8 << 20, 32  # bytes of a pinned buffer, and how many there are

_STREAMS: WeakKeyDictionary[nn.Module, LayerStream] = WeakKeyDictionary()


def stream_of(model: nn.Module) -> LayerStream | None:
    """Return what brings a model's layers to its device; none where they are all there."""
    return _STREAMS.get(model)


def device_of(model: nn.Module) -> torch.device:
    """Return where a model runs, wherever its weights lie."""
    stream = stream_of(model)
    return stream.device if stream is not None else next(model.parameters()).device


def run_in_turns(
    model: nn.Module,
    runs: Sequence[Callable[[], T]],
    resumed: Callable[[int], None] = lambda _: None,
) -> list[T]:
    """Run a model several times; where its layers are streamed, through each layer together.

    Args:
        model: The model.
        runs: Each runs it once. They begin in order.
        resumed: Called with the index of a run whenever it begins or goes on.
    """
    stream = stream_of(model)
    if stream is not None:
        return stream.interleaved.run(runs, resumed)
    results = []
    for index, run in enumerate(runs):
        resumed(index)
        results.append(run())
    return results


def layer_bytes(model: nn.Module) -> dict[str, int]:
    """Return the bytes of each layer that would be streamed, by name."""
    return {
        name: sum(_aligned(_size(weight)) for weight in weights)
        for name, weights in _streamed(model).items()
    }


@dataclass(frozen=True)
class _Weight:
    """A weight of a layer.

    Attributes:
        parameter: What the model knows it as.
        host: Where it lies in host memory, contiguous.
        start: Where it stands in a slot, bytes.
    """

    parameter: nn.Parameter
    host: torch.Tensor
    start: int

    def on_device(self, slot: torch.Tensor) -> torch.Tensor:
        """Return the part of a slot that is it."""
        part = slot[self.start : self.start + _size(self.host)]
        return part.view(self.host.dtype).view(self.host.shape)


@dataclass
class _Slot:
    """Memory of the device that a layer's weights are copied to.

    Attributes:
        memory: The bytes.
        layer: Name of the layer that is there, or on its way; none at the start.
        copied: What is to be waited for before it is there; none where it is.
    """

    memory: torch.Tensor
    layer: str | None = None
    copied: _Copy | None = None


class LayerStream:
    """Brings the layers of a model to its device; the model's other weights move there at once.

    Whenever a layer is called, its weights are there; whoever works on them otherwise calls
    :meth:`fetch` first. For as long as the model lives, :func:`stream_of` returns this.

    Args:
        model: The model, in host memory.
        device: Where it is to run.

    Attributes:
        device: The same.
        interleaved: Stops runs before each layer.
        fetched: Bytes that were copied to the device so far.
        weight_bytes: Bytes of the device that weights take, those of two layers included.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.interleaved = Interleaved()
        self.fetched = 0
        layers = _streamed(model)
        self._order = dict(zip(layers, [*layers, None][1:], strict=True))
        self._weights = {name: list(_placed(weights)) for name, weights in layers.items()}
        self._bytes = {
            name: max((each.start + _aligned(_size(each.host)) for each in weights), default=0)
            for name, weights in self._weights.items()
        }
        largest = max(self._bytes.values())
        self.weight_bytes = SLOTS * largest
        held = {id(each.parameter) for weights in self._weights.values() for each in weights}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in held:
                    held.add(id(parameter))
                    parameter.data = parameter.data.to(device)
                    self.weight_bytes += _size(parameter)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
                self.weight_bytes += _size(buffer)
        self._slots = [
            _Slot(torch.empty(largest, dtype=torch.uint8, device=device)) for _ in range(SLOTS)
        ]
        self._copier = _Copier(device) if device.type == "cuda" else None
        self._model = weakref.ref(model)
        self._hooks = [
            model.get_submodule(name).register_forward_pre_hook(
                functools.partial(self._before, name)
            )
            for name in layers
        ]
        _STREAMS[model] = self

    def remove(self) -> None:
        """Leave the layers in host memory, and bring none to the device any more."""
        for hook in self._hooks:
            hook.remove()
        for weights in self._weights.values():
            for weight in weights:
                weight.parameter.data = weight.host
        self._slots.clear()
        model = self._model()
        if model is not None:
            del _STREAMS[model]

    def fetch(self, name: str, ahead: str | None) -> None:
        """Make sure that a layer's weights are on the device.

        Args:
            name: The layer; those before it are done with, whatever of them is still to be run on
                the device.
            ahead: The layer whose weights are copied meanwhile; none where none follows.
        """
        here = next((slot for slot in self._slots if slot.layer == name), None)
        if here is None:
            here = self._slots[0]
            self._load(here, name)
        if here.copied is not None:
            here.copied.wait()
            here.copied = None
            for weight in self._weights[name]:
                weight.parameter.data = weight.on_device(here.memory)
        # The first slot is always the one that is needed last.
        self._slots.sort(key=lambda slot: slot is here)
        if ahead is not None and all(slot.layer != ahead for slot in self._slots):
            self._load(self._slots[0], ahead)

    def _load(self, slot: _Slot, name: str) -> None:
        if slot.copied is not None:
            slot.copied.wait()
        if slot.layer is not None:
            for weight in self._weights[slot.layer]:
                weight.parameter.data = weight.host
        slot.layer = name
        self.fetched += self._bytes[name]
        pairs = [(each.host, each.on_device(slot.memory)) for each in self._weights[name]]
        slot.copied = _Copy(self._copier, pairs)

    def _before(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.interleaved.pause(name)
        self.fetch(name, self._order[name])


class _Copier:
    """Copies from mapped files to a GPU, through pinned buffers, on a stream of its own.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="layers")
        self._free: queue.SimpleQueue[tuple[torch.Tensor, torch.cuda.Event]] = queue.SimpleQueue()
        memory = torch.empty(_STAGING * _BUFFERS, dtype=torch.uint8, pin_memory=True)
        for buffer in torch.split(memory, _STAGING):
            self._free.put((buffer, torch.cuda.Event()))  # type: ignore[no-untyped-call]

    def copy(self, host: torch.Tensor, into: torch.Tensor) -> None:
        """Copy bytes, as many as a buffer has at most; they are on their way when it returns."""
        buffer, used = self._free.get()
        used.synchronize()
        ctypes.memmove(buffer.data_ptr(), host.data_ptr(), len(host))
        with torch.cuda.stream(self.stream):
            into.copy_(buffer[: len(host)], non_blocking=True)
            used.record(self.stream)
        self._free.put((buffer, used))


class _Copy:
    """Weights on their way to the device.

    Args:
        copier: Copies them; where there is none, they are copied at once.
        pairs: From where to where.
    """

    def __init__(
        self, copier: _Copier | None, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        self._copier = copier
        self._started: list[Future[None]] = []
        if copier is None:
            for host, into in pairs:
                into.copy_(host)
            return
        # What was there is read until here by work that the device may not have come to yet.
        copier.stream.wait_stream(torch.cuda.current_stream(copier.device))
        for host, into in pairs:
            parts = zip(_pieces(host), _pieces(into), strict=True)
            self._started += [copier.threads.submit(copier.copy, *part) for part in parts]

    def wait(self) -> None:
        """Let what is run on the device from now on find them there."""
        for started in self._started:
            started.result()
        if self._copier is not None:
            torch.cuda.current_stream(self._copier.device).wait_stream(self._copier.stream)


def _streamed(model: nn.Module) -> Mapping[str, Sequence[nn.Parameter]]:
    """Return the weights of each layer that are streamed: matrices of its own."""
    layers = {name: list(layer.parameters()) for name, layer in layers_of(model).items()}
    inside = {id(module) for layer in layers_of(model).values() for module in layer.modules()}
    owners: Counter[int] = Counter()
    for weights in layers.values():
        owners.update(id(weight) for weight in weights)
    for module in model.modules():
        if id(module) not in inside:
            owners.update(id(weight) for weight in module.parameters(recurse=False))
    return {
        name: [weight for weight in weights if weight.ndim > 1 and owners[id(weight)] == 1]
        for name, weights in layers.items()
    }


def _placed(weights: Sequence[nn.Parameter]) -> Iterator[_Weight]:
    start = 0
    for weight in weights:
        yield _Weight(weight, weight.data.contiguous(), start)
        start += _aligned(_size(weight))


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return a contiguous tensor as bytes, in pieces that fit a buffer."""
    return torch.split(tensor.view(-1).view(torch.uint8), _STAGING)
