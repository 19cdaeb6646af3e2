"""Scores of several data sets as one: what a recipe is weighed by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qsens.errors import UserError
from qsens.schema.summary import Row

Mix = Mapping[str, float]
"""Shares of data sets, by name, which add up to 1: shares of tokens."""


def domains_of(rows: Mapping[str, Sequence[Row]]) -> tuple[str, ...]:
    """Return the data sets that rows of several formats were scored on together, in order."""
    named = (row.by_domain for each in rows.values() for row in each if row.by_domain)
    return tuple(next(named, ()))


def read_mix(text: str) -> dict[str, float]:
    """Return the shares that ``chat=0.7,code=0.3`` stands for, as they are.

    Raises:
        UserError: It is no such list.
    """
    shares: dict[str, float] = {}
    for entry in text.split(","):
        name, _, value = entry.strip().partition("=")
        try:
            share = float(value)
        except ValueError:
            share = math.nan
        if not name or name in shares or not 0 <= share < math.inf:
            raise UserError(
                f"'{entry.strip()}' is no data set with a share",
                where="--mix",
                remedy="Write NAME=SHARE,NAME=SHARE, each name once, such as chat=0.7,code=0.3.",
            )
        shares[name] = share
    return shares


def mix_of(shares: Mapping[str, float], domains: Sequence[str], *, where: str) -> dict[str, float]:
    """Return the mix that shares stand for; what they do not name has none.

    Args:
        shares: Shares in any unit, by data set.
        domains: The data sets that there are.
        where: The sweep, for messages.

    Raises:
        UserError: They name another data set, or add up to nothing.
    """
    refuse_one(domains, where=where)
    unknown = sorted(set(shares) - set(domains))
    if unknown:
        raise UserError(
            f"has no data set '{unknown[0]}'",
            where=where,
            remedy=f"Its data sets: {', '.join(domains)}.",
        )
    total = math.fsum(shares.values())
    if total <= 0:
        raise UserError(
            "adds up to nothing", where="--mix", remedy="Give at least one data set a share."
        )
    return {name: shares.get(name, 0.0) / total for name in domains}


def refuse_one(domains: Sequence[str], *, where: str) -> None:
    """Refuse a sweep of one data set, where several are asked for.

    Raises:
        UserError: It is one.
    """
    if not domains:
        raise UserError(
            "was scored on one data set: there is nothing to weigh",
            where=where,
            remedy="Sweep several at once: dataset=NAME,NAME.",
        )


def mixed(rows: Sequence[Row], mix: Mix) -> tuple[Row, ...]:
    """Return rows whose score is that of a mix of data sets, per token."""
    scored = []
    for row in rows:
        if row.by_domain is None:
            scored.append(row)
            continue
        value = math.fsum(share * row.by_domain[name] for name, share in mix.items())
        scored.append(row.model_copy(update={"sensitivity": value, "sensitivity_per_token": value}))
    return tuple(scored)


def scaled(row: Row, score: float) -> Row:
    """Return a row with another score per token; that of each data set changes in proportion."""
    before, by_domain = row.sensitivity_per_token, row.by_domain
    if by_domain is not None:
        by_domain = {
            name: score * (value / before) if before else score for name, value in by_domain.items()
        }
    return row.model_copy(update={"sensitivity_per_token": score, "by_domain": by_domain})
