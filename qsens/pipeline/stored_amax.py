"""Calibrated amax on disk: where ``calibrate`` leaves them, and beside a result. Needs torch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from safetensors.torch import load_file, save

from qsens.cells import CellSpec
from qsens.checksums import DIGEST, sealed_tensors
from qsens.engine.amax import Amax, AmaxBySize, unprefixed
from qsens.engine.candidates import CalibrationSize, SharedCalibration
from qsens.store import Store
from qsens.writing import write_bytes


def size_of(cell: CellSpec) -> CalibrationSize:
    """Return what the amax of ``cell`` come from, as a pass over one of its data sets sees it."""
    return cell.used if len(cell.sets) == 1 else SharedCalibration(cell.calibration)


def write_calibrated(store: Store, cell: CellSpec, amax: Amax) -> None:
    """Leave the amax that ``cell`` reads where every cell that reads the same finds them."""
    known = {"samples": str(cell.used), DIGEST: cell.calibration}
    write_bytes(store.calibration(cell.calibration), sealed_tensors(save(amax, metadata=known)))


def read_calibrated(store: Store, digests: Iterable[str]) -> dict[str, Amax]:
    """Return what ``calibrate`` has left under digests, by digest, where it is there."""
    return {
        digest: load_file(store.calibration(digest))
        for digest in dict.fromkeys(digests)
        if store.is_calibrated(digest)
    }


def read_scored(store: Store, cells: Iterable[CellSpec]) -> AmaxBySize:
    """Return the amax that ``cells`` were scored under, by calibration size."""
    amax: AmaxBySize = {}
    for cell in cells:
        own = unprefixed(load_file(store.state(cell)))
        if own:
            amax.setdefault(size_of(cell), {}).update(own)  # a cell may lack those of the tower
    return amax


def largest(parts: Iterable[Amax]) -> Amax:
    """Return the amax over all samples that each of ``parts`` is over some of."""
    united: Amax = {}
    for part in parts:
        for name, value in part.items():
            united[name] = torch.maximum(united[name], value) if name in united else value
    return united
