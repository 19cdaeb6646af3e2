"""The inputs of modules, quantized in every way that a candidate reads. Needs torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from qsens.engine.amax import Amax, AmaxBySize, moved
from qsens.engine.candidates import CalibrationSize, Candidates
from qsens.engine.gradient.buffers import BufferLayout, RowRange
from qsens.engine.gradient.error_norms import RowSpan
from qsens.engine.quantizer import quantize

Fail = Callable[[str, Sequence[int], Exception], None]
"""Called with a module's name, the candidates that cannot be computed on it, and why."""


@dataclass(frozen=True)
class QuantizedInputs:
    """The rows of one input, quantized in every way, behind one another.

    Attributes:
        rows: All of them.
        starts: Where those of an input format and calibration size begin.
        counts: How many those are.
    """

    rows: torch.Tensor
    starts: dict[int, int]
    counts: dict[int, int]

    def select(self, row_ranges: Sequence[RowRange]) -> tuple[torch.Tensor, tuple[RowSpan, ...]]:
        """Return the rows that candidates read, for one product, and what is what in it."""
        counts: dict[int, int] = {}
        for row_range in row_ranges:  # two may read the same rows
            start = self.starts[row_range.input]
            counts[start] = max(counts.get(start, 0), self.counts[row_range.input])
        to: dict[int, int] = {}
        pieces: list[slice] = []
        end = 0
        for start, count in sorted(counts.items()):
            to[start] = end
            if pieces and pieces[-1].stop == start:
                pieces[-1] = slice(pieces[-1].start, start + count)
            else:
                pieces.append(slice(start, start + count))
            end += count
        spans = tuple((to[self.starts[s.input]], s.start, s.count) for s in row_ranges)
        return _cat([self.rows[piece] for piece in pieces]), spans


class InputQuantizer:
    """Quantizes the inputs of modules.

    Args:
        candidates: What is computed.
        device: Where the modules are.
        shapes: Shape of a row of each module's input; a convolution's has several dimensions.
        names: Names of each module's inputs; experts have two.
        fail: Told of inputs that cannot be quantized.
        exact: Whether quantized inputs are float32, whatever they are quantized from.
    """

    def __init__(
        self,
        candidates: Candidates,
        device: torch.device,
        shapes: Mapping[str, Sequence[int]],
        names: Mapping[str, Sequence[str]],
        fail: Fail,
        *,
        exact: bool = False,
    ) -> None:
        self.candidates = candidates
        self._device = device
        self._shapes = shapes
        self._names = names
        self._fail = fail
        self._exact = exact
        self._amax: AmaxBySize = {}
        self._ranges: dict[CalibrationSize, dict[str, float]] = {}

    def names(self) -> list[str]:
        """Return the names of all inputs."""
        return [name for names in self._names.values() for name in names]

    def calibrate(self, amax: Mapping[CalibrationSize, Amax]) -> None:
        """Take the calibrated amax, by calibration size, as they are on the CPU."""
        self._amax = {count: moved(own, self._device) for count, own in amax.items()}
        self._ranges = {count: _numbers(own) for count, own in amax.items()}

    def stack(self, name: str, rows: torch.Tensor, layout: BufferLayout) -> QuantizedInputs:
        """Quantize an input in every way that a candidate reads.

        Two calibration sizes with the same amax are one: the rows of the larger count serve both.
        """
        used: dict[int, int] = {}
        readers: Counter[int] = Counter()
        for row_ranges in layout.row_ranges.values():
            for row_range in row_ranges:
                used[row_range.input] = max(used.get(row_range.input, 0), row_range.count)
                readers[row_range.input] += 1
        # What most weight formats read comes first: then each reads rows that lie together.
        order = sorted(used, key=lambda entry: (-readers[entry], entry))
        alike: dict[object, list[int]] = {}
        for entry in order:
            alike.setdefault(self._range(name, entry), []).append(entry)
        counts = {key: max(used[entry] for entry in entries) for key, entries in alike.items()}
        rows = rows.float() if self._exact else rows
        stacked = rows.new_empty(sum(counts.values()), rows.shape[1])
        starts: dict[int, int] = {}
        end = 0
        for key, entries in alike.items():
            self._quantized(name, rows[: counts[key]], entries, stacked[end : end + counts[key]])
            for entry in entries:
                starts[entry] = end
                used[entry] = counts[key]
            end += counts[key]
        return QuantizedInputs(stacked, starts, used)

    def _range(self, name: str, index: int) -> object:
        """Return what an input format does to a module's input, as a key."""
        entry = self.candidates.inputs[index]
        if entry.calibration_size is None:
            return index
        ranges = self._ranges[entry.calibration_size]
        return repr(entry.cfg), *(ranges.get(each) for each in self._names[name])

    def between(self, name: str, entry: int, rows: torch.Tensor) -> torch.Tensor:
        """Quantize what stands between the products of experts, as an input format says."""
        chosen = self.candidates.inputs[entry]
        if chosen.cfg is None:
            return rows
        amax = None
        if chosen.calibration_size is not None:
            amax = self._amax[chosen.calibration_size][self._names[name][-1]]
        return quantize(rows.contiguous(), chosen.cfg, amax)

    def _quantized(
        self, name: str, rows: torch.Tensor, entries: Sequence[int], out: torch.Tensor
    ) -> None:
        """Quantize rows as the first of ``entries`` says, like all of them.

        Where that fails, every candidate of these inputs has failed here: the rows stay as they
        are, for the product's shape alone.
        """
        entry = self.candidates.inputs[entries[0]]
        try:
            if entry.cfg is None:
                out.copy_(rows)
                return
            shape, first = self._shapes[name], self._names[name][0]
            amax = (
                None
                if entry.calibration_size is None
                else self._amax[entry.calibration_size][first]
            )
            quantize(rows.view(-1, *shape), entry.cfg, amax, out=out.view(-1, *shape))
        except Exception as error:
            out.copy_(rows)
            pairs = enumerate(self.candidates.pairs)
            self._fail(name, [candidate for candidate, (_, of) in pairs if of in entries], error)


def _numbers(amax: Amax) -> dict[str, float]:
    if not amax:
        return {}
    return dict(zip(amax, torch.stack(list(amax.values())).tolist(), strict=True))


def _cat(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
