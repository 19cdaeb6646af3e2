"""Findings in words: what the templates say of stability, sizes and drift."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qsens.analysis.experts import Expert
from qsens.analysis.ranking import Totals
from qsens.report import format as look
from qsens.schema.audit import Judgement
from qsens.schema.summary import CellStability, Drift, SizesCompared, Statistic, SummaryCell

_LISTED = 8
_UNMEASURED = {
    "disabled": "left unquantized",
    "failed": "that failed",
    "no_gradient": "with a score of exactly 0, which no gradient reached",
    "non_finite": "whose score is no finite number",
    "scored": "",
}


def unmeasured_words(totals: Totals) -> str | None:
    """Say why no group has a score; none where one has."""
    if totals.scored:
        return None
    reasons = [
        f"{look.count(number, 'group')} {_UNMEASURED[status]} ({status})"
        for status, number in totals.statuses.items()
    ]
    return f"No group has a score: {'; '.join(reasons)}."


def stable_words(stable: bool | None) -> str:
    """Say whether the first groups are sure."""
    return "not known" if stable is None else "stable" if stable else "undecided"


def experts_words(experts: Iterable[Expert]) -> str:
    """List experts with their scores and tokens."""
    return ", ".join(
        f"{each.expert} ({look.scientific(each.sensitivity)}, {look.count(each.tokens, 'token')})"
        for each in experts
    )


def idle_words(experts: Sequence[int]) -> str:
    """Say which experts got no token: all of them up to eight, else the first of how many."""
    if len(experts) <= _LISTED:
        return ", ".join(map(str, experts)) or "none"
    return f"{len(experts)}: {', '.join(map(str, experts[:_LISTED]))}, ..."


def statistic_words(statistic: Statistic) -> str:
    """Name a score."""
    return "sensitivity" if statistic == "sensitivity" else "score per token"


def settled_words(stability: CellStability) -> str:
    """Say how sure the first groups of a cell are, and what would settle them."""
    if stability.first_stable:
        return (
            f"Which {stability.first} these are is stable over these {stability.samples} samples."
        )
    text = f"Which {stability.first} these are is undecided with {stability.samples} samples"
    if stability.samples_needed is None:
        return f"{text}, and scores beside the cut are equal."
    return f"{text}; an estimate: about {look.about(stability.samples_needed)} would settle it."


def trusted_ratio(judged: Judgement) -> float | None:
    """Return the median of estimate over truth; none where the scores are not to be trusted."""
    return None if judged.verdict == "do not trust" else judged.ratio


def independent_words(entry: SizesCompared) -> str:
    """Say whether two sizes are independent of each other."""
    if entry.independent == "no":
        return f"no: both scored the same {look.count(entry.scored_larger or 0, 'sample')}"
    if entry.independent == "in part":
        small, large = sorted((entry.scored_smaller or 0, entry.scored_larger or 0))
        return f"in part: {small} of {large} samples are shared"
    return "not known"


def modality_words(cells: Iterable[SummaryCell]) -> str:
    """Say what the samples of a sweep are, by coverage; rows of different ones differ."""
    modalities = dict.fromkeys((cell.coverage, cell.modality) for cell in cells)
    said = "; ".join(f"{coverage}: {samples_words(modality)}" for coverage, modality in modalities)
    if len({modality for _, modality in modalities}) > 1:
        said += ". Scores from different samples are not those of one another"
    return f"{said}."


def samples_words(modality: str) -> str:
    """Say what a sample is."""
    known = {
        "text": "captions alone (text)",
        "image_text": "pictures with their captions (image_text)",
    }
    return known.get(modality, modality)


def drift_words(drift: Drift | None, previous: str | None) -> str:
    """Say in one or two sentences what changed since the sweep before."""
    if previous is None:
        return "This is the first sweep."
    if drift is None:
        return "Not compared with the sweep before."
    same = look.count(drift.identical, "cell")
    if not drift.compared:
        if drift.identical and not drift.not_compared:
            return f"Nothing changed: the same inputs, and so the same results, in {same}."
        return f"{same} with the same inputs; no other cell could be compared."
    causes = sorted({entry.cause for entry in drift.differences})
    changed = f" Changed: {', '.join(causes)}." if causes else " No recorded input differs."
    samples = "the same samples" if drift.paired else "different samples"
    tests = (
        f"{look.count(drift.tested, 'group')} tested in {look.count(drift.compared, 'cell')}, "
        f"on {samples}, false alarms at {look.percent(drift.rate)} over all together"
    )
    if not drift.moved:
        return f"Nothing moved beyond noise ({tests}).{changed}"
    return f"{look.count(drift.moved, 'group')} moved beyond noise ({tests}).{changed}"
