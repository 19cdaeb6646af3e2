"""Candidates: what is really computed. Cells that need the same candidate share it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from qsens.config.block_sizes import needs_calibration

Cfg = Mapping[str, Any]


@dataclass(frozen=True)
class SharedCalibration:
    """A calibration on more than the samples of a pass: its amax are given, never found on the way.

    Attributes:
        digest: What tells it from others.
    """

    digest: str


CalibrationSize: TypeAlias = int | SharedCalibration
"""How many samples of a pass amax come from, from the first; or where else they come from."""


@dataclass(frozen=True)
class Request:
    """What one cell asks of a pass.

    Attributes:
        cell: Cell id.
        weight: The weight quantizer's ``cfg``.
        input: The input quantizer's ``cfg``; none leaves inputs alone.
        calibrated: Samples that its calibration uses.
        scored: Samples that its score uses, from the first.
    """

    cell: str
    weight: Cfg
    input: Cfg | None
    calibrated: CalibrationSize
    scored: int


@dataclass(frozen=True)
class Input:
    """An input format with the calibration that it uses.

    Attributes:
        cfg: The quantizer's ``cfg``; none leaves the input alone.
        calibration_size: Samples that its amax come from; none where it needs none.
    """

    cfg: Cfg | None
    calibration_size: CalibrationSize | None


@dataclass(frozen=True)
class Candidates:
    """The distinct candidates of a pass.

    Attributes:
        weights: Distinct weight formats.
        inputs: Distinct input formats and calibration sizes.
        pairs: ``(weight, input)`` indices of each candidate.
        scored: Samples that each candidate is scored on, from the first.
        of_cell: Index of the candidate that each cell reads.
    """

    weights: tuple[Cfg, ...]
    inputs: tuple[Input, ...]
    pairs: tuple[tuple[int, int], ...]
    scored: tuple[int, ...]
    of_cell: Mapping[str, int]

    def calibration_sizes(self) -> list[int]:
        """Return the sample counts that calibration has to stop at, ascending."""
        return sorted(
            {
                entry.calibration_size
                for entry in self.inputs
                if isinstance(entry.calibration_size, int)
            }
        )

    @property
    def shares(self) -> bool:
        """Whether some amax are those of more than the samples of the pass."""
        return any(isinstance(entry.calibration_size, SharedCalibration) for entry in self.inputs)

    def active(self, first_sample: int) -> dict[int, list[tuple[int, int]]]:
        """Return the candidates that score a batch which starts at ``first_sample``.

        Returns:
            By weight format: ``(input, candidate)`` indices.
        """
        by_weight: dict[int, list[tuple[int, int]]] = {}
        for index, (weight, entry) in enumerate(self.pairs):
            if self.scored[index] > first_sample:
                by_weight.setdefault(weight, []).append((entry, index))
        return by_weight


def distinct(requests: Sequence[Request]) -> Candidates:
    """Return the distinct candidates of ``requests``.

    A weight-only or dynamic pair has one candidate whatever its size: nothing is calibrated.
    """
    weights: dict[str, Cfg] = {}
    inputs: dict[tuple[str, CalibrationSize | None], Input] = {}
    pairs: dict[tuple[int, int], int] = {}
    scored: dict[int, int] = {}
    of_cell = {}
    for request in requests:
        weights.setdefault(_key(request.weight), request.weight)
        calibration_size: CalibrationSize | None = None
        if request.input is not None and needs_calibration(request.input):
            calibration_size = request.calibrated
        key = (_key(request.input), calibration_size)
        inputs.setdefault(key, Input(request.input, calibration_size))
        pair = (list(weights).index(_key(request.weight)), list(inputs).index(key))
        index = pairs.setdefault(pair, len(pairs))
        scored[index] = max(scored.get(index, 0), request.scored)
        of_cell[request.cell] = index
    return Candidates(
        weights=tuple(weights.values()),
        inputs=tuple(inputs.values()),
        pairs=tuple(pairs),
        scored=tuple(scored[index] for index in range(len(pairs))),
        of_cell=of_cell,
    )


def _key(cfg: Cfg | None) -> str:
    return json.dumps(_plain(cfg), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if key != "effective_bits"}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
