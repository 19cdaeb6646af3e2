"""What candidates do to a mixture, and what each of its experts has to do with it. Needs torch.

The mixture is scored at its output, as one module. Beside that, the same formula is applied to what
a single expert adds to the output, as if the others were not quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from qsens.checkpoint.experts import contributions, expert_weights, route, summed
from qsens.engine.activations import ModuleActivations
from qsens.engine.gradient.buffers import BufferLayout
from qsens.engine.gradient.error_norms import RowSpan
from qsens.engine.quantizer import quantize_experts

# Values of gradients that are held at once for pairs.
_GRADIENTS = 1 << 27

Inner = Callable[[int, torch.Tensor], torch.Tensor]
"""Quantizes what stands between the products, as an input format and calibration size say."""

Book = Callable[[torch.Tensor, ModuleActivations, tuple[RowSpan, ...]], None]
"""Books what a candidate does to what one expert adds; the changed rows are used up."""


@dataclass(frozen=True)
class InputRows:
    """Rows of a product that an input format and calibration size has made.

    Attributes:
        start: Where they begin.
        count: How many they are: the first rows of the window.
        input: Index of the input format and calibration size.
    """

    start: int
    count: int
    input: int


class Mixture:
    """One mixture over the rows of a window.

    Args:
        module: The experts.
        rows: Their rows.
        layout: Which sample each row belongs to.
        exact: Whether products give float32, whatever they are of.

    Attributes:
        pairs: How many pairs of a row and an expert there are.
    """

    def __init__(
        self, module: nn.Module, rows: ModuleActivations, layout: BufferLayout, *, exact: bool
    ) -> None:
        self.module = module
        self.weights = expert_weights(module)
        chosen, gates = rows.routing
        self.routing = route(chosen, gates, len(self.weights[0]))
        self.pairs = len(self.routing.rows)
        self._rows = rows
        self._grouped = not exact
        self._own = contributions(module, rows.inputs, self.routing, grouped=self._grouped)
        samples, device = len(layout.own), rows.inputs.device
        of_row = torch.empty(layout.rows + 1, dtype=torch.int64, device=device)
        of_row[layout.own] = torch.arange(samples, device=device)[:, None]
        where = self.routing.experts * samples + of_row[self.routing.rows]
        experts = len(self.weights[0])
        self.tokens = torch.bincount(where, minlength=experts * samples).view(-1, samples)

    def change(
        self,
        given: torch.Tensor,
        input_rows: Sequence[InputRows],
        cfg: Mapping[str, object],
        inner: Inner,
        book: Book,
    ) -> torch.Tensor:
        """Return the outputs of the mixture with quantized weights, shaped as ``given``.

        Args:
            given: Its quantized inputs.
            input_rows: What they are, in order.
            cfg: The weights' format.
            inner: Quantizes what stands between the products.
            book: Told what pairs add; its spans go to ``pairs`` rows a piece.
        """
        weights = tuple(quantize_experts(weight, cfg) for weight in self.weights)
        total = len(self._rows.inputs)
        changed = torch.empty_like(given, dtype=self._own.dtype)
        for index, piece in enumerate(input_rows):
            if not piece.count:
                continue
            at = slice(piece.start, piece.start + piece.count)
            # Rows that do not count are any of those that do: what comes of them is left out.
            x = given[at] if piece.count == total else given[at][self._within(piece.count)]
            added = contributions(
                self.module,
                x,
                self.routing,
                weights,
                partial(inner, piece.input),
                grouped=self._grouped,
            )
            changed[at] = summed(added, self.routing, total)[: piece.count]
            for part in self._parts():
                rows = self.routing.rows[part]
                alone = ModuleActivations(
                    "tokens", added[part], self._own[part], self._rows.grad_output[:, rows]
                )
                count = len(rows)
                book(added[part], alone, ((0, index * self.pairs + part.start, count),))
        return changed

    def _within(self, count: int) -> torch.Tensor:
        rows = torch.arange(len(self._rows.inputs), device=self._own.device)
        return rows.clamp_(max=count - 1)

    def _parts(self) -> list[slice]:
        """Cut the pairs so that their gradients are held for so many at once."""
        losses, _, channels = self._rows.grad_output.shape
        step = max(1, _GRADIENTS // (losses * channels))
        return [slice(at, min(at + step, self.pairs)) for at in range(0, self.pairs, step)]

    def outputs(self) -> torch.Tensor:
        """Return what the mixture gives as it is, ``(rows, hidden)``."""
        return summed(self._own, self.routing, len(self._rows.inputs))

    def sums(self, values: torch.Tensor, count: int) -> torch.Tensor:
        """Return sums of values of pairs over the first ``count`` rows.

        Args:
            values: ``(pairs, ...)``, float32.
            count: Rows that count.

        Returns:
            ``(experts, samples, ...)``, float32.
        """
        beyond = self.routing.rows >= count
        values = values.masked_fill(beyond.view(-1, *[1] * (values.ndim - 1)), 0.0)
        # Pairs lie by expert and, within, by row: those of a sample lie together.
        sums = torch.segment_reduce(values, "sum", lengths=self.tokens.flatten(), axis=0)
        return sums.view(*self.tokens.shape, *values.shape[1:])
