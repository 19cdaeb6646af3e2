"""Calibrated amax on disk: where ``calibrate`` leaves them, and beside a result. Needs torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from safetensors.torch import load_file, save

from qsens.checksums import DIGEST, sealed_tensors
from qsens.engine.amax import Amax, unprefixed
from qsens.grid import CellSpec
from qsens.store import Store
from qsens.writing import write_bytes


def write_calibrated(store: Store, cell: CellSpec, amax: Amax) -> None:
    """Leave the amax that ``cell`` reads where every cell that reads the same finds them."""
    known = {"samples": str(cell.used), DIGEST: cell.calibration}
    write_bytes(store.calibration(cell.calibration), sealed_tensors(save(amax, metadata=known)))


def read_calibrated(
    store: Store, cells: Iterable[CellSpec], sizes: Collection[int]
) -> dict[int, Amax]:
    """Return what ``calibrate`` has left for ``cells``, by calibration size, where it is there."""
    by_size = {cell.used: cell.calibration for cell in cells if cell.used in sizes}
    return {
        size: load_file(store.calibration(digest))
        for size, digest in by_size.items()
        if store.is_calibrated(digest)
    }


def read_scored(store: Store, cells: Iterable[CellSpec], sizes: Collection[int]) -> dict[int, Amax]:
    """Return the amax that ``cells`` were scored under, by calibration size."""
    amax: dict[int, Amax] = {}
    for cell in cells:
        if cell.used in sizes:
            own = unprefixed(load_file(store.state(cell)))
            if own:
                amax.setdefault(cell.used, {}).update(own)  # a cell may lack those of the tower
    return amax
