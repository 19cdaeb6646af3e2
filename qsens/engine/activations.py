"""Rows of modules over a window: what they read, gave, and got as gradients. Needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch

from qsens.data.samples import Batch, Unit


@dataclass(frozen=True)
class Call:
    """A run of a module within a layer, or outside the layers within the model.

    Attributes:
        name: Name of the module.
        index: How many times it had run before.
    """

    name: str
    index: int


@dataclass(frozen=True)
class Extent:
    """How much there is of a window, or of what is before a batch in it.

    Attributes:
        tokens: Real tokens.
        patches: Patches of pictures.
        shown: Tokens that stand for pictures.
    """

    tokens: int = 0
    patches: int = 0
    shown: int = 0

    @classmethod
    def of(cls, batch: Batch) -> Extent:
        """Return how much a batch is."""
        return cls(sum(batch.lengths("tokens")), sum(batch.patches), sum(batch.shown))

    def __add__(self, other: Extent) -> Extent:
        """Return both, one behind the other."""
        return Extent(
            self.tokens + other.tokens, self.patches + other.patches, self.shown + other.shown
        )

    def rows(self, unit: Unit) -> int:
        """Return how many rows that is in a tensor of ``unit``."""
        if isinstance(unit, Fraction):
            return int(self.patches * unit)
        return self.shown if unit == "shown" else self.tokens


@dataclass
class ModuleActivations:
    """The rows of one module over a window, in the order of its batches: its real tokens, or those
    of the pictures.

    Attributes:
        unit: What the rows are.
        inputs: ``(tokens, in)``; the very same object where modules read one input.
        outputs: ``(tokens, out)``.
        grad_output: Gradients at the output, of every loss that goes backward,
            ``(losses, tokens, out)``.
        routing: Of experts alone: the experts of each token and the router's weights of them,
            both ``(tokens, experts of a token)``.
    """

    unit: Unit
    inputs: torch.Tensor
    outputs: torch.Tensor
    grad_output: torch.Tensor
    routing: tuple[torch.Tensor, ...] = ()


@dataclass
class SavedLayer:
    """One run of a layer: what went in, what came out, and its record where one was kept."""

    name: str
    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor
    record: tuple[torch.Tensor, torch.Tensor] | None
    grad_output: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class SavedForward:
    """A batch between its forward and its backward pass.

    Attributes:
        batch: The batch, on the model's device.
        real: Indices of the real tokens, padding counted; none where nothing is padded.
        extent: How much it is.
        hidden: The head's input, ``(samples, longest, hidden)``.
    """

    batch: Batch
    real: torch.Tensor | None
    extent: Extent
    hidden: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    calls: list[SavedLayer] = field(default_factory=list)

    def rows(self, tensor: torch.Tensor, unit: Unit, into: torch.Tensor) -> None:
        """Write the rows of a tensor whose last dimension are channels."""
        flat = tensor.flatten(0, -2)
        if self.real is None or unit != "tokens":
            into.copy_(flat)
        else:
            torch.index_select(flat, 0, self.real, out=into)

    def unit(self, tensor: torch.Tensor, *, in_tower: bool) -> Unit:
        """Return what the rows of a module's output are.

        Args:
            tensor: The output, its last dimension channels.
            in_tower: Whether the module reads pictures.

        Raises:
            RuntimeError: They are neither tokens nor those of the pictures.
        """
        count = tensor.shape[:-1].numel()
        if not in_tower and count == self.batch.input_ids.numel():
            return "tokens"
        if in_tower and count == self.extent.shown:
            return "shown"
        if in_tower and self.extent.patches:
            unit = Fraction(count, self.extent.patches)
            if all((patches * unit).denominator == 1 for patches in self.batch.patches):
                return unit
        raise RuntimeError(f"{count} rows that belong to no sample")


class ActivationBuffer:
    """Gathers the rows of a layer's modules, batch after batch.

    Args:
        total: How much the window is.
        losses: Losses that go backward, one after the other.

    Attributes:
        loss: Index of the loss that goes backward now.
    """

    def __init__(self, total: Extent, losses: int) -> None:
        self.total = total
        self.losses = losses
        self.loss = 0
        self.rows: dict[Call, ModuleActivations] = {}

    @contextmanager
    def batch(self, saved: SavedForward, before: Extent) -> Iterator[None]:
        """Take the rows of ``saved`` while the context lasts; others are ``before`` them."""
        self._saved = saved
        self._before = before
        self._by_address: dict[int, torch.Tensor] = {}
        self._filled: set[int] = set()
        self._missing = set(self.rows)
        yield
        for call in self._missing:  # no gradient of this batch reached it
            rows = self.rows[call]
            for tensor in (rows.inputs, rows.outputs, *rows.grad_output, *rows.routing):
                tensor[self._at(rows.unit)] = 0

    def take(
        self,
        call: Call,
        inputs: torch.Tensor,
        outputs: torch.Tensor,
        grad_output: torch.Tensor,
        routing: Sequence[torch.Tensor] = (),
        *,
        in_tower: bool = False,
    ) -> None:
        """Take what a module read, gave, and got in a call; of experts their routing too."""
        rows = self.rows.get(call)
        if rows is None:
            # q, k and v read one tensor: its rows are taken once and are one object.
            shared = self._by_address.get(inputs.data_ptr())
            unit = self._saved.unit(outputs, in_tower=in_tower)
            rows = ModuleActivations(
                unit,
                self._new(unit, inputs) if shared is None else shared,
                self._new(unit, outputs),
                self._new(unit, grad_output, self.losses),
                tuple(self._new(unit, tensor) for tensor in routing),
            )
            self.rows[call] = rows
            self._missing.add(call)
            self._by_address[inputs.data_ptr()] = rows.inputs
        elif in_tower and self._saved.extent.rows(rows.unit) != outputs.shape[:-1].numel():
            raise RuntimeError("rows of pictures differ from batch to batch")
        at = self._at(rows.unit)
        if call in self._missing:
            self._missing.remove(call)
            if id(rows.inputs) not in self._filled:
                self._filled.add(id(rows.inputs))
                self._saved.rows(inputs, rows.unit, rows.inputs[at])
            self._saved.rows(outputs, rows.unit, rows.outputs[at])
            for tensor, into in zip(routing, rows.routing, strict=True):
                self._saved.rows(tensor, rows.unit, into[at])
        self._saved.rows(grad_output, rows.unit, rows.grad_output[self.loss, at])

    def _at(self, unit: Unit) -> slice:
        return slice(self._before.rows(unit), (self._before + self._saved.extent).rows(unit))

    def _new(self, unit: Unit, like: torch.Tensor, *more: int) -> torch.Tensor:
        # Earlier batches that did not reach the module count as zeros.
        make = like.new_zeros if self._before.rows(unit) else like.new_empty
        return make(*more, self.total.rows(unit), like.shape[-1])
