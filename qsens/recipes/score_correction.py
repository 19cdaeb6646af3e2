"""What a format costs each group in a recipe: its scores, as far as an audit bears them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from qsens.recipes.domains import scaled
from qsens.schema.audit import Audit
from qsens.schema.recipe import ScoreCorrection
from qsens.schema.summary import Row

_CHANCE = 0.05


@dataclass(frozen=True)
class CorrectedScores:
    """The formats of a sweep as a search over them takes them.

    Attributes:
        rows: The rows of each format, with the damage as their sensitivity per token.
        corrections: How that was found, by format.
        refused: Why a format is no option.
    """

    rows: dict[str, tuple[Row, ...]]
    corrections: dict[str, ScoreCorrection]
    refused: dict[str, str]


def correct(
    formats: Mapping[str, Sequence[Row]],
    audits: Mapping[str, Audit],
    digests: Mapping[str, str],
) -> CorrectedScores:
    """Hold the scores of each format against its audit before formats are compared.

    Estimates in nats are divided by their median ratio to the truth where that is not 1 beyond
    chance (a sign test over the groups at the level of 5 %), so that a pair whose divergence is
    underestimated as a whole is not taken for a better one. Where an audit measured
    all groups of the very cell, or of a pair whose scores are not to be trusted, what it measured
    are the damages; without that, such a pair is no option. A proxy has no ratio, and stays as it
    is.

    Args:
        formats: The rows of one cell for each format, by the format's name.
        audits: The audits that there are, by the same names.
        digests: Digests of the cells, by the same names.
    """
    rows, corrections, refused = {}, {}, {}
    for name, its_rows in formats.items():
        rows[name], corrections[name] = tuple(its_rows), ScoreCorrection(source="estimates")
        audit = audits.get(name)
        if audit is None:
            continue
        judged = audit.judgement
        known = {"verdict": judged.verdict, "audit": audit.digest}
        distrusted = judged.verdict == "do not trust"
        all_measured = audit.mode == "full" and audit.method == "fisher"
        if all_measured and (distrusted or audit.cell_digest == digests[name]):
            rows[name] = _measured(its_rows, audit)
            corrections[name] = ScoreCorrection(source="true divergences", **known)
        elif distrusted:
            del rows[name], corrections[name]
            refused[name] = f"its scores are not to be trusted: {judged.reason}"
        elif judged.ratio is not None and _is_off(audit):
            rows[name] = _divided(its_rows, judged.ratio)
            corrections[name] = ScoreCorrection(
                source="corrected estimates", ratio=judged.ratio, **known
            )
        else:
            corrections[name] = ScoreCorrection(source="estimates", **known)
    return CorrectedScores(rows, corrections, refused)


def _is_off(audit: Audit) -> bool:
    """Return whether estimates lie on one side of the truth in more groups than by chance.

    A few groups do not tell a median of 0.95 from 1, and dividing by noise makes choices worse.
    """
    signs = [point.estimate > point.truth for point in audit.points if point.truth > 0]
    return bool(signs) and float(binomtest(sum(signs), len(signs)).pvalue) < _CHANCE


def _divided(rows: Sequence[Row], ratio: float) -> tuple[Row, ...]:
    return tuple(
        row if row.sensitivity_per_token is None else scaled(row, row.sensitivity_per_token / ratio)
        for row in rows
    )


def _measured(rows: Sequence[Row], audit: Audit) -> tuple[Row, ...]:
    """Return rows with the truth for a score; what could not be measured has none."""
    truth = {point.layer: point.truth for point in audit.points}
    unknown = {"status": "failed", "sensitivity": None, "sensitivity_per_token": None}
    return tuple(
        row
        if row.status != "scored"
        else scaled(row, truth[row.layer])
        if row.layer in truth
        else row.model_copy(update=unknown)
        for row in rows
    )
