"""Data sets of a sweep against each other: how alike their rankings are, and where they part."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from qsens.analysis.ranking import normalise_name
from qsens.analysis.series import largest_cells, scores, series_of
from qsens.analysis.stability import CUTS, compare_sizes
from qsens.analysis.statistic import compared_by
from qsens.schema.summary import AloneInDomain, DomainsCompared, Row, SummaryCell


def compare_domains(cells: Sequence[SummaryCell]) -> tuple[DomainsCompared, ...]:
    """Compare every two data sets of each pair at its largest size, by the score per token."""
    compared = []
    for of_pair in _by_pair(cells):
        for one, other in itertools.combinations(of_pair, 2):
            statistic = compared_by(one.rows, other.rows)
            agreed = compare_sizes(scores(one.rows, statistic), scores(other.rows, statistic))
            compared.append(
                DomainsCompared(
                    **_of_pair(one),
                    one=one.domain or "",
                    other=other.domain or "",
                    groups=agreed.groups,
                    spearman=agreed.spearman,
                    kendall=agreed.kendall,
                    overlap=agreed.overlap,
                )
            )
    return tuple(compared)


def alone_in_domain(cells: Sequence[SummaryCell]) -> tuple[AloneInDomain, ...]:
    """Return the groups that are among the first in one data set alone, beyond chance.

    The 95 % interval of the position, by the bootstrap over samples, ends before a cut in that data
    set, and begins behind it in every other. The first of the cuts after 5, 10 and 20 counts.
    """
    found = []
    for of_pair in _by_pair(cells):
        placed = [_positions(cell.rows) for cell in of_pair]
        for cell, own in zip(of_pair, placed, strict=True):
            others = [each for each in placed if each is not own]
            for name, (layer, positions) in own.items():
                known = [each[name][1] for each in others if name in each]
                if not known or len(known) < len(others):
                    continue
                nearest = min(known)
                cut = next((cut for cut in CUTS if positions[1] <= cut < nearest[0]), None)
                if cut is not None:
                    found.append(
                        AloneInDomain(
                            **_of_pair(cell),
                            domain=cell.domain or "",
                            layer=layer,
                            first=cut,
                            positions=positions,
                            elsewhere=nearest,
                        )
                    )
    return tuple(found)


def _of_pair(cell: SummaryCell) -> dict[str, Any]:
    """Return what the cells of a pair have in common at one size, by the names of its keys."""
    return cell.model_dump(include={"pair", "granularity", "coverage", "modality", "size"})


def _by_pair(cells: Sequence[SummaryCell]) -> list[list[SummaryCell]]:
    """Return the largest cells of single data sets, those of one pair together."""
    pairs: dict[tuple[str, ...], list[SummaryCell]] = {}
    for cell in largest_cells(cells):
        if cell.domain is not None:
            pairs.setdefault((*series_of(cell)[:-1], cell.size), []).append(cell)
    return [of_pair for of_pair in pairs.values() if len(of_pair) > 1]


def _positions(rows: Sequence[Row]) -> Mapping[str, tuple[str, tuple[int, int]]]:
    """Return where each group may be placed, with its name, by the name as names compare."""
    return {
        normalise_name(row.layer): (row.layer, row.positions)
        for row in rows
        if row.positions is not None
    }
