"""Cells, their identity, and the plan: a resolved, validated, hashed description of a sweep."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from qsens.checksums import digest_of as digest_of
from qsens.config import PairConfig, Roots, SweepConfig
from qsens.config.models import Coverage, Frozen, Modality, Size
from qsens.config.pairs import DEFAULT_GRANULARITY
from qsens.documents import read_document
from qsens.errors import Damaged, UserError
from qsens.identity import CALIBRATION_VERSION, PatternsIdentity, cell_identity

PLAN_VERSION = 2
# The time in it is when the plan was made, in UTC.
SWEEP_ID = re.compile(r"(\d{8}T\d{9})Z-[0-9a-f]{8}")


class CheckpointIdentity(Frozen):
    """What a checkpoint is, read from its files without loading it."""

    path: Path
    """Local directory."""
    digest: str
    """SHA-256 over configuration and weight files, and code that runs, by path and content."""
    tokenizer_digest: str
    """SHA-256 over tokenizer files, by content."""
    architecture: str
    """Class name from ``config.json``."""
    weight_bytes: int
    """Bytes of all weight files."""
    tied_head: bool | None = None
    """Whether the head is loaded as the embedding's weight; none where an older plan does not
    say."""
    processor_digest: str | None = None
    """SHA-256 over the files of its image processor, by content; none where it has none."""
    notices: list[str] = []
    """What a reader should know about its files: what lies beside them, what does not run."""


class Skipped(Frozen):
    """A sample that is left out because of its picture."""

    sample: int
    """Its number in the file, from 1."""
    image: str
    """Path of the picture, as the file has it."""
    reason: str
    """What is wrong with it."""


class PicturesIdentity(Frozen):
    """What the pictures of a sample file are, as many as its size may use."""

    digest: str
    """SHA-256 over the contents of the pictures, in order, with what is wrong with the others."""
    skipped: list[Skipped] = []
    """Samples that are left out, in order."""

    def valid(self, count: int) -> int:
        """Return how many of the first ``count`` samples are not left out."""
        return count - sum(entry.sample <= count for entry in self.skipped)


class SamplesIdentity(Frozen):
    """What a sample file is."""

    path: Path
    """The file."""
    digest: str
    """SHA-256 of its content."""
    available: int
    """Samples (non-empty lines) in it."""
    pictures: PicturesIdentity | None = None
    """Its pictures; none where no cell reads them."""


class Cell(Frozen):
    """One point of the grid."""

    cell: str
    """Id: ``<pair>[-<granularity>][-all_layers][-image_text]-<size>``, defaults left out."""
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
    lane: int = 0
    """The share of the grid that computes this cell, from 0."""
    digest: str
    """SHA-256 of all that changes this cell's numbers."""


class Plan(Frozen):
    """A sweep as it will run; written to ``plan.json``."""

    schema_version: int = PLAN_VERSION
    """Version of this schema."""
    plan_id: str
    """First 12 hex digits of ``digest``."""
    sweep_id: str
    """``<UTC time>-<first 8 hex digits of the digest>``: one for each run."""
    digest: str
    """SHA-256 over the cells' digests and where they are published."""
    created: str
    """When the plan was made, ISO 8601, UTC."""
    root: Path
    """``QSENS_ROOT`` when the plan was made."""
    results: Path
    """``QSENS_RESULTS`` when the plan was made."""
    config: SweepConfig
    """The configuration, every path absolute."""
    checkpoint: CheckpointIdentity
    """The checkpoint."""
    samples: dict[Size, SamplesIdentity]
    """The sample file of each size in the grid."""
    versions: dict[str, str]
    """Installed versions of ``qsens``, ``torch``, ``transformers``, ``nvidia-modelopt``."""
    patterns: PatternsIdentity | None = None
    """Patterns of the model's parts as digests spell them; none where the configuration's are."""
    notices: list[str] = []
    """What a reader should know."""
    cells: list[Cell] = Field(min_length=1)
    """The grid, round-robin over lanes."""
    published: int | None = None
    """Which of its model's sweeps it is, from 1, in the order of their publication."""
    checksum: str | None = None
    """SHA-256 over the canonical JSON of all other keys; null in plans older than this key."""

    def cell(self, cell_id: str) -> Cell:
        """Return the cell of that id.

        Raises:
            UserError: The plan has no such cell.
        """
        for cell in self.cells:
            if cell.cell == cell_id:
                return cell
        raise UserError(
            f"the plan has no cell '{cell_id}'",
            where=f"plan {self.plan_id}",
            remedy=f"Its cells: {', '.join(cell.cell for cell in self.cells)}.",
        )

    def pair(self, cell: Cell) -> PairConfig:
        """Return the pair of ``cell``, with the granularity of ``cell`` applied."""
        pairs = {pair.name: pair for pair in self.config.quant_pair}
        granularities = {entry.name: entry for entry in self.config.quant_granularity}
        return pairs[cell.pair].with_granularity(granularities[cell.granularity])

    def lane_of(self, cell: Cell) -> list[Cell]:
        """Return the cells that one GPU computes together with ``cell``."""
        return [other for other in self.cells if other.lane == cell.lane]

    def samples_taken(self, cell: Cell) -> int:
        """Return how many samples of its file ``cell`` takes, those to skip counted."""
        return min(self.config.dataset.limit(cell.size), self.samples[cell.size].available)

    def samples_used(self, cell: Cell) -> int:
        """Return how many samples calibration uses for ``cell``."""
        taken, pictures = self.samples_taken(cell), self._pictures(cell)
        return taken if pictures is None else pictures.valid(taken)

    def samples_scored(self, cell: Cell) -> int:
        """Return how many samples the score uses for ``cell``."""
        return min(self.samples_used(cell), self.config.autoquant.score_size)

    def boundaries(self, cell: Cell) -> list[int]:
        """Return the counts of samples, for ``cell``, that no batch crosses: where sizes end."""
        sizes = self.config.dataset.sizes.values()
        pictures = self._pictures(cell)
        if pictures is None:
            return list(sizes)
        taken = self.samples_taken(cell)
        return [pictures.valid(count) for count in sizes if count <= taken]

    def skipped(self, cell: Cell) -> list[Skipped]:
        """Return the samples that ``cell`` leaves out because of their pictures."""
        taken, pictures = self.samples_taken(cell), self._pictures(cell)
        return [entry for entry in pictures.skipped if entry.sample <= taken] if pictures else []

    def scheme(self, cell: Cell) -> str:
        """Return the name of the scheme that ``cell`` is published as."""
        pair = self.pair(cell)
        scheme = pair.all_layers_scheme if cell.coverage == "all_layers" else pair.scheme
        return scheme.format(**self._names(cell))

    def run_dir(self, cell: Cell) -> str:
        """Return the name of the run directory that ``cell`` is published in."""
        pair = self.pair(cell)
        run_dir = pair.all_layers_run_dir if cell.coverage == "all_layers" else pair.run_dir
        return run_dir.format(**self._names(cell))

    def _pictures(self, cell: Cell) -> PicturesIdentity | None:
        return self.samples[cell.size].pictures if cell.modality == "image_text" else None

    def _names(self, cell: Cell) -> dict[str, str]:
        return {
            "pair": cell.pair,
            "size": "_".join([*unusual(cell.coverage, cell.modality), cell.size]),
            "model": self.config.model.name,
            "short_name": self.config.model.short_name,
        }


def make_plan(
    config: SweepConfig,
    roots: Roots,
    *,
    checkpoint: CheckpointIdentity,
    samples: Mapping[Size, SamplesIdentity],
    versions: Mapping[str, str],
    patterns: PatternsIdentity | None = None,
    lanes: int = 1,
    notices: tuple[str, ...] = (),
    now: datetime | None = None,
) -> Plan:
    """Lay out the grid of ``config`` and give every cell its identity.

    A pair is left out at a granularity that makes no sense for it; `load_sweep` says so.

    Args:
        config: The sweep, paths absolute.
        roots: Where results go.
        checkpoint: What the checkpoint is.
        samples: The sample file of each size in the grid.
        versions: Installed versions, by distribution name.
        patterns: Those of the model's parts as digests spell them; as the configuration has them
            when not given.
        lanes: Shares to split the grid into, by weight format; in no digest.
        notices: What a reader should know.
        now: When the plan is made; the current time when not given.
    """
    created = (now or datetime.now(UTC)).astimezone(UTC)
    stamp = created.strftime("%Y%m%dT%H%M%S") + f"{created.microsecond // 1000:03d}Z"
    cells = []
    weights = {}
    axes = itertools.product(
        config.quant_pair, config.quant_granularity, config.coverage, config.dataset.size
    )
    for own, granularity, coverage, size in axes:
        if own.refusal(granularity) is not None:
            continue
        pair = own.with_granularity(granularity)
        modality = config.modality(coverage)
        identity = cell_identity(config, pair, coverage, size, versions)
        identity["granularity"] = granularity.name
        identity |= _inputs_identity(config, patterns, modality, checkpoint, samples[size])
        pictures = samples[size].pictures if modality == "image_text" else None
        if pictures is not None and pictures.skipped:  # it says whether the result is PARTIAL
            identity["max_skipped"] = config.dataset.max_skipped
        if config.runner.force:
            identity["forced"] = stamp
        cells.append(
            Cell(
                cell=cell_id(pair.name, granularity.name, coverage, modality, size),
                pair=pair.name,
                granularity=granularity.name,
                coverage=coverage,
                modality=modality,
                size=size,
                digest=digest_of(identity),
            )
        )
        weights[cells[-1].cell] = f"{pair.weight} {pair.weight_quantizer.model_dump_json()}"
    digest = digest_of(
        {
            "cells": {cell.cell: cell.digest for cell in cells},
            "model": config.model.name,
            "layout": config.output_layout,
            "output_dir": str(config.runner.output_dir or ""),
        }
    )
    return Plan(
        plan_id=digest[:12],
        sweep_id=f"{stamp}-{digest[:8]}",
        digest=digest,
        created=created.isoformat(timespec="milliseconds"),
        root=roots.root,
        results=roots.results,
        config=config,
        checkpoint=checkpoint,
        samples=dict(samples),
        versions=dict(versions),
        patterns=patterns,
        notices=list(notices),
        cells=_into_lanes(cells, weights, lanes),
    )


def read_plan(path: Path) -> Plan:
    """Read ``plan.json``.

    Raises:
        Damaged: The file is no plan, or not as it was written.
        UserError: A newer qsens wrote it.
    """
    plan = read_document(
        Plan,
        path,
        what="plan",
        version=PLAN_VERSION,
        name="Name a plan.json that `qsens plan --out` wrote.",
        again="Make the plan again with `qsens plan --out`.",
    )
    refuse_another_sweep(path, plan.sweep_id)
    return plan


def refuse_another_sweep(path: Path, sweep_id: str) -> None:
    """Refuse a file of a sweep in the directory that is named after another one.

    Raises:
        Damaged: It is in another sweep's directory.
    """
    name = path.parent.name
    if SWEEP_ID.fullmatch(name) and name != sweep_id:
        raise Damaged(
            f"is damaged: it is that of another sweep, {sweep_id}",
            where=str(path),
            remedy="Publish the sweep again with `qsens publish`.",
        )


def cell_id(pair: str, granularity: str, coverage: Coverage, modality: Modality, size: str) -> str:
    """Return a cell's id; defaults are left out."""
    parts = [pair, *([granularity] if granularity != DEFAULT_GRANULARITY else [])]
    parts += ["all_layers"] if coverage == "all_layers" else []
    return "-".join([*parts, *unusual(coverage, modality), size])


def calibration_digest(plan: Plan, cell: Cell) -> str:
    """Return the SHA-256 of all that changes the calibrated maxima that ``cell`` reads.

    Cells of one modality and size read the same, of the tower as well where one of them covers it.
    """
    tower = any(
        other.coverage == "all_layers" and other.modality == cell.modality for other in plan.cells
    )
    identity = _inputs_identity(
        plan.config, plan.patterns, cell.modality, plan.checkpoint, plan.samples[cell.size]
    )
    return digest_of(
        {
            **({"tower": True} if tower else {}),
            **identity,
            "count": plan.samples_used(cell),
            "engine": CALIBRATION_VERSION,
            "versions": {name: plan.versions.get(name) for name in ("torch", "transformers")},
        }
    )


def _inputs_identity(
    config: SweepConfig,
    patterns: PatternsIdentity | None,
    modality: Modality,
    checkpoint: CheckpointIdentity,
    samples: SamplesIdentity,
) -> dict[str, Any]:
    """Return all that decides what a pass runs on: the model, its parts, and the samples."""
    model = config.model
    return {
        "checkpoint": checkpoint.digest,
        "tokenizer": checkpoint.tokenizer_digest,
        "dtype": model.dtype,
        "trust_remote_code": model.trust_remote_code,
        "vision_patterns": patterns.vision if patterns else model.vision_patterns,
        "head_patterns": patterns.head if patterns else model.head_patterns,
        "sizes": dict(sorted(config.dataset.sizes.items())),
        "calib_seq_len": config.dataset.calib_seq_len,
        **_samples_identity(config, modality, checkpoint, samples),
    }


def _samples_identity(
    config: SweepConfig,
    modality: Modality,
    checkpoint: CheckpointIdentity,
    samples: SamplesIdentity,
) -> dict[str, Any]:
    """Return all that decides what the samples are, as the model reads them."""
    found: dict[str, Any] = {"modality": modality, "samples": samples.digest}
    if modality == "image_text":
        found |= {
            "pictures": samples.pictures.digest if samples.pictures else None,
            "processor": checkpoint.processor_digest,
            "max_pixels": config.dataset.max_pixels,
            "prompt": config.dataset.prompt,
        }
    return found


def unusual(coverage: Coverage, modality: Modality) -> Sequence[str]:
    """Return the modality's name where it is not the default of the coverage."""
    default = "image_text" if coverage == "all_layers" else "text"
    return [modality] if modality != default else []


def _into_lanes(cells: list[Cell], weights: Mapping[str, str], lanes: int) -> list[Cell]:
    """Split by weight format, heaviest first to the lightest lane; list round-robin."""
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[weights[cell.cell]].append(cell)
    shares: list[list[Cell]] = [[] for _ in range(max(1, lanes))]
    for group in sorted(groups.values(), key=len, reverse=True):
        lightest = min(range(len(shares)), key=lambda lane: len(shares[lane]))
        shares[lightest] += [cell.model_copy(update={"lane": lightest}) for cell in group]
    rounds = itertools.zip_longest(*shares)
    return [cell for cells in rounds for cell in cells if cell is not None]
