"""Read two sweeps or two cells, and lay them side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qsens.analysis.drift import Change, changes, moved
from qsens.analysis.provenance import differences, inputs
from qsens.analysis.ranking import normalise_name, rank
from qsens.analysis.series import scores
from qsens.analysis.stability import compare_sizes
from qsens.analysis.statistic import compared_by
from qsens.config import Roots
from qsens.errors import UserError
from qsens.pipeline.drift import comparable, distinct, normalised
from qsens.pipeline.stored import Result
from qsens.published import find_sweep, read_sweep
from qsens.reading import has_file
from qsens.report.compare import ComparedCell, ComparedGroup, Comparison
from qsens.results import MANIFEST, find_manifest
from qsens.schema.summary import Difference, Row
from qsens.store import CELLS, SUMMARY

_NAME = "Name a sweep's or a cell's directory, a sweep's id, or SWEEP/CELL."


@dataclass(frozen=True)
class _Cell:
    name: str
    rows: tuple[Row, ...]
    result: Result | None


@dataclass(frozen=True)
class _Side:
    name: str
    sweep: bool
    cells: dict[str, _Cell]


def compare(one: str, other: str, roots: Roots) -> Comparison:
    """Compare two sweeps, or two cells.

    Args:
        one: A directory, a file, a sweep's id, or ``<sweep id>/<cell id>``.
        other: The same.
        roots: Where sweeps are looked for by id.

    Raises:
        UserError: One is not there, is broken, or the two have nothing in common.
    """
    sides = _find(one, roots), _find(other, roots)
    if sides[0].sweep != sides[1].sweep:
        raise UserError(
            "one is a sweep, the other a cell",
            where=f"{one} and {other}",
            remedy="Name two sweeps, or two cells.",
        )
    if sides[0].sweep:
        names = [name for name in sides[0].cells if name in sides[1].cells]
        pairs = [(sides[0].cells[name], sides[1].cells[name]) for name in names]
    else:
        (first,), (second,) = (side.cells.values() for side in sides)
        pairs = [(first, second)]
    if not pairs:
        raise UserError(
            "no cell has a result in both",
            where=f"{one} and {other}",
            remedy="Name two sweeps of the same pairs and sizes, or two cells.",
        )
    changed: dict[tuple[int, str], Change] = {}
    samples: list[str] = []
    causes: list[Difference] = []
    for index, (a, b) in enumerate(pairs):
        noise = "noise unknown"
        if a.result is not None and b.result is not None:
            causes += differences(inputs(a.result.manifest), inputs(b.result.manifest))
            reason, paired = comparable(a.result, b.result)
            if reason is None and a.result.samples and b.result.samples:
                noise = "the same" if paired else "different"
                tested = changes(
                    normalised(a.result.samples), normalised(b.result.samples), paired=paired
                )
                changed |= {(index, name): change for name, change in tested.items()}
        samples.append(noise)
    beyond = moved(changed)
    methods = {
        cell.result.manifest.scheme.auto_quantize_method
        for pair in pairs
        for cell in pair
        if cell.result is not None
    }
    return Comparison(
        before=sides[0].name,
        after=sides[1].name,
        method=methods.pop() if len(methods) == 1 else "different",
        differences=distinct(causes),
        cells=tuple(
            _compared(
                *pair,
                samples[index],
                {name: change for (at, name), change in changed.items() if at == index},
                {name for at, name in beyond if at == index},
            )
            for index, pair in enumerate(pairs)
        ),
        only_in_one=tuple(sorted(sides[0].cells.keys() ^ sides[1].cells.keys()))
        if sides[0].sweep
        else (),
    )


def _compared(
    a: _Cell, b: _Cell, samples: str, changed: Mapping[str, Change], beyond: set[str]
) -> ComparedCell:
    statistic = compared_by(a.rows, b.rows)
    one, other = scores(a.rows, statistic), scores(b.rows, statistic)
    agreed = compare_sizes(one, other)
    by_name = [{normalise_name(row.layer): row for row in cell.rows} for cell in (a, b)]
    groups = []
    for name in {**one, **other}:
        first, second = by_name[0].get(name), by_name[1].get(name)
        known = first or second
        assert known is not None
        groups.append(
            ComparedGroup(
                layer=known.layer,
                before=one.get(name),
                after=other.get(name),
                share_before=first.share if first else None,
                share_after=second.share if second else None,
                position_before=first.position if first else None,
                position_after=second.position if second else None,
                half_width=changed[name].half_width if name in changed else None,
                moved=name in beyond if name in changed else None,
            )
        )
    groups.sort(key=lambda group: (not group.moved, -_distance(group), group.layer))
    return ComparedCell(
        before=a.name,
        after=b.name,
        per_token=statistic == "sensitivity_per_token",
        samples=samples,
        total_before=math.fsum(one.values()),
        total_after=math.fsum(other.values()),
        spearman=agreed.spearman,
        kendall=agreed.kendall,
        overlap=agreed.overlap,
        groups=tuple(groups),
    )


def _distance(group: ComparedGroup) -> float:
    """Return by what factor a score changed, as a logarithm; a lost score is far."""
    if not group.before or not group.after or group.before < 0 or group.after < 0:
        return math.inf if group.before != group.after else 0.0
    return abs(math.log(group.after / group.before))


def _find(name: str, roots: Roots) -> _Side:
    path = Path(name)
    if path.name != SUMMARY and not has_file(path / SUMMARY, remedy=_NAME) and path.exists():
        return _cell(find_manifest(path))
    sweep, _, cell = (name, "", "") if path.exists() else name.partition("/")
    directory = find_sweep(sweep, roots.results, remedy=_NAME)
    side = _sweep(directory)
    if not cell:
        return side
    if cell not in side.cells:
        raise UserError(
            f"the sweep has no result of the cell '{cell}'",
            where=str(directory),
            remedy=f"Its cells: {', '.join(side.cells)}.",
        )
    return _Side(name, sweep=False, cells={cell: side.cells[cell]})


def _sweep(directory: Path) -> _Side:
    summary, plan = read_sweep(directory)
    cells = {}
    for cell in summary.done:
        place = plan.results / CELLS / cell.digest
        result = Result.read(place) if (place / MANIFEST).is_file() else None
        cells[cell.cell] = _Cell(cell.cell, cell.rows, result)
    return _Side(summary.sweep_id, sweep=True, cells=cells)


def _cell(path: Path) -> _Side:
    result = Result.at(path)
    name = result.manifest.cell or path.stem
    cell = _Cell(name, rank(result.manifest).rows, result)
    return _Side(name, sweep=False, cells={name: cell})
