"""Cells: the points of a sweep's grid, with all that computing and publishing one asks for."""

from __future__ import annotations

from pydantic import Field

from qsens.config import DatasetConfig, PairConfig
from qsens.config.base import Frozen
from qsens.config.models import Coverage, Modality, Size
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
