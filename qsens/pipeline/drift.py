"""A sweep against the one before it: reads both results, and tests what moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from qsens.analysis.drift import RATE, Change, changes, moved
from qsens.analysis.provenance import differences, inputs, settings
from qsens.analysis.ranking import normalise_name
from qsens.analysis.samples import SampleScores
from qsens.analysis.series import largest_cells, series_of
from qsens.errors import UserError
from qsens.grid import Plan, read_plan
from qsens.pipeline.stored import Result
from qsens.published import read_summary
from qsens.schema.summary import Difference, Drift, Moved, NotCompared, Summary, SummaryCell
from qsens.store import CELLS, PLAN, SUMMARY


def find_drift(
    plan: Plan, summary: Summary, sweeps: Path, results: Mapping[str, Result]
) -> Drift | None:
    """Compare a sweep with the one before it; none where there is none, or it cannot be read.

    Pairs are compared at the largest size that both sweeps have, so that no sample is tested
    twice.

    Args:
        plan: The sweep's plan.
        summary: The sweep, without its drift.
        sweeps: The directory that holds both sweeps.
        results: The results of the sweep, by cell id.
    """
    if summary.previous is None:
        return None
    directory = sweeps / summary.previous
    try:
        earlier = read_summary(directory / SUMMARY)
    except UserError:
        return None
    before = {cell.cell: cell for cell in earlier.done}
    common = largest_cells(cell for cell in summary.done if cell.cell in before)
    changed: dict[tuple[str, str], Change] = {}
    causes: list[Difference] = list(_plan_differences(directory, plan))
    compared: list[str] = []
    refused: list[NotCompared] = []
    identical, all_paired = 0, True
    for cell in common:
        if before[cell.cell].digest == cell.digest:
            identical += 1
            continue
        try:
            then = Result.read(plan.results / CELLS / before[cell.cell].digest)
        except UserError as error:
            refused.append(NotCompared(cell=cell.cell, reason=f"a result {error.what}"))
            continue
        pair = (then, results[cell.cell])
        causes += differences(*(inputs(result.manifest) for result in pair))
        reason, paired = comparable(*pair)
        if reason is not None:
            refused.append(NotCompared(cell=cell.cell, reason=reason))
            continue
        one, other = (normalised(result.samples) for result in pair if result.samples is not None)
        compared.append(cell.cell)
        all_paired &= paired
        for layer, change in changes(one, other, paired=paired).items():
            changed[cell.cell, layer] = change
    refused += _without_partner(summary, earlier, common)
    names = {
        (cell.cell, normalise_name(row.layer)): row.layer for cell in common for row in cell.rows
    }
    return Drift(
        previous=summary.previous,
        identical=identical,
        compared=tuple(compared),
        paired=all_paired,
        tested=len(changed),
        rate=RATE,
        moved=tuple(
            Moved(
                cell=cell,
                layer=names.get((cell, layer), layer),
                before=change.before,
                after=change.after,
                half_width=change.half_width,
                p_value=change.p_value,
            )
            for (cell, layer), change in moved(changed).items()
        ),
        differences=distinct(causes),
        not_compared=tuple(refused),
    )


def comparable(before: Result, after: Result) -> tuple[str | None, bool]:
    """Return why two results cannot be compared, if so, and whether their samples are the same."""
    methods = [result.manifest.scheme.auto_quantize_method for result in (before, after)]
    if methods[0] != methods[1]:
        return f"its method was {methods[0]}, and is {methods[1]} now", False
    if before.samples is None or after.samples is None:
        return "its noise is unknown: no scores of every sample", False
    datasets = [result.manifest.dataset for result in (before, after)]
    same_file = (
        all(datasets)
        and len(
            {(entry.digest, entry.modality, entry.pictures_digest) for entry in datasets if entry}
        )
        == 1
    )
    # The same captions with other tokens are other samples.
    tokens = [result.tokens for result in (before.samples, after.samples)]
    paired = (
        same_file and tokens[0].shape == tokens[1].shape and bool((tokens[0] == tokens[1]).all())
    )
    return None, paired


def _without_partner(
    summary: Summary, earlier: Summary, common: Iterable[SummaryCell]
) -> list[NotCompared]:
    shared = {series_of(cell) for cell in common}
    now = [cell for cell in largest_cells(summary.cells) if series_of(cell) not in shared]
    then = {series_of(cell) for cell in earlier.cells}
    return [
        NotCompared(
            cell=cell.cell,
            reason="no size in common with the sweep before"
            if series_of(cell) in then
            else "not in the sweep before",
        )
        for cell in now
    ]


def _plan_differences(directory: Path, plan: Plan) -> tuple[Difference, ...]:
    try:
        earlier = read_plan(directory / PLAN)
    except UserError:
        return ()
    return differences(*(settings(one.config.model_dump(mode="json")) for one in (earlier, plan)))


def normalised(samples: SampleScores) -> SampleScores:
    """Return the same, with names as they compare."""
    names = tuple(normalise_name(name) for name in samples.groups)
    return SampleScores(names, samples.scores, samples.tokens)


def distinct(given: Iterable[Difference]) -> tuple[Difference, ...]:
    """Return each difference once; a setting that plan and manifest both state counts once."""
    aliases = {
        "autoquant.method": "method",
        "autoquant.score_size": "score size",
        "autoquant.effective_bits": "target of effective bits",
        "autoquant.engine": "engine",
    }
    kept = {
        (one.cause, aliases.get(one.what, one.what), one.before, one.after): one for one in given
    }
    return tuple(sorted(kept.values(), key=lambda one: (one.cause, one.what)))
