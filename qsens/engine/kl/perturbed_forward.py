"""Copies of a batch that go through a model at once, each with one group quantized. Needs torch.

The first copy is left as it is. The others are what it is up to the layer where their own group
lies: up to there they are not computed but taken from it, so copies join on the way, and one run
serves groups of many layers. What lies before the first of them is not run at all, but taken from
a run of the batch alone. No code of a model is repeated here.

All copies go through the same kernels at once, and within :func:`qsens.engine.float32.in_float32`:
rounded to bfloat16, activations would differ by more than a harmless group changes them.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qsens.checkpoint.experts import expert_weights, input_names, outputs
from qsens.checkpoint.groups import Group
from qsens.checkpoint.modules import apply, is_linear, layers_of, weight_of
from qsens.checkpoint.structure import traits_of
from qsens.data.samples import Batch
from qsens.engine.amax import Amax, moved
from qsens.engine.candidates import CalibrationSize, Candidates
from qsens.engine.fused_weights import FusedWeights
from qsens.engine.head import Head, head_input, without_head
from qsens.engine.layer_stream import device_of
from qsens.engine.quantizer import quantize, quantize_experts, quantize_weight
from qsens.engine.scores import Failures


@dataclass(frozen=True)
class Perturbation:
    """What is different in a copy.

    Attributes:
        group: Index of the group that is quantized.
        candidate: Index of the candidate that says how.
    """

    group: int
    candidate: int


class PerturbedForward:
    """Runs a batch, then copies of it that are changed.

    Args:
        model: A Hugging Face model with an output embedding that is a linear module.
        groups: The groups that copies change.
        candidates: How.
        amax: Calibrated amax of every module's input, by calibration size, on the CPU.

    Attributes:
        head: The head; it is left out of every run.
        head_group: Index of the group that is the head alone; none where no group is.
        ran: Names of the modules that ran.
        failures: Changes that cannot be made; their copies stay as they are.

    Raises:
        UserError: What the model does after its head is more than a linear module.
    """

    def __init__(
        self,
        model: Any,
        groups: Sequence[Group],
        candidates: Candidates,
        amax: Mapping[CalibrationSize, Amax],
    ) -> None:
        self.model = model
        self.groups = groups
        self.candidates = candidates
        self.device = device_of(model)
        self.head = Head.of(model)
        self.ran: set[str] = set()
        self.failures = Failures()
        self._layers = layers_of(model) if traits_of(model).chained else {}
        self._modules = {
            name: model.get_submodule(name) for group in groups for name in group.members
        }
        self.head_group = next(
            (
                index
                for index, group in enumerate(groups)
                if [self._modules[name] for name in group.members] == [self.head.module]
            ),
            None,
        )
        self._group_of = {name: at for at, group in enumerate(groups) for name in group.members}
        self._fused = FusedWeights(model, groups)
        self._amax = {count: moved(own, self.device) for count, own in amax.items()}
        # Of the run of the batch alone: of each layer, in order, what it gave and the shapes of
        # what it was given; and how many layers ran before each module, or the layer that it is in.
        self._gave: dict[str, Any] = {}
        self._shapes: dict[str, Any] = {}
        self._before: dict[str, int] = {}
        self._batch: Batch | None = None
        # Of a run of copies: where each change begins, by layers before it.
        self._changes: Sequence[Perturbation] = ()
        self._starts: list[int] = []
        self._live = 0

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Make ``alone`` and ``run`` work while the context lasts."""
        head = self.head.module
        inner = {name: module for name, module in self._modules.items() if module is not head}
        runs = [(name, module, self._run_layer) for name, module in self._layers.items()]
        runs += [(name, module, self._run_module) for name, module in inner.items()]
        for name, module, run in runs:
            module.forward = functools.partial(run, name, module.forward)
        try:
            with without_head(self.head.module):
                yield
        finally:
            for _, module, _ in runs:
                del module.forward
            self._gave, self._batch = {}, None

    def alone(self, batch: Batch) -> torch.Tensor:
        """Run a batch as it is; return the head's input, ``(samples, longest, hidden)``."""
        self._batch = batch.to(self.device)
        self._gave, self._shapes, self._before, self._changes = {}, {}, {}, ()
        return head_input(self.model, self._batch)

    def in_order(self, perturbations: Sequence[Perturbation]) -> list[Perturbation]:
        """Return the changes whose groups have run, in the order in which they ran.

        Those of the head alone are left out.
        """
        starts = {perturbation: self._start(perturbation) for perturbation in perturbations}
        ran = [perturbation for perturbation in perturbations if starts[perturbation] is not None]
        return sorted(ran, key=lambda perturbation: (starts[perturbation], perturbation.group))

    def run(self, perturbations: Sequence[Perturbation]) -> torch.Tensor:
        """Run copies of the batch that ran alone.

        Args:
            perturbations: What is different in each copy but the first; at least one, in the order
                of :meth:`in_order`.

        Returns:
            The head's input, ``(1 + perturbations, samples, longest, hidden)``.
        """
        assert self._batch is not None
        self._changes = perturbations
        self._starts = [self._start(perturbation) or 0 for perturbation in perturbations]
        self._live = 1 + len(perturbations)
        hidden = head_input(self.model, self._batch.repeat(self._live))
        return hidden.view(self._live, -1, *hidden.shape[1:])

    def heads(
        self, perturbations: Sequence[Perturbation]
    ) -> Iterator[tuple[list[Perturbation], torch.Tensor]]:
        """Quantize the head's weight in each format that changes of it have.

        Yields:
            The changes, and the weight that they share. One that fails is left out, and noted.
        """
        assert self.head_group is not None
        yield from self._weights(self.groups[self.head_group].members[0], perturbations)

    def given(self, name: str, perturbation: Perturbation, x: torch.Tensor) -> torch.Tensor | None:
        """Return an input as it is under a change; none where that fails.

        Args:
            name: Name of the input, which is that of its module.
            perturbation: The change.
            x: The input.
        """
        try:
            return self._quantized(name, perturbation, x)
        except Exception as error:
            self._fail([perturbation], error)
            return None

    def _start(self, perturbation: Perturbation) -> int | None:
        """Return how many layers ran before a group; none where nothing of it ran."""
        members = self.groups[perturbation.group].members
        return min((self._before[name] for name in members if name in self._before), default=None)

    def _run_layer(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._changes:
            output = forward(*args, **kwargs)
            self._shapes[name] = len(self._gave), _shapes((args, kwargs))
            self._gave[name] = output
            return output
        at, shapes = self._shapes[name]
        total = 1 + len(self._changes)
        live = 1 + bisect_right(self._starts, at)
        # Pictures may be one sequence, copies one behind the other along it.
        along = _longer((args, kwargs), shapes)
        if live == 1:
            return _each(self._gave[name], lambda kept: _repeat(kept, total, along))
        if live < total:
            try:
                args, kwargs = _first((args, kwargs), shapes, live, total)
            except _Unlike:
                live = total
        self._live = live
        output = forward(*args, **kwargs)
        self._live = total
        if live == total:
            return output
        # A copy that is not changed yet is what the first one is.
        return _each(
            output,
            lambda part: torch.cat(
                [
                    part,
                    _repeat(part.narrow(along, 0, part.shape[along] // live), total - live, along),
                ],
                along,
            ),
        )

    def _run_module(
        self,
        name: str,
        forward: Callable[..., torch.Tensor],
        x: torch.Tensor,
        *routing: torch.Tensor,
    ) -> torch.Tensor:
        output = forward(x, *routing)
        if not self._changes:
            self._before.setdefault(name, len(self._gave))
            self.ran.add(name)
            return output
        group = self._group_of[name]
        places = {
            perturbation: at
            for at, perturbation in enumerate(self._changes, 1)
            if perturbation.group == group
        }
        if is_linear(self._modules[name]) and not routing:
            # A tower may read all pictures as one sequence: copies are rows of it.
            x, written = x.flatten(0, -2), output.view(-1, output.shape[-1])
        else:
            written = output
        rows = len(x) // self._live
        if routing:
            for perturbation, place in places.items():
                at = slice(place * rows, (place + 1) * rows)
                self._run_experts(
                    name, perturbation, [part[at] for part in (x, *routing)], written[at]
                )
            return output
        for perturbations, weight in self._weights(name, list(places)):
            for perturbation in perturbations:
                at = slice(places[perturbation] * rows, (places[perturbation] + 1) * rows)
                given = self.given(name, perturbation, x[at])
                if given is not None:
                    written[at] = apply(self._modules[name], given, weight)
        return output

    def _run_experts(
        self,
        name: str,
        perturbation: Perturbation,
        args: Sequence[torch.Tensor],
        output: torch.Tensor,
    ) -> None:
        """Write what experts give under a change; all of a layer's weights are held for it."""
        module = self._modules[name]
        first, second = input_names(name, module)
        cfg = self.candidates.weights[self.candidates.pairs[perturbation.candidate][0]]
        x, chosen, gates = args
        try:
            weights = tuple(quantize_experts(weight, cfg) for weight in expert_weights(module))
            read = self._quantized(first, perturbation, x)
            inner = functools.partial(self._quantized, second, perturbation)
            output.copy_(outputs(module, read, chosen, gates, weights, inner))
        except Exception as error:
            self._fail([perturbation], error)

    def _quantized(self, name: str, perturbation: Perturbation, x: torch.Tensor) -> torch.Tensor:
        chosen = self.candidates.inputs[self.candidates.pairs[perturbation.candidate][1]]
        if chosen.cfg is None:
            return x
        amax = (
            None if chosen.calibration_size is None else self._amax[chosen.calibration_size][name]
        )
        return quantize(x.contiguous(), chosen.cfg, amax)

    def _weights(
        self, name: str, perturbations: Sequence[Perturbation]
    ) -> Iterator[tuple[list[Perturbation], torch.Tensor]]:
        formats: dict[int, list[Perturbation]] = {}
        for perturbation in perturbations:
            formats.setdefault(self.candidates.pairs[perturbation.candidate][0], []).append(
                perturbation
            )
        for index, alike in formats.items():
            try:
                weight, cfg = weight_of(self._modules[name]), self.candidates.weights[index]
                weight = quantize_weight(weight, cfg, self._fused.amax(name, cfg))
            except Exception as error:
                self._fail(alike, error)
                continue
            yield alike, weight

    def _fail(self, perturbations: Sequence[Perturbation], error: Exception) -> None:
        for perturbation in perturbations:
            name = self.groups[perturbation.group].name
            self.failures.add(name, perturbation.group, [perturbation.candidate], error)


class _Unlike(Exception):
    """Something whose part for the first copies is not known."""


def _shapes(value: Any) -> Any:
    """Return the shapes of all tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.shape
    if isinstance(value, Mapping):
        return {key: _shapes(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_shapes(part) for part in value]
    return None


def _first(value: Any, shapes: Any, live: int, total: int) -> Any:
    """Return the part of a layer's arguments that is that of the first ``live`` copies.

    Args:
        value: The arguments for ``total`` copies.
        shapes: The shapes of those for one.
        live: Copies.
        total: Copies.

    Raises:
        _Unlike: A tensor is neither the same for any number of copies, nor has one copy behind the
            other in one dimension, nor holds where sequences end, one copy behind the other.
    """
    if isinstance(value, Mapping):
        return {key: _first(part, shapes[key], live, total) for key, part in value.items()}
    if isinstance(value, tuple | list):
        parts = zip(value, shapes, strict=True)
        return type(value)([_first(part, shape, live, total) for part, shape in parts])
    if not isinstance(value, torch.Tensor) or value.shape == shapes:
        return value
    if shapes is None or value.ndim != len(shapes):
        raise _Unlike
    unlike = [at for at in range(value.ndim) if value.shape[at] != shapes[at]]
    at, one = unlike[0], shapes[unlike[0]]
    if len(unlike) == 1 and value.shape[at] == total * one:
        return value.narrow(at, 0, live * one)
    if value.ndim == 1 and len(value) == total * (one - 1) + 1:
        return value[: live * (one - 1) + 1]
    raise _Unlike


def _each(output: Any, perturbation: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return what a layer gave with all tensors changed."""
    if isinstance(output, tuple):
        return tuple(_each(part, perturbation) for part in output)
    return perturbation(output) if isinstance(output, torch.Tensor) else output


def _longer(value: Any, shapes: Any) -> int:
    """Return the dimension along which copies of a layer's first tensor follow each other."""
    if isinstance(value, Mapping):
        value, shapes = list(value.values()), list(shapes.values())
    if isinstance(value, tuple | list):
        for part, shape in zip(value, shapes, strict=True):
            if shape:
                return _longer(part, shape)
    if isinstance(value, torch.Tensor):
        unlike = (at for at, one in enumerate(shapes) if value.shape[at] != one)
        return next(unlike, 0)
    return 0


def _repeat(tensor: torch.Tensor, forwards: int, along: int = 0) -> torch.Tensor:
    copies = [1] * tensor.ndim
    copies[along] = forwards
    return tensor.repeat(copies)
