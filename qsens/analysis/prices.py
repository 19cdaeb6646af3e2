"""What a format costs each group in a recipe: its scores, as far as an audit bears them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qsens.analysis.ranking import Row
from qsens.config.models import Frozen
from qsens.manifest import Audit, Verdict

Source = Literal["estimates", "corrected estimates", "true divergences"]


class Price(Frozen):
    """How the damages of a format were found."""

    source: Source
    """``estimates``: the scores as they are; ``corrected estimates``: divided by ``ratio``;
    ``true divergences``: measured, in every group that may get the format."""
    verdict: Verdict | None = None
    """What the audit of the pair says; null where there is none."""
    ratio: float | None = None
    """Median of estimate over truth by that audit; null where it corrects nothing."""
    audit: str | None = None
    """Digest of the audit."""


@dataclass(frozen=True)
class Priced:
    """The formats of a sweep as a search over them takes them.

    Attributes:
        rows: The rows of each format, with the damage as their sensitivity per token.
        prices: How that was found, by format.
        refused: Why a format is no option.
    """

    rows: dict[str, tuple[Row, ...]]
    prices: dict[str, Price]
    refused: dict[str, str]


def price(formats: Mapping[str, Sequence[Row]], audits: Mapping[str, Audit]) -> Priced:
    """Hold the scores of each format against its audit before formats are compared.

    Where the audit measured all groups, those are the damages. Estimates in nats are divided by
    their median ratio to the truth, so that a pair whose divergence is underestimated as a whole is
    not taken for a better one. A pair whose scores are not to be trusted is no option unless all
    its groups were measured. A proxy has no ratio, and stays as it is.

    Args:
        formats: The rows of one cell for each format, by the format's name.
        audits: The audits that there are, by the same names.
    """
    rows, prices, refused = {}, {}, {}
    for name, found in formats.items():
        audit = audits.get(name)
        if audit is None:
            rows[name], prices[name] = tuple(found), Price(source="estimates")
            continue
        judged = audit.judgement
        known = Price(source="estimates", verdict=judged.verdict, audit=audit.digest)
        if audit.method == "fisher" and audit.mode == "full":
            rows[name] = _measured(found, audit)
            prices[name] = known.model_copy(update={"source": "true divergences"})
        elif judged.verdict == "do not trust":
            refused[name] = f"its scores are not to be trusted: {judged.reason}"
        elif judged.ratio:
            rows[name] = _divided(found, judged.ratio)
            changes = {"source": "corrected estimates", "ratio": judged.ratio}
            prices[name] = known.model_copy(update=changes)
        else:
            rows[name], prices[name] = tuple(found), known
    return Priced(rows, prices, refused)


def _divided(rows: Sequence[Row], ratio: float) -> tuple[Row, ...]:
    return tuple(
        row
        if row.sensitivity_per_token is None
        else row.model_copy(update={"sensitivity_per_token": row.sensitivity_per_token / ratio})
        for row in rows
    )


def _measured(rows: Sequence[Row], audit: Audit) -> tuple[Row, ...]:
    """Return rows with the truth for a score; what could not be measured has none."""
    truth = {point.layer: point.truth for point in audit.points}
    return tuple(
        row.model_copy(update={"sensitivity_per_token": truth.get(row.layer)})
        if row.status == "scored"
        else row
        for row in rows
    )
