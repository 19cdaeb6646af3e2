"""The summary of a sweep, ``summary.json``: what was found, row by row, nothing rounded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from qsens.config.base import Frozen
from qsens.config.models import Coverage, Modality, Size
from qsens.names import Kind
from qsens.schema.audit import Audit
from qsens.schema.manifest import Status

SUMMARY_VERSION = 2
Statistic = Literal["sensitivity", "sensitivity_per_token"]
"""A score: the sum over samples, or the same per token."""
Verdict = Literal["stable", "undecided"]
"""Whether it is decided on which side of the cuts after 5, 10 and 20 a group is."""
Cause = Literal["checkpoint", "captions", "versions", "configuration"]
"""What may differ between two results."""


class Row(Frozen):
    """One group of modules that share one format."""

    layer: str
    """ModelOpt's name of the group, without ``.quant_recipe``."""
    members: tuple[str, ...]
    """Names of the modules in the group."""
    kind: Kind
    """What the group is in a decoder layer."""
    depth: int | None
    """Index of its layer, from 0."""
    status: Status
    """Whether it has a score, or why it has none."""
    reason: str | None = None
    """Why it is not scored, in words, where the manifest says so."""
    num_bits: float | None
    """Bits a weight costs in the format, block scales included."""
    sensitivity: float | None
    """``sum_i s_i / T_b(i)^2``; none where the group is not scored."""
    sensitivity_per_token: float | None
    """``sum_i s_i / sum_i T_i``: comparable between batches and sizes."""
    by_domain: dict[str, float] | None = None
    """``sensitivity_per_token`` over the samples of each data set, where several were scored
    together."""
    size_cost: float | None
    """Weights in the format, in 16-bit words."""
    position: int | None
    """1 is the most sensitive; none where the group is not scored."""
    share: float | None
    """Share of the total of the cell's statistic, 0 to 1; 0 where the total is 0, none where not
    scored."""
    interval: tuple[float, float] | None = None
    """95 % interval of the cell's statistic by the bootstrap over samples, 6 digits."""
    positions: tuple[int, int] | None = None
    """95 % interval of ``position``."""
    verdict: Verdict | None = None
    """``stable`` where ``positions`` stays on one side of the cuts after 5, 10 and 20."""
    samples_needed: int | None = None
    """An estimate of how many samples would make it stable; none where it is, or cannot be told."""


class Difference(Frozen):
    """One thing that differs between what went into two results."""

    cause: Cause
    """What kind of thing it is."""
    what: str
    """Its name: ``digest``, ``torch``, ``autoquant.method``."""
    before: str | None
    """Its value in the first result; none where it is not recorded."""
    after: str | None
    """Its value in the second result."""


class ParetoPoint(Frozen):
    """The lowest predicted score at so many bits."""

    bits: float
    """Effective bits a weight."""
    damage: float
    """Sum of the groups' scores, in their unit."""


class CellStability(Frozen):
    """How sure the ranking of one cell is, by the bootstrap over its samples."""

    statistic: Statistic = "sensitivity_per_token"
    """The score that intervals, positions and verdicts are of; sweeps published before this key
    was written have those of the score per token."""
    samples: int
    """Samples that were resampled: those scored."""
    resamples: int
    """How often they were resampled."""
    level: float
    """Level of the intervals, 0 to 1."""
    stable: int
    """Groups whose verdict is ``stable``."""
    undecided: int
    """Groups whose verdict is ``undecided``."""
    first: int
    """How many groups are looked at as those to protect."""
    first_stable: bool
    """Whether it is decided which groups these are."""
    samples_needed: int | None
    """An estimate of how many samples would decide it; none where it is, or cannot be told."""


class SizesCompared(Frozen):
    """How well two sizes of one pair agree, by their scores per token."""

    pair: str
    """Precision pair."""
    granularity: str
    """Granularity."""
    coverage: Coverage
    """Part of the model that may be quantized."""
    modality: Modality
    """What a sample is."""
    domain: str | None = None
    """The data set; none for all of the sweep's together."""
    smaller: Size
    """The smaller size."""
    larger: Size
    """The larger size."""
    scored_smaller: int | None
    """Samples that the smaller one scored."""
    scored_larger: int | None
    """Samples that the larger one scored; the first of them are those of the smaller one."""
    independent: Literal["no", "in part", "unknown"]
    """``no`` where both scored the same samples; ``in part`` where the larger scored more."""
    groups: int
    """Groups that both score."""
    spearman: float | None
    """Spearman's rank correlation."""
    kendall: float | None
    """Kendall's tau-b."""
    overlap: dict[int, int]
    """How many of the first 5, 10, 20 groups are the same."""


class DomainsCompared(Frozen):
    """How well two data sets of one pair agree, each under its own amax, by scores per token."""

    pair: str
    """Precision pair."""
    granularity: str
    """Granularity."""
    coverage: Coverage
    """Part of the model that may be quantized."""
    modality: Modality
    """What a sample is."""
    domain: None = None
    """None: the pair is meant, not one of its data sets."""
    size: Size
    """Calibration size, the largest that has results."""
    one: str
    """A data set."""
    other: str
    """Another."""
    groups: int
    """Groups that both score."""
    spearman: float | None
    """Spearman's rank correlation."""
    kendall: float | None
    """Kendall's tau-b."""
    overlap: dict[int, int]
    """How many of the first 5, 10, 20 groups are the same."""


class AloneInDomain(Frozen):
    """A group that is among the first in one data set alone, beyond chance."""

    pair: str
    """Precision pair."""
    granularity: str
    """Granularity."""
    coverage: Coverage
    """Part of the model that may be quantized."""
    modality: Modality
    """What a sample is."""
    domain: str
    """The data set."""
    size: Size
    """Calibration size."""
    layer: str
    """Name of the group."""
    first: int
    """The cut that it lies before, 5, 10 or 20."""
    positions: tuple[int, int]
    """95 % interval of its position there."""
    elsewhere: tuple[int, int]
    """The same in that of the other data sets where it comes earliest."""


class Moved(Frozen):
    """A group whose score moved beyond noise."""

    cell: str
    """Cell id."""
    layer: str
    """Name of the group."""
    before: float
    """Earlier score per token."""
    after: float
    """Later score per token."""
    half_width: float
    """Half of the 95 % interval of the change."""
    p_value: float
    """Of the test of this group alone."""

    @property
    def relative(self) -> float | None:
        """Return the change over the earlier score."""
        return (self.after - self.before) / self.before if self.before else None


class NotCompared(Frozen):
    """A cell that was not compared with the earlier sweep."""

    cell: str
    """Cell id."""
    reason: str
    """Why not."""


class Drift(Frozen):
    """A sweep against the one before it."""

    previous: str
    """Id of the sweep before."""
    identical: int
    """Cells with the same digest: the same inputs, and the same result."""
    compared: tuple[str, ...]
    """Cells that were tested, at the largest size of each pair."""
    paired: bool
    """Whether all tests were on the same samples."""
    tested: int
    """Groups tested, over all those cells."""
    rate: float
    """Chance of any false alarm, over all tests together, where nothing has changed."""
    moved: tuple[Moved, ...]
    """What moved beyond noise, clearest first."""
    differences: tuple[Difference, ...]
    """What differs in what went into the two sweeps."""
    not_compared: tuple[NotCompared, ...]
    """Cells at their largest size that could not be compared."""


class SummaryCell(Frozen):
    """One cell of the sweep, with all its rows."""

    cell: str
    """Cell id, ``wfp8_afp8-small``."""
    pair: str
    """Precision pair."""
    granularity: str
    """Granularity."""
    coverage: Coverage
    """Part of the model that may be quantized."""
    modality: Modality
    """What a sample is."""
    domain: str | None = None
    """The data set; none for all of the sweep's together."""
    size: Size
    """Calibration size."""
    digest: str
    """Digest of all that changes this cell's numbers."""
    status: Literal["done", "missing"]
    """Whether there is a result."""
    reason: str | None
    """Why there is none."""
    directory: str | None
    """Directory of its reports, relative to the model's directory, with ``/``."""
    partial: tuple[str, ...]
    """Why the result is partial; empty when it is whole or missing."""
    experimental: bool
    """Whether nobody is known to deploy the pair."""
    total_sensitivity: float | None
    """Sum of the sensitivities of the scored groups."""
    effective_bits_reached: float | None
    """What the search reached, in bits a weight."""
    constraint_met: bool | None
    """Whether the target of effective bits was met."""
    samples_used: int | None
    """Samples that calibration used."""
    samples_scored: int | None
    """Samples that the score used."""
    stability: CellStability | None = None
    """How sure the ranking is; none without scores of every sample."""
    rows: tuple[Row, ...]
    """All groups: the scored ones, most sensitive first; then the others."""

    @property
    def done(self) -> bool:
        """Return whether there is a result."""
        return self.status == "done"

    @property
    def whole(self) -> bool:
        """Return whether there is a result, and no partial one."""
        return self.done and not self.partial

    @property
    def total_per_token(self) -> float | None:
        """Return the sum of the sensitivities per token, where all scored groups have one."""
        return total_per_token(self.rows)

    @property
    def first(self) -> Row | None:
        """Return the most sensitive group."""
        return next((row for row in self.rows if row.position == 1), None)


class MissingCell(Frozen):
    """A cell without a result."""

    cell: str
    """Cell id."""
    reason: str
    """Why there is none."""


class Summary(Frozen):
    """``summary.json``: a sweep as it was published, nothing rounded."""

    schema_version: int = SUMMARY_VERSION
    """Version of this schema."""
    sweep_id: str
    """``<UTC time>-<first 8 hex digits of the plan's digest>``."""
    plan_id: str
    """First 12 hex digits of the plan's digest."""
    created: str
    """When the plan was made, ISO 8601, UTC."""
    preset: str
    """Name of the sweep file that the plan started from."""
    model: str
    """Directory of the model's results under ``models/``."""
    checkpoint_digest: str
    """SHA-256 over the contents of the checkpoint's configuration and weight files."""
    method: str = "gradient"
    """The score: ``gradient``, ``fisher``, ``kl_div``."""
    effective_bits_target: float | None = None
    """Target of effective bits, in bits a weight."""
    previous: str | None
    """Id of the sweep before this one; none where this is the first."""
    pareto: tuple[ParetoPoint, ...] = ()
    """The lowest predicted score at so many bits over all pairs at the largest size, from the
    cheapest to 16 bits; a head tied to the embedding stays at 16. Scores are in the statistic of
    the method."""
    complete: bool
    """Whether every cell has a result and none of them is partial."""
    cells: tuple[SummaryCell, ...]
    """All cells, by pair, granularity, coverage and size in the order of the configuration."""
    missing: tuple[MissingCell, ...]
    """The cells without a result, in the same order."""
    sizes_compared: tuple[SizesCompared, ...] = ()
    """Each size of a pair against the next that has a result."""
    domains_compared: tuple[DomainsCompared, ...] = ()
    """Each data set of a pair against each other, where the sweep scored several."""
    alone_in_domain: tuple[AloneInDomain, ...] = ()
    """Groups that are among the first in one data set alone."""
    audit: tuple[Audit, ...] = ()
    """The scores of each pair against the true divergence of some groups, where measured."""
    drift: Drift | None = None
    """What changed since the sweep before; none where there is none."""
    notices: tuple[str, ...] = ()
    """What a reader should know of how its results were stored."""
    published: int = 0
    """Which of its model's sweeps it is, from 1, in the order of their publication; 0 where nobody
    counted."""
    checksum: str | None = None
    """SHA-256 over the canonical JSON of all other keys; null in summaries older than this key."""

    @property
    def done(self) -> tuple[SummaryCell, ...]:
        """Return the cells that have a result."""
        return tuple(cell for cell in self.cells if cell.done)

    @property
    def partial(self) -> tuple[SummaryCell, ...]:
        """Return the cells whose result is partial."""
        return tuple(cell for cell in self.cells if cell.partial)


def total_per_token(rows: Iterable[Row]) -> float | None:
    """Return the sum of the sensitivities per token, or none unless all scored rows have one."""
    values = [row.sensitivity_per_token for row in rows if row.sensitivity is not None]
    known = [value for value in values if value is not None]
    return math.fsum(known) if known and len(known) == len(values) else None
