"""A recipe of mixed precision from a published sweep. Never computes a score, imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsens.analysis.series import of_coverage, series_of
from qsens.cells import format_name, is_named, refuse_unknown
from qsens.config import Roots
from qsens.config.models import SIZES, Coverage, Size
from qsens.config.runtime import Gpu, load_runtime
from qsens.documents import dump_json
from qsens.errors import AnswerIsNo, UserError
from qsens.grid import Plan
from qsens.pipeline.deployment import Target, deployment_of, layout_words, said_of, taker, use_of
from qsens.pipeline.packing import pack
from qsens.published import find_sweep, read_sweep
from qsens.recipes.domains import domains_of, mix_of, read_mix, refuse_one
from qsens.recipes.format_choices import UNQUANTIZED_BITS, matches
from qsens.recipes.formats import llm_compressor, modelopt
from qsens.recipes.formats.evidence import choose, tally
from qsens.recipes.runtime import Deployment, Ruling
from qsens.recipes.score_correction import correct
from qsens.schema.recipe import LeftOut, Recipe
from qsens.schema.summary import Summary, SummaryCell
from qsens.writing import write_text


def write_recipe(
    where: str,
    *,
    bits: float | None = None,
    max_kl: float | None = None,
    target: Target,
    size: Size | None = None,
    coverage: Coverage | None = None,
    pairs: Sequence[str] = (),
    keep: Sequence[str] = (),
    tied_head: bool = False,
    mix: str | None = None,
    worst_case: bool = False,
    out: Path | None = None,
    check: bool = False,
    captions: Path | None = None,
    runtime: str | None = None,
    gpu: Gpu | None = None,
    tensor_parallel: int | None = None,
    roots: Roots | None = None,
) -> dict[str, Any]:
    """Choose a recipe from a sweep, and write it for a tool.

    Args:
        where: A sweep's directory, its ``summary.json``, or its id under the results root.
        bits: Bits a weight, at most.
        max_kl: Predicted KL, at most, nats a token: the recipe has the fewest bits within it. One
            of the two is given.
        target: Who takes it.
        size: Calibration size of the scores; the largest that has results when not given.
        coverage: Coverage of the scores; the widest that has results when not given.
        pairs: The pairs to choose from; all of the sweep when not given.
        keep: Patterns (fnmatch) of groups or modules that stay at 16 bits.
        tied_head: Whether a head that is tied to the embedding may be quantized too.
        mix: Shares of the sweep's data sets, ``chat=0.7,code=0.3``; those of its tokens when not
            given.
        worst_case: Whether the least maximum over the data sets is asked for instead, of what each
            costs over what it could cost by itself.
        out: Where to write it; nothing is written when not given.
        check: Whether to measure it, see :func:`qsens.pipeline.evaluate_recipe.check_recipe`.
        captions: File of captions to measure on.
        runtime: Name of a file below ``configs/runtime/``: what that forbids is no option.
        gpu: GPU generation that it runs on; any when not given.
        tensor_parallel: GPUs that it cuts every layer over; 1 when not given.
        roots: Where things lie; from the environment when not given.

    Returns:
        ``{sweep_id, size, target, bits_asked, max_kl, bits, damage, damage_unit, runtime, domains,
        formats, prices, left_out, notices, path, check, recipe}``; ``check`` only where asked for;
        ``recipe`` is the text, left out where it was written.

    Raises:
        UserError: There is no such sweep, it has no results at that size, a pattern matches
            nothing, or the target is none.
        AnswerIsNo: The target is out of reach.
    """
    if (bits is None) == (max_kl is None):
        raise UserError(
            "names no target" if bits is None else "names two targets",
            where="--bits, --max-kl",
            remedy="Ask for bits a weight, or for a predicted KL in nats a token.",
        )
    if max_kl is not None and not 0 <= max_kl < math.inf:
        raise UserError(
            f"{max_kl:g} nats a token are no target", where="--max-kl", remedy="Ask for 0 or more."
        )
    if max_kl is not None and worst_case:
        raise UserError(
            "is over the mean of all data sets, which the worst case leaves",
            where="--max-kl with --worst-case",
            remedy="Ask for --bits with --worst-case.",
        )
    if bits is not None and not 0 < bits <= UNQUANTIZED_BITS:
        raise UserError(
            f"{bits:g} bits a weight are no target", where="--bits", remedy="Ask for 0 to 16 bits."
        )
    if mix is not None and worst_case:
        raise UserError(
            "weighs the data sets, and the worst case does not",
            where="--mix with --worst-case",
            remedy="Leave one of them out.",
        )
    roots = roots or Roots.from_environment()
    deployment = deployment_of(runtime, gpu, tensor_parallel, roots)
    directory = find_sweep(where, roots.results)
    summary, plan = read_sweep(directory)
    recipe = recipe_of(
        summary,
        plan,
        bits,
        max_kl=max_kl,
        size=size,
        coverage=coverage,
        pairs=pairs,
        keep=keep,
        tied_head=tied_head,
        target=target,
        mix=read_mix(mix) if mix is not None else None,
        worst_case=worst_case,
        deployment=deployment,
        roots=roots,
    )
    text = dump(recipe, target)
    if out is not None:
        write_text(out, text)
    checked = None
    if check:
        from qsens.pipeline.evaluate_recipe import check_recipe

        cells = _cells(summary, recipe.size, coverage, pairs)
        left_out = {entry.format for entry in recipe.left_out if not entry.modules}
        checked = check_recipe(
            recipe,
            plan,
            plan.cell(cells[0].cell),
            formats={
                name: plan.cell(cell.cell).precision
                for cell in cells
                if (name := format_name(cell)) not in left_out
            },
            keep=keep,
            tied_head=tied_head,
            captions=captions,
        )
    return {
        "sweep_id": recipe.sweep_id,
        "size": recipe.size,
        "target": target,
        "bits_asked": recipe.bits_asked,
        "max_kl": recipe.max_kl,
        "bits": recipe.bits,
        "damage": recipe.damage,
        "damage_unit": recipe.damage_unit,
        "runtime": recipe.runtime.model_dump() if recipe.runtime is not None else None,
        "domains": [entry.model_dump() for entry in recipe.domains],
        "formats": [
            {"format": name, "groups": groups, "weights": weights}
            for name, groups, weights in tally(recipe)
        ],
        "prices": {name: entry.model_dump() for name, entry in recipe.prices.items()},
        "left_out": [entry.model_dump() for entry in recipe.left_out],
        "notices": list(recipe.notices),
        "path": str(out.resolve()) if out is not None else None,
        **({"check": checked} if checked is not None else {}),
        **({} if out is not None else {"recipe": text}),
    }


def dump(recipe: Recipe, target: Target) -> str:
    """Return the recipe as the text that ``target`` takes."""
    if target == "modelopt":
        return modelopt.dump(recipe)
    if target == "llm-compressor":
        return llm_compressor.dump(recipe)
    return dump_json(recipe.model_dump(mode="json"))


def recipe_of(
    summary: Summary,
    plan: Plan,
    bits: float | None,
    *,
    max_kl: float | None = None,
    size: Size | None = None,
    coverage: Coverage | None = None,
    pairs: Sequence[str] = (),
    keep: Sequence[str] = (),
    tied_head: bool = False,
    target: Target = "json",
    mix: Mapping[str, float] | None = None,
    worst_case: bool = False,
    deployment: Deployment | None = None,
    roots: Roots | None = None,
) -> Recipe:
    """Choose a recipe from a sweep.

    Args:
        summary: What the sweep found.
        plan: The plan of the same sweep.
        bits: Bits a weight, at most; none where ``max_kl`` is the target.
        max_kl: Predicted KL, at most, nats a token; none where bits are the target.
        size: Calibration size of the scores; the largest that has results when not given.
        coverage: Coverage of the scores; the widest that has results when not given.
        pairs: The pairs to choose from; all of the sweep when not given.
        keep: Patterns (fnmatch) of groups or modules that stay at 16 bits.
        tied_head: Whether a head that is tied to the embedding may be quantized too.
        target: Who takes it: what that cannot take is no option.
        mix: Shares of the sweep's data sets, by name; those of its tokens when not given.
        worst_case: Whether the least maximum over the data sets is asked for instead.
        deployment: The runtime that it is for: what that forbids is no option.
        roots: Where the files of runtimes lie; from the environment when not given.

    Raises:
        UserError: No results at that size, or a pattern matches nothing.
        AnswerIsNo: The target is out of reach.
    """
    cells = _cells(summary, size, coverage, pairs)
    chosen_size, chosen_coverage = cells[0].size, cells[0].coverage
    formats = {format_name(cell): plan.cell(cell.cell).precision for cell in cells}
    left_out = [
        LeftOut(format=format_name(cell), reason=cell.reason or "no result")
        for cell in summary.cells
        if (cell.size, cell.coverage, cell.domain) == (chosen_size, chosen_coverage, None)
        and not cell.done
        and is_named(cell, pairs)
    ]
    packs = target == "llm-compressor"
    # What llm-compressor writes, vLLM loads, as a rule.
    reader = deployment or (Deployment(load_runtime("vllm", roots)) if packs else None)
    rulings = {name: reader.ruling(pair) for name, pair in formats.items()} if reader else {}
    for name, pair in list(formats.items()):
        reason = llm_compressor.refusal(pair) if packs else None
        if target == "modelopt" and not pair.by_modelopt:
            reason = "ModelOpt does not compute it: its reference is compressed-tensors"
        ruling = rulings.get(name, Ruling())
        if reason is None and (deployment is not None or ruling.misread):
            reason = ruling.refusal
        if reason is not None:
            del formats[name]
            left_out.append(LeftOut(format=name, reason=reason))
    if not formats:
        raise UserError(
            f"none of its pairs can be given to {taker(target, deployment)}: " + _listed(left_out),
            where=f"sweep {summary.sweep_id}",
            remedy="Sweep other pairs, `qsens sweep serving`, or "
            + ("leave --for out." if deployment else "export with --to modelopt."),
        )
    corrected = correct(
        {format_name(cell): cell.rows for cell in cells if format_name(cell) in formats},
        {
            format_name(cell): audit
            for cell in cells
            for audit in summary.audit
            if series_of(audit) == series_of(cell)
        },
        {format_name(cell): cell.digest for cell in cells},
    )
    left_out += [LeftOut(format=name, reason=why) for name, why in corrected.refused.items()]
    rows = corrected.rows
    if not rows:
        raise UserError(
            "none of its pairs can be trusted: " + _listed(left_out),
            where=f"sweep {summary.sweep_id}",
            remedy="Measure all groups with `qsens audit --full` and publish again.",
        )
    _refuse_idle_patterns(rows, keep)
    where, domains = f"sweep {summary.sweep_id}", domains_of(rows)
    shares = mix_of(mix, domains, where=where) if mix is not None else None
    if worst_case:
        refuse_one(domains, where=where)
    notices = [
        f"PARTIAL: {cell.cell}: {reason}"
        for cell in cells
        for reason in cell.partial
        if format_name(cell) in rows
    ]
    if coverage is None and len({cell.coverage for cell in summary.done}) > 1:
        notices.append(f"the sweep has several coverages: scores of {chosen_coverage} are used")
    tied = plan.checkpoint.tied_head
    keep_head = tied is not False and not tied_head
    if keep_head:
        known = "is tied to the embedding" if tied else "may be tied to the embedding"
        notices.append(f"the head {known}: it is left at 16 bits")
    packing = pack(rows, formats, plan.checkpoint.path, packs=packs, deployment=deployment)
    left_out += packing.left_out
    notices += packing.notices
    try:
        recipe = choose(
            packing.rows,
            {name: formats[name] for name in rows},
            bits,
            max_kl=max_kl,
            prices=corrected.corrections,
            sweep_id=summary.sweep_id,
            model=summary.model,
            checkpoint_digest=summary.checkpoint_digest,
            size=chosen_size,
            method=plan.config.autoquant.method,
            keep=keep,
            keep_head=keep_head,
            together=packing.together,
            refused=packing.refused,
            runtime=use_of(deployment) if deployment is not None else None,
            mix=shares,
            worst_case=worst_case,
            left_out=left_out,
            notices=notices,
        )
    except AnswerIsNo as error:
        if left_out:
            error.remedy += f" Left out: {_listed(left_out)}."
        raise
    said = [words for name in recipe.formats for words in said_of(name, rulings, deployment)]
    if deployment is not None:
        said += layout_words(deployment, target)
    return recipe.model_copy(update={"notices": (*recipe.notices, *said)})


def _cells(
    summary: Summary, size: Size | None, coverage: Coverage | None, pairs: Sequence[str]
) -> list[SummaryCell]:
    refuse_unknown(pairs, summary.cells, where=f"sweep {summary.sweep_id}")
    together = [cell for cell in summary.done if cell.domain is None]
    done = of_coverage([cell for cell in together if is_named(cell, pairs)], coverage)
    sizes = {cell.size for cell in done}
    wanted = size or max(sizes, key=SIZES.index, default=None)
    chosen = [cell for cell in done if cell.size == wanted]
    if not chosen:
        of = f" of {coverage}" if coverage else ""
        known = ", ".join(sorted(sizes, key=SIZES.index)) or "none"
        raise UserError(
            f"has no result of size '{size}'" if size else f"has no results{of}",
            where=f"sweep {summary.sweep_id}",
            remedy=f"Sizes with results: {known}.",
        )
    return chosen


def _listed(left_out: Sequence[LeftOut]) -> str:
    return "; ".join(entry.words for entry in left_out)


def _refuse_idle_patterns(rows: Mapping[str, Sequence[Any]], keep: Sequence[str]) -> None:
    groups = {row.layer: row.members for each in rows.values() for row in each}
    for pattern in keep:
        if not any(matches(layer, members, [pattern]) for layer, members in groups.items()):
            raise UserError(
                f"'{pattern}' matches no group and no module",
                where="--keep",
                remedy=f"Names look like {min(groups)}; * stands for anything.",
            )
