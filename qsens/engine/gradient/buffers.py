"""Where the rows of a window lie, and the norms that are kept of them. Needs torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qsens.data.samples import Batch, Unit
from qsens.engine.candidates import Candidates


@dataclass(frozen=True)
class RowRange:
    """Where the rows of one candidate lie. It scores the first rows of a window.

    Attributes:
        candidate: Index of the candidate.
        input: Index of its input format and calibration size.
        start: Where its rows begin.
        count: How many they are.
    """

    candidate: int
    input: int
    start: int
    count: int


@dataclass(frozen=True)
class BufferLayout:
    """Where the rows of a window lie, once for each candidate that scores them.

    Attributes:
        rows: Rows of the window.
        total: Rows over all candidates.
        row_ranges: By weight format: the rows of its candidates.
        own: Where each sample's rows lie in the window, filled up with ``rows``,
            ``(samples, longest)``.
        places: Where each sample's rows lie for each candidate, filled up with ``total``,
            ``(candidates, samples, longest)``.
        order: Index of each sample, in the order of its rows.
    """

    rows: int
    total: int
    row_ranges: Mapping[int, list[RowRange]]
    own: torch.Tensor
    places: torch.Tensor
    order: tuple[int, ...]


def layout_of(
    batches: Sequence[Batch], candidates: Candidates, device: torch.device, unit: Unit
) -> BufferLayout:
    """Lay out the rows of ``batches`` in a tensor of ``unit``."""
    lengths = [batch.lengths(unit) for batch in batches]
    flat = [length for part in lengths for length in part]
    rows = sum(flat)
    starts = list(itertools.accumulate(flat, initial=0))
    own = torch.full((len(flat), max(flat)), rows)
    for sample, (start, length) in enumerate(zip(starts, flat, strict=False)):
        own[sample, :length] = torch.arange(start, start + length)

    row_ranges: dict[int, list[RowRange]] = {}
    total = 0
    for candidate, (weight, entry) in enumerate(candidates.pairs):
        count = sum(
            sum(part)
            for batch, part in zip(batches, lengths, strict=True)
            if batch.first < candidates.scored[candidate]
        )
        if count:
            row_ranges.setdefault(weight, []).append(RowRange(candidate, entry, total, count))
            total += count
    places = torch.full((len(candidates.pairs), *own.shape), total)
    for row_range in itertools.chain.from_iterable(row_ranges.values()):
        places[row_range.candidate] = torch.where(
            own < row_range.count, own + row_range.start, total
        )
    return BufferLayout(
        rows=rows,
        total=total,
        row_ranges=row_ranges,
        own=own.to(device),
        places=places.to(device),
        order=tuple(index for batch in batches for index in batch.samples),
    )


@dataclass(frozen=True)
class SampleStatistics:
    """What a window found for some modules, on its device; float64.

    Attributes:
        names: The modules.
        scores: Sums of squares, ``(modules, candidates, samples)``; none where products are kept.
        products: Sums of products, ``(modules, candidates, samples, draws)``; none without draws.
        errors: ``(modules, candidates, samples)``.
        norms: ``(modules, samples)``.
    """

    names: list[str]
    scores: torch.Tensor | None
    products: torch.Tensor | None
    errors: torch.Tensor
    norms: torch.Tensor


class RowStatistics:
    """The norms of the rows of several modules, laid out by candidate.

    Args:
        modules: How many modules.
        layout: Where the rows of a candidate lie.
        device: Where they are.
        draws: Draws of labels that products are kept of; 0 where norms are.

    Attributes:
        scores: ``|G * dY|`` of each row, ``(modules, total)``, float32; empty where products are.
        products: Sums of ``G * dY`` over channels, ``(draws, modules, total)``, float32.
        errors: ``|dY|`` of each row, shaped as ``scores``.
        norms: ``|Y|`` of each row, ``(modules, rows)``.
    """

    def __init__(
        self, modules: int, layout: BufferLayout, device: torch.device, draws: int = 0
    ) -> None:
        self.layout = layout
        self.scores = torch.zeros(modules, 0 if draws else layout.total, device=device)
        self.products = torch.zeros(draws, modules, layout.total, device=device)
        self.errors = torch.zeros(modules, layout.total, device=device)
        self.norms = torch.zeros(modules, layout.rows, device=device)

    def measured(self, module: int) -> torch.Tensor:
        """Return what is kept of one module's rows: norms, ``(total,)``, or products by draw."""
        return self.products[:, module] if len(self.products) else self.scores[module]

    def sums(self, names: list[str]) -> SampleStatistics:
        """Return the squares of each sample's rows, summed; of products, the rows summed."""
        places = self.layout.places
        drawn = len(self.products) > 0
        return SampleStatistics(
            names,
            scores=None if drawn else _square_sums(self.scores, places),
            products=_sums(self.products, places).movedim(0, -1) if drawn else None,
            errors=_square_sums(self.errors, places),
            norms=_square_sums(self.norms, self.layout.own),
        )


def row_norms(tensor: torch.Tensor) -> torch.Tensor:
    """Return the norm of each row of ``(..., rows, channels)``, float32."""
    norms: torch.Tensor = torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32)
    return norms


def _square_sums(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return sums of squares of ``(modules, rows)`` over the last dimension of ``places``."""
    return _sums(values.square_(), places)


def _sums(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return F.pad(values, (0, 1))[..., places].double().sum(dim=-1)
