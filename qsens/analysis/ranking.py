"""Groups in order of sensitivity, most sensitive first, with their shares of the total."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from qsens.analysis.stability import Spread
from qsens.analysis.statistic import statistic_of, value_of
from qsens.config.base import Frozen
from qsens.names import Kind, group_name, kind_of
from qsens.schema.manifest import GroupSensitivity, Manifest, Status
from qsens.schema.summary import Row, Statistic, total_per_token

_Key = TypeVar("_Key", bound=Hashable)
# No score is near it, and the sum of a hundred million such numbers is still finite.
_LARGEST = 1e300


class Totals(Frozen):
    """Sums over the rows of one cell."""

    groups: int
    """Groups in all."""
    scored: int
    """Groups with a score."""
    sensitivity: float
    """Sum of the sensitivities of the scored groups."""
    sensitivity_per_token: float | None
    """The same per token; none unless every scored group has it."""
    statuses: dict[Status, int]
    """Groups by status, in alphabetical order; statuses without a group are left out."""


class Ranking(Frozen):
    """The groups of one cell, ranked."""

    statistic: Statistic
    """The score that places them; shares and intervals are of it."""
    rows: tuple[Row, ...]
    """Scored groups, most sensitive first; then the others, by status and name."""
    totals: Totals
    """Sums over the rows."""

    @property
    def stated(self) -> dict[str, float]:
        """Return the statistic of the scored groups, by name."""
        values = {row.layer: value_of(row, self.statistic) for row in self.rows}
        return {name: value for name, value in values.items() if value is not None}


class MeanShare(Frozen):
    """How much of the total a group holds, over several cells."""

    layer: str
    """Name of the group, as the first cell spells it."""
    members: tuple[str, ...]
    """Names of the modules in the group."""
    kind: Kind
    """What the group is in a decoder layer."""
    share: float
    """Mean of its shares of the total, over the cells that score it, 0 to 1."""
    highest: float
    """The largest of those shares, 0 to 1."""
    cells: int
    """How many cells score it."""


class Part(Frozen):
    """Sums over some of the scored groups."""

    groups: int
    """How many they are."""
    sensitivity: float
    """Sum of their sensitivities."""
    share: float
    """Sum of their shares of the total, 0 to 1."""
    first: str
    """The most sensitive of them."""


def rank(manifest: Manifest, spreads: Mapping[str, Spread] | None = None) -> Ranking:
    """Rank the groups of a manifest, most sensitive first; ties are broken by name.

    They are ranked by the statistic of the manifest's method, see `statistic_of`.
    Only finite scores are ranked: a row that claims to be scored and holds none is listed as
    ``non_finite``.

    Args:
        manifest: A manifest as ``read_manifest`` returns it.
        spreads: How far each group may be off, by name, where it is known.
    """
    groups = [(group_name(key), group) for key, group in manifest.layer_sensitivity.items()]
    unranked = [_unranked(name, group) for name, group in groups]
    scored = [row for row in unranked if row.sensitivity is not None]
    others = [row for row in unranked if row.sensitivity is None]
    statistic = statistic_of(manifest.scheme.auto_quantize_method, scored)
    values = {row.layer: value_of(row, statistic) or 0.0 for row in scored}
    total = math.fsum(values.values())
    scored.sort(key=lambda row: (-values[row.layer], row.layer))
    others.sort(key=lambda row: (row.status, row.layer))
    ranked = [
        row.model_copy(
            update={
                "position": position,
                "share": values[row.layer] / total if total > 0 else 0.0,
            }
            | _spread((spreads or {}).get(row.layer))
        )
        for position, row in enumerate(scored, start=1)
    ]
    rows = (*ranked, *others)
    totals = Totals(
        groups=len(rows),
        scored=len(ranked),
        sensitivity=math.fsum(row.sensitivity or 0.0 for row in scored),
        sensitivity_per_token=total_per_token(ranked),
        statuses=dict(sorted(Counter(row.status for row in rows).items())),
    )
    return Ranking(statistic=statistic, rows=rows, totals=totals)


def mean_shares(cells: Iterable[Sequence[Row]]) -> list[MeanShare]:
    """Rank groups by the mean of their shares of the total, largest first, ties by name.

    A group that a cell does not score is not counted as 0 there: the mean is over the cells that
    score it.

    Args:
        cells: The rows of each cell.
    """
    shares: dict[str, list[float]] = {}
    first: dict[str, Row] = {}
    for rows in cells:
        for row in rows:
            if row.share is not None:
                key = normalise_name(row.layer)
                first.setdefault(key, row)
                shares.setdefault(key, []).append(row.share)
    means = [
        MeanShare(
            layer=first[key].layer,
            members=first[key].members,
            kind=first[key].kind,
            share=math.fsum(values) / len(values),
            highest=max(values),
            cells=len(values),
        )
        for key, values in shares.items()
    ]
    return sorted(means, key=lambda mean: (-mean.share, mean.layer))


def by_kind(rows: Iterable[Row]) -> dict[Kind, Part]:
    """Add up the scored rows of each kind of module, largest share first."""
    parts = _parts((row.kind, row) for row in rows)
    return dict(sorted(parts.items(), key=lambda item: (-item[1].share, item[0])))


def by_depth(rows: Iterable[Row]) -> dict[int, Part]:
    """Add up the scored rows of each layer, by its index; rows outside the layers are left out."""
    parts = _parts((row.depth, row) for row in rows if row.depth is not None)
    return dict(sorted(parts.items()))


def normalise_name(name: str) -> str:
    """Return a group's name as names compare: without a leading ``model.``."""
    return name.removeprefix("model.")


def finite(value: float | None) -> float | None:
    """Return ``value``, or none where it is no finite number, or a sum of such would be none."""
    return value if value is not None and abs(value) <= _LARGEST else None


def _parts(rows: Iterable[tuple[_Key, Row]]) -> dict[_Key, Part]:
    members: dict[_Key, list[Row]] = {}
    for key, row in rows:
        if row.position is not None:
            members.setdefault(key, []).append(row)
    return {
        key: Part(
            groups=len(its_rows),
            sensitivity=math.fsum(row.sensitivity or 0.0 for row in its_rows),
            share=math.fsum(row.share or 0.0 for row in its_rows),
            first=min(its_rows, key=lambda row: row.position or 0).layer,
        )
        for key, its_rows in members.items()
    }


def _spread(spread: Spread | None) -> dict[str, Any]:
    if spread is None:
        return {}
    return {
        "interval": (spread.low, spread.high),
        "positions": (spread.first, spread.last),
        "verdict": spread.verdict,
        "samples_needed": spread.samples_needed,
    }


def _unranked(name: str, group: GroupSensitivity) -> Row:
    """Return the row of a group, before its position and share are known."""
    score = finite(group.sensitivity)
    status: Status = group.status or ("failed" if score is None else "scored")
    if status == "scored" and score is None:
        status = "non_finite"
    scored = status == "scored"
    return Row(
        layer=name,
        members=tuple(group.members or [name]),
        kind=group.kind or kind_of(name),
        depth=group.depth,
        status=status,
        reason=group.reason,
        num_bits=finite(group.num_bits),
        sensitivity=score if scored else None,
        sensitivity_per_token=finite(group.sensitivity_per_token) if scored else None,
        by_domain=group.by_domain if scored else None,
        size_cost=finite(group.size_cost),
        position=None,
        share=None,
    )
