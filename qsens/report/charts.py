"""The data that the pages' charts are drawn from: plain lists, names already bounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import rankdata

from qsens.analysis.audit import Z90
from qsens.analysis.ranking import normalise_name
from qsens.analysis.series import largest_cells, series_of
from qsens.analysis.statistic import compared_by, value_of
from qsens.grid import unusual
from qsens.names import Kind
from qsens.report import format as look
from qsens.report.views import Heat
from qsens.schema.audit import Audit
from qsens.schema.summary import Drift, ParetoPoint, Row, Statistic

KINDS: tuple[Kind, ...] = ("qkv", "o", "gate_up", "down", "experts", "other", "vision")
_DEPTHS_SHOWN = 200
_FIRST = 20
_HEAT_ROWS = 400
_MOVED = 40

Chart = dict[str, Any]


@dataclass(frozen=True)
class DepthMap:
    """Shares of the total by kind and depth, for a heat map.

    Attributes:
        depths: Depths that hold a scored group, ascending.
        kinds: Each kind with its share at each of those depths, none where there is no group.
        top: The largest share.
        left_out: Scored groups without a place in it.
    """

    depths: tuple[int, ...]
    kinds: tuple[tuple[Kind, tuple[float | None, ...]], ...]
    top: float
    left_out: int


def depth_map(rows: Sequence[Row]) -> DepthMap | None:
    """Return the shares of scored rows by kind and depth; none where depth says nothing."""
    shares: dict[tuple[Kind, int], float] = {}
    for row in rows:
        if row.depth is not None and row.share is not None and row.kind in KINDS:
            place = (row.kind, row.depth)
            shares[place] = shares.get(place, 0.0) + row.share
    depths = tuple(sorted({depth for _, depth in shares}))
    if not 2 <= len(depths) <= _DEPTHS_SHOWN:
        return None
    present = {kind for kind, _ in shares}
    return DepthMap(
        depths=depths,
        kinds=tuple(
            (kind, tuple(shares.get((kind, depth)) for depth in depths))
            for kind in KINDS
            if kind in present
        ),
        top=max(shares.values()),
        left_out=sum(
            row.share is not None and (row.depth is None or row.kind not in KINDS) for row in rows
        ),
    )


def profile(rows: Sequence[Row]) -> Chart | None:
    """Return the share of the total over depth, a line a kind of module."""
    depths = depth_map(rows)
    if depths is None:
        return None
    return {
        "depths": depths.depths,
        "lines": [{"name": kind, "values": shares} for kind, shares in depths.kinds],
    }


def first_groups(rows: Sequence[Row], statistic: Statistic) -> Chart | None:
    """Return the first groups of a cell with the intervals of their scores in ``statistic``."""
    kept = [row for row in rows if row.interval is not None][:_FIRST]
    if not kept:
        return None
    return {
        "names": [look.shown(row.layer) for row in kept],
        "per_token": statistic == "sensitivity_per_token",
        "scores": [value_of(row, statistic) for row in kept],
        "low": [row.interval[0] if row.interval else None for row in kept],
        "high": [row.interval[1] if row.interval else None for row in kept],
        "stable": [row.verdict == "stable" for row in kept],
    }


def heat(view: Heat | None) -> Chart | None:
    """Return groups by pairs, the shares of each pair's total."""
    if view is None or not view.rows:
        return None
    rows = view.rows[:_HEAT_ROWS]
    return {
        "names": [look.shown(name) for name, _ in rows],
        "columns": [look.shown(column_name(cell)) for cell in view.cells],
        "values": [[row.share if row else None for row in cells] for _, cells in rows],
        "left_out": len(view.rows) - len(rows),
    }


def profiles(cells: Sequence[Any]) -> Chart:
    """Return the profile of every pair at its largest size, by the pair's name."""
    by_cell = {look.shown(column_name(cell)): profile(cell.rows) for cell in largest_cells(cells)}
    return {name: chart for name, chart in by_cell.items() if chart is not None}


def sizes(cells: Sequence[Any]) -> Chart:
    """Return of every pair its first groups at all sizes, per token where all of them have that.

    Intervals stand where they are of what is shown: not with ``gradient``, whose intervals are of
    the sum over samples, which sizes are not compared by.
    """
    chart: Chart = {}
    for largest in largest_cells(cells):
        members = [c for c in cells if c.done and series_of(c) == series_of(largest)]
        if len(members) < 2:
            continue
        names = [row.layer for row in largest.rows if row.position is not None][:_FIRST]
        statistic = compared_by(*(cell.rows for cell in members))
        chart[look.shown(column_name(largest))] = {
            "names": [look.shown(name) for name in names],
            "per_token": statistic == "sensitivity_per_token",
            "sizes": [_size(cell, names, statistic) for cell in members],
        }
    return chart


def drift(view: Drift | None) -> Chart | None:
    """Return what moved: from where to where, with the interval of the change."""
    if view is None or not view.moved:
        return None
    kept = view.moved[:_MOVED]
    return {
        "names": [look.shown(f"{moved.layer} ({moved.cell})", 400) for moved in kept],
        "before": [moved.before for moved in kept],
        "after": [moved.after for moved in kept],
        "half_width": [moved.half_width for moved in kept],
    }


def pareto(points: Sequence[ParetoPoint], target: float | None) -> Chart | None:
    """Return the curve of predicted score over bits, and the recipe at the sweep's target.

    Args:
        points: The curve, by rising bits.
        target: Target of effective bits; what the points offer there is the last one below it.
    """
    if not points:
        return None
    within = [point for point in points if target is not None and point.bits <= target + 1e-9]
    return {
        "bits": [point.bits for point in points],
        "damage": [point.damage for point in points],
        "target": target,
        "chosen": [within[-1].bits, within[-1].damage] if within else None,
    }


def audited(audit: Audit | None) -> Chart | None:
    """Return estimate against truth of the groups of an audit; ranks where the score is a proxy.

    Ranks are 1 for the most sensitive of these groups. On the logarithmic axes of the numbers,
    what is not above 0 has no place and is counted as left out.
    """
    if audit is None or not audit.points:
        return None
    ranks = audit.method == "gradient"
    shown = [point for point in audit.points if ranks or (point.estimate > 0 and point.truth > 0)]
    estimates, truths = [point.estimate for point in shown], [point.truth for point in shown]
    if ranks:
        estimates = rankdata([-value for value in estimates]).tolist()
        truths = rankdata([-value for value in truths]).tolist()
    return {
        "names": [look.shown(point.layer) for point in shown],
        "ranks": ranks,
        "estimate": estimates,
        "truth": truths,
        "half_width": [None if ranks else _half_width(point.standard_error) for point in shown],
        "verdict": audit.judgement.verdict,
        "left_out": len(audit.points) - len(shown),
    }


def audits(given: Sequence[Audit]) -> Chart:
    """Return the chart of every audit, by the pair's name."""
    drawn = {look.shown(column_name(audit)): audited(audit) for audit in given}
    return {name: chart for name, chart in drawn.items() if chart is not None}


def _half_width(standard_error: float | None) -> float | None:
    return None if standard_error is None else Z90 * standard_error


def column_name(cell: Any) -> str:
    """Return a pair's name, with granularity, coverage and modality unless they are defaults.

    The data set follows where a sweep scored several apart.
    """
    parts = [cell.pair, *([cell.granularity] if cell.granularity != "default" else [])]
    parts += ["all_layers"] if cell.coverage == "all_layers" else []
    parts += unusual(cell.coverage, cell.modality)
    parts += [cell.domain] if cell.domain is not None else []
    return " ".join(parts)


def _size(cell: Any, names: Sequence[str], statistic: Statistic) -> Chart:
    rows = {normalise_name(row.layer): row for row in cell.rows}
    matched = [rows.get(normalise_name(name)) for name in names]
    scores = [value_of(row, statistic) if row else None for row in matched]
    known = cell.stability is not None and cell.stability.statistic == statistic
    ends = [row.interval if row and known else None for row in matched]
    return {
        "size": cell.size,
        "scores": [value if value is None or math.isfinite(value) else None for value in scores],
        "low": [end[0] if end else None for end in ends],
        "high": [end[1] if end else None for end in ends],
    }
