"""The recipe of a sweep: a format for every group, and what it promises."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from qsens.analysis.statistic import statistic_of
from qsens.config import PairConfig
from qsens.config.models import Size
from qsens.errors import UserError
from qsens.recipes.allocation import allocate, allocate_least, outcome
from qsens.recipes.domains import Mix, domains_of, mixed
from qsens.recipes.format_choices import DecisionGroup, build_decision_groups
from qsens.recipes.formats import filters
from qsens.recipes.worst_case import allocate_worst_case
from qsens.schema.recipe import (
    Choice,
    DamageUnit,
    DomainPrediction,
    LeftOut,
    Method,
    Recipe,
    RuntimeUse,
    ScoreCorrection,
)
from qsens.schema.summary import Row, Statistic


def choose(
    cells: Mapping[str, Sequence[Row]],
    formats: Mapping[str, PairConfig],
    target_bits: float | None,
    *,
    max_kl: float | None = None,
    sweep_id: str,
    model: str,
    checkpoint_digest: str,
    size: Size,
    method: Method,
    prices: Mapping[str, ScoreCorrection] | None = None,
    keep: Sequence[str] = (),
    keep_head: bool = False,
    together: Sequence[Collection[str]] = (),
    refused: Mapping[str, Collection[str]] | None = None,
    runtime: RuntimeUse | None = None,
    mix: Mix | None = None,
    worst_case: bool = False,
    left_out: Sequence[LeftOut] = (),
    notices: Sequence[str] = (),
) -> Recipe:
    """Choose a format for every group so that the total score is lowest at ``target_bits``.

    Or, where that is none, so that the bits are fewest within ``max_kl``. Of several data sets
    scored together, that is the score over all their tokens, or that of a mix of them. In the worst
    case, the largest ratio to what each could have alone is least instead.

    Args:
        cells: The rows of the sweep, by the format's name.
        formats: Those formats, by the same names.
        target_bits: Bits a weight, at most; none where ``max_kl`` is the target.
        max_kl: Predicted KL, at most, nats a token; none where bits are the target.
        sweep_id: The sweep.
        model: Directory of the model's results.
        checkpoint_digest: Digest of the checkpoint.
        size: Calibration size of the rows.
        method: The score.
        prices: How the scores of the rows were corrected, by the same names.
        keep: Patterns (fnmatch) of groups or members that stay at 16 bits.
        keep_head: Whether the head stays at 16 bits.
        together: Names of groups that share one format.
        refused: Names of groups that a format is no option for, by the format's name.
        runtime: What it is chosen for.
        mix: Shares of the data sets; those of their tokens when not given.
        worst_case: Whether the worst case decides.
        left_out: Formats of the sweep that are no option, for the record.
        notices: What a reader should know.

    Raises:
        AnswerIsNo: The target is out of reach.
        UserError: A KL divergence is asked for, and the scores are none.
    """
    names = domains_of(cells)

    def decisions_by(weights: Mix | None) -> list[DecisionGroup]:
        rows = cells if weights is None else {n: mixed(each, weights) for n, each in cells.items()}
        return build_decision_groups(
            rows,
            statistic,
            keep=keep,
            keep_head=keep_head,
            together=together,
            refused=refused,
        )

    statistic = statistic_of(method, (row for rows in cells.values() for row in rows))
    unit = _unit(method, statistic)
    of_domains = {name: decisions_by({name: 1.0}) for name in names}
    decisions = decisions_by(mix)
    if worst_case:
        assert target_bits is not None
        chosen = allocate_worst_case(list(of_domains.values()), target_bits)[0].chosen
        allocated = outcome(decisions, chosen)
    elif target_bits is not None:
        allocated = allocate(decisions, target_bits)
    else:
        assert max_kl is not None
        if unit != "nats a token":
            raise UserError(
                f"its scores are no KL divergence (method {method})",
                where=f"--max-kl, sweep {sweep_id}",
                remedy="Ask for --bits, or sweep with autoquant.method=fisher.",
            )
        allocated = allocate_least(decisions, max_kl)
    bits = allocated.bits if target_bits is None else target_bits
    rows = {row.layer: row for rows in cells.values() for row in rows}
    choices = [
        Choice(
            groups=decision.groups,
            members=tuple(name for layer in decision.groups for name in rows[layer].members),
            kind=rows[decision.groups[0]].kind,
            depth=rows[decision.groups[0]].depth,
            format=choice.format,
            bits=choice.bits,
            weights=decision.weights,
            damage=choice.score,
        )
        for decision, choice in zip(decisions, allocated.choices, strict=True)
    ]
    outside = {name for row in rows.values() if row.status == "disabled" for name in row.members}
    used = {choice.format for choice in choices}
    return Recipe(
        sweep_id=sweep_id,
        model=model,
        checkpoint_digest=checkpoint_digest,
        size=size,
        method=method,
        damage_unit=unit,
        bits_asked=bits,
        max_kl=max_kl,
        bits=allocated.bits,
        damage=allocated.score,
        domains=tuple(
            DomainPrediction(
                name=name,
                share=None if mix is None else mix[name],
                damage=outcome(own, allocated.chosen).score,
                best=allocate(own, bits).score,
            )
            for name, own in of_domains.items()
        ),
        formats={name: formats[name] for name in cells if name in used},
        runtime=runtime,
        prices={name: price for name, price in (prices or {}).items() if name in used},
        choices=tuple(sorted(choices, key=lambda choice: _natural(choice.groups[0]))),
        outside=tuple(sorted(outside, key=_natural)),
        left_out=tuple(left_out),
        notices=(
            *notices,
            *(
                f"{name} is experimental: nobody is known to deploy it"
                for name in cells
                if name in used and formats[name].experimental
            ),
            *filters.notices(
                member
                for choice in choices
                if choice.format is not None
                for member in choice.members
            ),
        ),
    )


def _unit(method: Method, statistic: Statistic) -> DamageUnit:
    """Return the unit of the scores; ModelOpt's own ``kl_div`` does not say its tokens."""
    if method == "gradient":
        return "gradient score"
    return "nats a token" if statistic == "sensitivity_per_token" else "score of the method"


def header(recipe: Recipe, tool: str) -> str:
    """Return the comment that opens a recipe's YAML file.

    Args:
        recipe: The recipe.
        tool: What takes the file, in words.
    """
    lines = [
        f"{recipe.bits:.4f} bits a weight ({_asked(recipe)} asked), for {tool}.",
        f"Model {recipe.model}, checkpoint {recipe.checkpoint_digest[:12]}, "
        f"sweep {recipe.sweep_id}, size {recipe.size}.",
        f"{predicted(recipe.damage, recipe.damage_unit)} (method {recipe.method}), a sum over "
        "groups, each taken alone.",
    ]
    if recipe.runtime is not None:
        lines.append(f"Chosen for {recipe.runtime.words}.")
    lines += [domain_words(entry, recipe.damage_unit) for entry in recipe.domains]
    for name, groups, weights in tally(recipe):
        lines.append(f"{name or '16 bits'}: {weights} weights, {groups} of the groups")
    lines += [f"{name}: {correction_words(entry)}" for name, entry in recipe.prices.items()]
    lines += [f"Left out: {entry.words}" for entry in recipe.left_out]
    lines += [f"Note: {notice}" for notice in recipe.notices]
    # What a name brings along must stay within the comment.
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


def _asked(recipe: Recipe) -> str:
    if recipe.max_kl is None:
        return f"{recipe.bits_asked:g}"
    return f"the fewest within {recipe.max_kl:g} nats a token"


def predicted(total: float, unit: DamageUnit) -> str:
    """Say what a recipe is predicted to cost; only nats a token are a KL divergence."""
    if unit == "nats a token":
        return f"Predicted KL {total:.6g} nats a token"
    return f"Predicted {unit} {total:.6g}, which is no KL"


def domain_words(domain: DomainPrediction, unit: DamageUnit) -> str:
    """Say what a recipe is predicted to cost one data set."""
    share = "" if domain.share is None else f" ({100 * domain.share:.0f} % of the tokens)"
    over = f", {domain.damage / domain.best:.3f} times the best for it alone" if domain.best else ""
    return f"{domain.name}{share}: {predicted(domain.damage, unit)}{over}"


def correction_words(correction: ScoreCorrection) -> str:
    """Say how the scores of a format were corrected."""
    if correction.source == "true divergences":
        return "measured KL of every group"
    if correction.verdict is None:
        return "scores that were not audited"
    audited = f"audited with the verdict {correction.verdict}"
    if correction.ratio is None:
        return f"scores, {audited}"
    return f"scores over {correction.ratio:.3f}, their ratio to the measured KL, {audited}"


def tally(recipe: Recipe) -> list[tuple[str | None, int, int]]:
    """Return each format with its groups and weights; what stays at 16 bits comes last."""
    rows = []
    for name in (*recipe.formats, None):
        chosen = [choice for choice in recipe.choices if choice.format == name]
        groups = sum(len(choice.groups) for choice in chosen)
        if groups:
            rows.append((name, groups, sum(choice.weights for choice in chosen)))
    return rows


def members_of(recipe: Recipe, name: str | None) -> list[str]:
    """Return the modules of a format, in model order; those that stay at 16 bits for none."""
    return [
        member for choice in recipe.choices if choice.format == name for member in choice.members
    ]


def experts_of(recipe: Recipe) -> set[str]:
    """Return the modules that hold all experts of a layer."""
    return {
        member for choice in recipe.choices if choice.kind == "experts" for member in choice.members
    }


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
