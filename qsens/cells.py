"""Cells: the points of a sweep's grid, with all that computing and publishing one asks for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from pydantic import Field

from qsens.config import DatasetConfig, PairConfig
from qsens.config.base import Frozen
from qsens.config.models import Coverage, Modality, Size
from qsens.config.pairs import DEFAULT_GRANULARITY
from qsens.errors import UserError
from qsens.identity import PicturesIdentity, SamplesIdentity, Skipped


class Cell(Frozen):
    """One point of the grid."""

    cell: str
    """Id: ``<pair>[-<granularity>][-all_layers][-image_text][-<data set>]-<size>``, defaults left
    out."""
    pair: str
    """Precision pair."""
    granularity: str
    """Granularity."""
    coverage: Coverage
    """Part of the model that may be quantized."""
    modality: Modality
    """What a sample is."""
    size: Size
    """Calibration size."""
    domain: str | None = None
    """The data set that it is of; none where it is of all of the sweep's, one or several."""
    lane: int = 0
    """The share of the grid that computes this cell, from 0."""
    digest: str
    """SHA-256 of all that changes this cell's numbers."""


class HasFormat(Protocol):
    """What is of a pair at a granularity."""

    @property
    def pair(self) -> str:
        """Precision pair."""

    @property
    def granularity(self) -> str:
        """Granularity."""


def format_name(cell: HasFormat) -> str:
    """Return the name of a cell's format: its pair, and its granularity unless the default."""
    if cell.granularity == DEFAULT_GRANULARITY:
        return cell.pair
    return f"{cell.pair}-{cell.granularity}"


def is_named(cell: HasFormat, names: Collection[str]) -> bool:
    """Return whether pairs, or pairs with their granularity, name a cell; none names all."""
    return not names or cell.pair in names or format_name(cell) in names


def refuse_unknown(names: Collection[str], cells: Sequence[HasFormat], *, where: str) -> None:
    """Refuse a pair that no cell is of.

    Args:
        names: Pairs, or pairs with their granularity.
        cells: The cells.
        where: Whose they are, for the message.

    Raises:
        UserError: A name is that of none.
    """
    formats = dict.fromkeys(format_name(cell) for cell in cells)
    pairs = dict.fromkeys(cell.pair for cell in cells)
    unknown = sorted(set(names) - {*formats, *pairs})
    if unknown:
        raise UserError(
            f"has no pair '{unknown[0]}'",
            where=where,
            remedy=f"Its pairs: {', '.join(formats)}.",
        )


class CalibrationSet(Frozen):
    """The samples of one data set that a cell reads."""

    dataset: DatasetConfig
    """The data set."""
    size: Size
    """Calibration size."""
    modality: Modality
    """What a sample is."""
    samples: SamplesIdentity
    """Its sample file."""
    asked: int
    """Samples that the size asks for."""
    taken: int
    """Samples of its file that are taken, those to skip counted."""
    used: int
    """Samples that calibration uses."""
    scored: int
    """Samples that the score uses, from the first."""
    boundaries: tuple[int, ...]
    """Counts of samples that no batch crosses: where sizes end."""
    skipped: tuple[Skipped, ...]
    """Samples that are left out because of their pictures, or since their records do not fit."""
    calibration: str
    """SHA-256 of all that changes the amax that is calibrated on it alone."""

    @property
    def pictures(self) -> PicturesIdentity | None:
        """Its pictures; none where none are read."""
        return self.samples.pictures if self.modality == "image_text" else None


class CellSpec(Cell):
    """A cell as its plan resolves it: all that its computation and its publication ask of it."""

    precision: PairConfig
    """Its pair, its granularity applied."""
    sets: tuple[CalibrationSet, ...] = Field(min_length=1)
    """What it reads: one data set's samples, or those of all, in the order of the configuration."""
    scheme: str
    """Name of the scheme that it is published as."""
    run_dir: str
    """Name of the run directory that it is published in."""
    calibration: str
    """SHA-256 of all that changes the calibrated amax that it reads."""

    @property
    def used(self) -> int:
        """Samples that calibration uses."""
        return sum(one.used for one in self.sets)

    @property
    def scored(self) -> int:
        """Samples that the score uses."""
        return sum(one.scored for one in self.sets)

    @property
    def needs_calibration(self) -> bool:
        """Whether its inputs take their maximum from calibration."""
        quantizer = self.precision.input_quantizer
        return quantizer is not None and quantizer.needs_calibration()
