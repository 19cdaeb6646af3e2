"""Cells, their identity, and the plan: a resolved, validated, hashed description of a sweep."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, Field, model_validator

from qsens.cells import CalibrationSet, Cell, CellSpec
from qsens.checksums import digest_of
from qsens.config import DatasetConfig, Roots, SweepConfig
from qsens.config.base import Frozen
from qsens.config.models import SIZES, Coverage, Modality, Size
from qsens.config.pairs import DEFAULT_GRANULARITY
from qsens.documents import read_document
from qsens.errors import Damaged, UserError
from qsens.identity import (
    CALIBRATION_VERSION,
    CheckpointIdentity,
    PatternsIdentity,
    SamplesIdentity,
    cell_identity,
    inputs_identity,
    set_identity,
)

PLAN_VERSION = 3
# The time in it is when the plan was made, in UTC: in microseconds, so that two of one grid differ,
# or in milliseconds, as plans of earlier versions do.
SWEEP_ID = re.compile(r"(\d{8}T\d{9,12})Z-[0-9a-f]{8}")


class Plan(Frozen):
    """A sweep as it will run; written to ``plan.json``."""

    model_config = ConfigDict(serialize_by_alias=True)

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
    samples: dict[str, dict[Size, SamplesIdentity]]
    """The sample file of each size in the grid, by data set."""
    versions: dict[str, str]
    """Installed versions of ``qsens``, ``torch``, ``transformers``, ``nvidia-modelopt``."""
    patterns: PatternsIdentity | None = None
    """Patterns of the model's parts as digests spell them; none where the configuration's are."""
    notices: list[str] = []
    """What a reader should know."""
    grid: list[Cell] = Field(min_length=1, alias="cells")
    """The cells as ``plan.json`` lists them, round-robin over lanes."""
    published: int | None = None
    """Which of its model's sweeps it is, from 1, in the order of their publication."""
    checksum: str | None = None
    """SHA-256 over the canonical JSON of all other keys; null in plans older than this key."""

    @model_validator(mode="before")
    @classmethod
    def _of_today(cls, given: Any) -> Any:
        """Read an older plan: its samples are by size alone, its memory that above the weights."""
        match given:
            case {"config": {"autoquant": {"memory_budget_gb": _, **autoquant}}}:
                config = {**given["config"], "autoquant": autoquant}
                given = {**given, "config": config}
        match given:
            case {"samples": {**samples}, "config": {"dataset": {"name": str(name)}}} if (
                samples.keys() <= set(SIZES)
            ):
                return {**given, "samples": {name: samples}}
        return given

    @model_validator(mode="after")
    def _cells_are_of_what_it_names(self) -> Self:
        pairs = {pair.name for pair in self.config.quant_pair}
        granularities = {entry.name for entry in self.config.quant_granularity}
        datasets = [dataset.name for dataset in self.config.dataset]
        sizes = set.intersection(*(set(self.samples.get(name, ())) for name in datasets))
        for cell in self.grid:
            for what, name, known in (
                ("size", cell.size, sizes),
                ("data set", cell.domain or datasets[0], datasets),
                ("pair", cell.pair, pairs),
                ("granularity", cell.granularity, granularities),
            ):
                if name not in known:
                    raise ValueError(f"cell '{cell.cell}' is of {what} '{name}', which it lacks")
        return self

    def cell(self, cell_id: str) -> CellSpec:
        """Return the cell of that id, resolved.

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

    @cached_property
    def cells(self) -> tuple[CellSpec, ...]:
        """The cells, each resolved once, in their order."""
        return tuple(_resolved(self, cell) for cell in self.grid)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy; it resolves its cells by its own configuration."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("cells", None)
        return copied

    def lane_of(self, cell: Cell) -> list[CellSpec]:
        """Return the cells that one GPU computes together with ``cell``."""
        return [other for other in self.cells if other.lane == cell.lane]


def _resolved(plan: Plan, cell: Cell) -> CellSpec:
    """Return ``cell`` with all that the plan says of it."""
    config = plan.config
    pairs = {pair.name: pair for pair in config.quant_pair}
    granularities = {entry.name: entry for entry in config.quant_granularity}
    pair = pairs[cell.pair].with_granularity(granularities[cell.granularity])
    sets = tuple(
        _calibration_set(plan, cell, dataset)
        for dataset in config.dataset
        if cell.domain in (None, dataset.name)
    )
    whole = cell.coverage == "all_layers"
    names = {
        "pair": cell.pair,
        "size": "_".join([*_marks(cell.coverage, cell.modality, cell.domain), cell.size]),
        "model": config.model.name,
        "short_name": config.model.short_name,
    }
    return CellSpec(
        **dict(cell),
        precision=pair,
        sets=sets,
        scheme=(pair.all_layers_scheme if whole else pair.scheme).format(**names),
        run_dir=(pair.all_layers_run_dir if whole else pair.run_dir).format(**names),
        # Amax over several data sets are the largest of each one's own.
        calibration=sets[0].calibration
        if len(sets) == 1
        else digest_of({"union": [one.calibration for one in sets]}),
    )


def _calibration_set(plan: Plan, cell: Cell, dataset: DatasetConfig) -> CalibrationSet:
    """Return the samples of a data set that ``cell`` reads."""
    samples = plan.samples[dataset.name][cell.size]
    pictures = samples.pictures if cell.modality == "image_text" else None
    taken = min(samples.limit(dataset, cell.size), samples.available)
    held = samples if pictures is None else pictures
    used = held.valid(taken)
    return CalibrationSet(
        dataset=dataset,
        size=cell.size,
        modality=cell.modality,
        samples=samples,
        asked=samples.asked(dataset, cell.size),
        taken=taken,
        used=used,
        scored=min(used, plan.config.autoquant.score_size),
        boundaries=tuple(
            held.valid(count)
            for count in (samples.asked(dataset, size) for size in dataset.sizes)
            if pictures is None or count <= taken
        ),
        skipped=tuple(entry for entry in held.skipped if entry.sample <= taken),
        calibration=_calibration_digest(plan, cell, dataset, used),
    )


def make_plan(
    config: SweepConfig,
    roots: Roots,
    *,
    checkpoint: CheckpointIdentity,
    samples: Mapping[str, Mapping[Size, SamplesIdentity]],
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
        samples: The sample file of each size in the grid, by data set.
        versions: Installed versions, by distribution name.
        patterns: Those of the model's parts as digests spell them; as the configuration has them
            when not given.
        lanes: Shares to split the grid into, by weight format; in no digest.
        notices: What a reader should know.
        now: When the plan is made; the current time when not given.
    """
    created = (now or datetime.now(UTC)).astimezone(UTC)
    stamp = created.strftime("%Y%m%dT%H%M%S%fZ")
    cells = []
    weights = {}
    axes = itertools.product(config.formats, config.coverage, config.domains, config.sizes)
    for (own, granularity), coverage, domain, size in axes:
        pair = own.with_granularity(granularity)
        modality = config.modality(coverage)
        identity = cell_identity(config, pair, coverage, size, versions)
        identity["granularity"] = granularity.name
        of_sets = {}
        for dataset in config.dataset:
            if domain in (None, dataset.name):
                held = samples[dataset.name][size]
                of_sets[dataset.name] = inputs_identity(
                    config, dataset, patterns, modality, checkpoint, held
                ) | set_identity(config.model, dataset, modality, held)
        if len(of_sets) == 1:
            identity |= of_sets.popitem()[1]
        else:
            identity["union"] = of_sets
        if domain is not None:
            identity["domain"] = domain
        if config.runner.force:
            identity["forced"] = stamp
        cells.append(
            Cell(
                cell=cell_id(pair.name, granularity.name, coverage, modality, size, domain),
                pair=pair.name,
                granularity=granularity.name,
                coverage=coverage,
                modality=modality,
                size=size,
                domain=domain,
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
        samples={name: dict(of_sizes) for name, of_sizes in samples.items()},
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


def cell_id(
    pair: str,
    granularity: str,
    coverage: Coverage,
    modality: Modality,
    size: str,
    domain: str | None = None,
) -> str:
    """Return a cell's id; defaults are left out."""
    parts = [pair, *([granularity] if granularity != DEFAULT_GRANULARITY else [])]
    parts += ["all_layers"] if coverage == "all_layers" else []
    return "-".join([*parts, *_marks(coverage, modality, domain), size])


def _marks(coverage: Coverage, modality: Modality, domain: str | None) -> list[str]:
    """Return what names hold before the size, of cells that are not of the default kind."""
    return [*unusual(coverage, modality), *([domain] if domain is not None else [])]


def _calibration_digest(plan: Plan, cell: Cell, dataset: DatasetConfig, used: int) -> str:
    """Return the SHA-256 of all that changes the amax calibrated on a data set for ``cell``.

    Cells of one modality and size read the same, of the tower as well where one of them covers it.
    """
    tower = any(
        other.coverage == "all_layers" and other.modality == cell.modality for other in plan.grid
    )
    samples = plan.samples[dataset.name][cell.size]
    identity = inputs_identity(
        plan.config, dataset, plan.patterns, cell.modality, plan.checkpoint, samples
    )
    return digest_of(
        {
            **({"tower": True} if tower else {}),
            **identity,
            "count": used,
            "engine": CALIBRATION_VERSION,
            "versions": {name: plan.versions.get(name) for name in ("torch", "transformers")},
        }
    )


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
