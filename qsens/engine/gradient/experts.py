"""What candidates do to a mixture, and what each of its experts has to do with it. Needs torch.

The mixture is scored at its output, as one module. Beside that, the same formula is applied to what
a single expert adds to the output, as if the others were not quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from qsens.checkpoint.experts import (
    between,
    contributions,
    expert_biases,
    expert_weights,
    of_expert,
    route,
)
from qsens.engine.activations import ModuleActivations
from qsens.engine.gradient.buffers import BufferLayout
from qsens.engine.gradient.error_norms import RowSpan
from qsens.engine.quantizer import quantize_weight

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

    Attributes:
        pairs: How many pairs of a row and an expert there are.
    """

    def __init__(self, module: nn.Module, rows: ModuleActivations, layout: BufferLayout) -> None:
        self.module = module
        self.first, self.second = expert_weights(module)
        self.biases = expert_biases(module)
        chosen, gates = rows.routing
        self.routing = route(chosen, gates, len(self.first))
        self.pairs = len(self.routing.rows)
        self._rows = rows
        self._own = contributions(module, rows.inputs, self.routing)
        self._shares: dict[int, list[int]] = {}
        samples, device = len(layout.own), rows.inputs.device
        of_row = torch.empty(layout.rows + 1, dtype=torch.int64, device=device)
        of_row[layout.own] = torch.arange(samples, device=device)[:, None]
        lengths = torch.tensor(self.routing.starts, device=device).diff()
        self._expert = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        where = self._expert * samples + of_row[self.routing.rows]
        self.tokens = torch.bincount(where, minlength=len(lengths) * samples).view(-1, samples)

    def change(
        self,
        given: torch.Tensor,
        input_rows: Sequence[InputRows],
        cfg: Mapping[str, object],
        inner: Inner,
        book: Book,
    ) -> torch.Tensor:
        """Return the outputs of the mixture with quantized weights, shaped as ``given``.

        Weights are quantized one expert at a time, so that never two copies of all are held.

        Args:
            given: Its quantized inputs.
            input_rows: What they are, in order.
            cfg: The weights' format.
            inner: Quantizes what stands between the products.
            book: Told of each expert; its spans go to ``pairs`` rows a piece, by expert.
        """
        changed = torch.zeros_like(given, dtype=self._own.dtype)
        for expert in self.routing.busy():
            share = self.routing.share(expert)
            rows, gates = self.routing.rows[share], self.routing.gates[share]
            lengths = [self._share(input_row.count)[expert] for input_row in input_rows]
            where = torch.cat(
                [
                    rows[:length] + input_row.start
                    for input_row, length in zip(input_rows, lengths, strict=True)
                ]
            )
            if not len(where):
                continue
            first = quantize_weight(self.first[expert], cfg)
            entering, leaving = (of_expert(bias, expert) for bias in self.biases)
            hidden = between(self.module, given[where], first, entering)
            parts = zip(input_rows, torch.split(hidden, lengths), strict=True)
            hidden = torch.cat(
                [inner(input_row.input, part) for input_row, part in parts if len(part)]
            )
            added = F.linear(hidden, quantize_weight(self.second[expert], cfg), leaving)
            added *= torch.cat([gates[:length] for length in lengths])
            changed.index_add_(0, where, added)
            spans, at = [], 0
            for index, length in enumerate(lengths):
                if length:
                    spans.append((at, index * self.pairs + share.start, length))
                at += length
            alone = ModuleActivations(
                "tokens", hidden, self._own[share], self._rows.grad_output[:, rows]
            )
            book(added, alone, tuple(spans))
        return changed

    def outputs(self) -> torch.Tensor:
        """Return what the mixture gives as it is, ``(rows, hidden)``."""
        output = torch.zeros_like(self._rows.inputs, dtype=self._own.dtype)
        return output.index_add_(0, self.routing.rows, self._own)

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
        summed = torch.segment_reduce(values, "sum", lengths=self.tokens.flatten(), axis=0)
        return summed.view(*self.tokens.shape, *values.shape[1:])

    def _share(self, count: int) -> list[int]:
        """Return how many of the first ``count`` rows each expert gets."""
        if count not in self._shares:
            inside = self._expert[self.routing.rows < count]
            self._shares[count] = torch.bincount(inside, minlength=len(self.first)).tolist()
        return self._shares[count]
