"""What each group may become: the formats of a sweep, with what they cost and what they hurt."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from qsens.analysis.ranking import normalise_name
from qsens.analysis.statistic import value_of
from qsens.names import FUSED, kind_of
from qsens.schema.summary import Row, Statistic

UNQUANTIZED_BITS = 16.0


@dataclass(frozen=True)
class FormatChoice:
    """One format for one unit.

    Attributes:
        format: Name of the format; none leaves the unit at 16 bits.
        bits: Bits a weight, block scales included.
        score: What it does to the model, in the unit of the scores.
    """

    format: str | None
    bits: float
    score: float


UNQUANTIZED = FormatChoice(None, UNQUANTIZED_BITS, 0.0)


@dataclass(frozen=True)
class DecisionGroup:
    """Groups that are decided together; one group, as a rule.

    Attributes:
        groups: Names of the groups.
        weights: Elements of all their weights.
        choices: What they may become; 16 bits is always among them.
    """

    groups: tuple[str, ...]
    weights: int
    choices: tuple[FormatChoice, ...]


def build_decision_groups(
    formats: Mapping[str, Sequence[Row]],
    statistic: Statistic = "sensitivity",
    *,
    keep: Iterable[str] = (),
    keep_head: bool = False,
    together: Iterable[Collection[str]] = (),
    refused: Mapping[str, Collection[str]] | None = None,
) -> list[DecisionGroup]:
    """Return the units of a sweep, in the order of the first format's rows.

    A format without a score for a group is no option there: an unknown score is not 0. Disabled
    groups are left out. Members of fused layers (q, k, v; gate, up) are united where the rows hold
    them apart.

    Args:
        formats: The rows of one cell for each format, by the format's name.
        statistic: The score that is the score, see `statistic_of`.
        keep: Patterns (fnmatch) of groups or members that stay at 16 bits.
        keep_head: Whether the head stays at 16 bits, as one that is tied to the embedding does.
        together: Names of groups that share one format.
        refused: Names of groups that a format is no option for, by the format's name.

    Raises:
        ValueError: The weights of a group differ between formats.
    """
    patterns = tuple(keep)
    weights: dict[str, int] = {}
    members: dict[str, tuple[str, ...]] = {}
    choices: dict[str, dict[str, FormatChoice]] = {}
    for name, rows in formats.items():
        for row in rows:
            if row.status == "disabled":
                continue
            count = weights_of(row)
            if count is None:
                continue
            if weights.setdefault(row.layer, count) != count:
                raise ValueError(f"{row.layer} has {weights[row.layer]} weights, and {count}")
            members.setdefault(row.layer, row.members)
            known = choices.setdefault(row.layer, {})
            score = value_of(row, statistic)
            if row.layer in (refused or {}).get(name, ()):
                continue
            if score is not None and row.num_bits is not None:
                known[name] = FormatChoice(name, row.num_bits, score)
    kept = {layer for layer in weights if matches(layer, members[layer], patterns)}
    if keep_head:
        kept |= {layer for layer in weights if kind_of(layer) == "head"}
    decisions = []
    for layers in _united(members, together):
        shared = [name for name in formats if all(name in choices[layer] for layer in layers)]
        if kept.intersection(layers):
            shared = []
        decisions.append(
            DecisionGroup(
                groups=layers,
                weights=sum(weights[layer] for layer in layers),
                choices=(
                    UNQUANTIZED,
                    *(
                        FormatChoice(
                            name,
                            choices[layers[0]][name].bits,
                            sum(choices[layer][name].score for layer in layers),
                        )
                        for name in shared
                    ),
                ),
            )
        )
    return decisions


def weights_of(row: Row) -> int | None:
    """Return the weight elements of a row's group; none where an older manifest cannot tell."""
    if row.size_cost is None or not row.num_bits:
        return None
    return round(row.size_cost * UNQUANTIZED_BITS / row.num_bits)


def matches(layer: str, members: Iterable[str], patterns: Iterable[str]) -> bool:
    """Return whether a pattern matches a group or one of its members, ``model.`` aside."""
    names = {layer, *members}
    names |= {normalise_name(name) for name in names}
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _united(
    members: Mapping[str, tuple[str, ...]], together: Iterable[Collection[str]]
) -> list[tuple[str, ...]]:
    """Return the groups, those that share a format as one, in order of their first."""
    leader = {layer: layer for layer in members}

    def find(layer: str) -> str:
        while leader[layer] != layer:
            layer = leader[layer]
        return layer

    order = {layer: index for index, layer in enumerate(members)}
    for names in (*together, *_fused(members)):
        known = [find(name) for name in names if name in leader]
        for name in known:
            leader[name] = min(known, key=order.__getitem__)
    united: dict[str, list[str]] = {}
    for layer in members:
        united.setdefault(find(layer), []).append(layer)
    return [tuple(layers) for layers in united.values()]


def _fused(members: Mapping[str, tuple[str, ...]]) -> list[set[str]]:
    """Return the groups that hold parts of one fused layer."""
    fused: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for layer, names in members.items():
        for name in names:
            parent, _, leaf = name.rpartition(".")
            for leaves in FUSED:
                if leaf in leaves:
                    fused.setdefault((parent, leaves), set()).add(layer)
    return [layers for layers in fused.values() if len(layers) > 1]
