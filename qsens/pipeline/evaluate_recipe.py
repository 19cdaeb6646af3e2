"""What a recipe really costs: the whole model on samples that the sweep did not use."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsens.cells import CellSpec
from qsens.config import PairConfig
from qsens.config.models import SIZES, Modality
from qsens.data.captions import read_samples, samples_of
from qsens.data.records import Record
from qsens.errors import UserError
from qsens.grid import Plan
from qsens.recipes.format_choices import matches
from qsens.recipes.formats import modelopt
from qsens.schema.recipe import Recipe

if TYPE_CHECKING:
    from qsens.engine.kl.whole import WholeModel
    from qsens.engine.modelopt.end_to_end import EndToEnd

RECIPE = "recipe"
log = logging.getLogger(__name__)


def check_recipe(
    recipe: Recipe,
    plan: Plan,
    cell: CellSpec,
    *,
    formats: Mapping[str, PairConfig],
    keep: Sequence[str] = (),
    tied_head: bool = False,
    captions: Path | None = None,
) -> dict[str, Any]:
    """Measure a recipe against each uniform pair that fits, and against ModelOpt's choice.

    All are calibrated on the samples of ``cell``, and keep the same modules at 16 bits. Where a
    second copy of the model has no room, or ModelOpt does not compute some format, its choice is
    left out.

    Args:
        recipe: The recipe.
        plan: The plan of its sweep.
        cell: A cell of the size and the coverage that it was chosen from.
        formats: The formats that were to choose from, by name.
        keep: Patterns of groups or modules that the recipe was told to keep.
        tied_head: Whether a tied head might be quantized.
        captions: File of samples to measure on; unused ones of the data set when not given.

    Returns:
        ``{captions, scored, floor, measured: [{name, bits, loss, divergence, scored, predicted}],
        better: [...]}``, the recipe first: how many captions were measured on and scored, increase
        of the loss and KL divergence on the former, KL divergence on the latter; ``floor`` is what
        rounding to the model's own data type costs by itself, on the former; ``better`` names what
        fits the target and has a lower KL divergence.

    Raises:
        UserError: There are no samples that the sweep did not use.
    """
    from qsens.engine.modelopt.end_to_end import EndToEnd  # imports torch and ModelOpt

    kept = [
        member
        for choice in recipe.choices
        if (choice.kind == "head" and plan.checkpoint.tied_head is not False and not tied_head)
        or any(matches(group, choice.members, keep) for group in choice.groups)
        for member in choice.members
    ]
    kept += recipe.outside
    predicted = recipe.damage if recipe.damage_unit == "nats a token" else None
    total = sum(choice.weights for choice in recipe.choices)
    fixed = sum(choice.weights for choice in recipe.choices if choice.members[0] in kept)
    uniform = {
        name: pair
        for name, pair in formats.items()
        if (16 * fixed + pair.effective_bits * (total - fixed)) / total <= recipe.bits_asked + 1e-9
    }
    by_modelopt = all(pair.by_modelopt for pair in formats.values())
    evaluation = evaluation_of(
        plan, cell, held_out(plan, cell.modality, captions), kept, by_modelopt=by_modelopt
    )
    if isinstance(evaluation, EndToEnd):
        measured = [evaluation.measure(RECIPE, modelopt.config(recipe), predicted)]
        for name, pair in uniform.items():
            measured.append(evaluation.measure(name, evaluation.uniform(pair)))
        measured.append(evaluation.auto_quantize(list(formats.values()), recipe.bits_asked))
    else:
        why = (
            "a second copy of the model has no room"
            if by_modelopt
            else "ModelOpt does not compute formats of compressed-tensors"
        )
        log.warning(f"{why}: its own choice is left out")
        chosen = {
            member: recipe.formats[choice.format]
            for choice in recipe.choices
            for member in choice.members
            if choice.format is not None
        }
        everywhere = [
            member for choice in recipe.choices for member in choice.members if member not in kept
        ]
        measured = [evaluation.measure(RECIPE, chosen, predicted)]
        for name, pair in uniform.items():
            measured.append(evaluation.measure(name, dict.fromkeys(everywhere, pair)))
    ours, *others = measured
    return {
        "captions": len(evaluation.held_out),
        "scored": evaluation.scored,
        "floor": evaluation.floor(),
        "measured": [entry.numbers() for entry in measured],
        "better": [
            entry.name
            for entry in others
            if entry.bits <= recipe.bits_asked + 1e-9 and entry.divergence < ours.divergence
        ],
    }


def held_out(
    plan: Plan, modality: Modality, captions: Path | None = None
) -> dict[str, list[Record]]:
    """Return samples that no cell of ``plan`` used, by data set.

    Args:
        plan: The plan.
        modality: What a sample is.
        captions: Where to take them from; the data sets' largest files when not given.

    Raises:
        UserError: None are left.
    """
    pictures = modality == "image_text"

    def key(record: Record) -> object:
        return record.images if pictures else record.caption

    used: set[object] = set()
    for cell in plan.cells:
        if cell.modality == "text" and pictures:
            continue
        for one in cell.sets:
            used |= {key(record) for record in samples_of(one)}
    left: dict[str, list[Record]] = {}
    for dataset in plan.config.dataset[: 1 if captions is not None else None]:
        largest = max(dataset.files, key=SIZES.index)
        paths = (captions,) if captions is not None else dataset.paths(largest)
        kind = "auto" if captions is not None else dataset.format
        left[dataset.name] = [
            record
            for record in read_samples(paths, largest, kind, each_turn=dataset.turns == "each")
            if key(record) not in used and not record.fault
        ]
        if not left[dataset.name]:
            raise UserError(
                f"holds no {'picture' if pictures else 'caption'} that the sweep did not use",
                where=f"captions file {', '.join(map(str, paths))}",
                remedy="Name a file of others: --captions FILE, or --samples FILE of check-server.",
            )
    return left


def evaluation_of(
    plan: Plan,
    cell: CellSpec,
    held_out: Mapping[str, Sequence[Record]],
    kept: Sequence[str],
    *,
    by_modelopt: bool = True,
) -> EndToEnd | WholeModel:
    """Load the checkpoint, with the samples of a cell to calibrate on, and others to measure on.

    ModelOpt quantizes a copy where there is room for one, and it computes all formats.

    Args:
        plan: The plan.
        cell: The cell.
        held_out: What to measure on, by data set.
        kept: Names of modules that stay at 16 bits.
        by_modelopt: Whether ModelOpt computes all formats that are to be measured.
    """
    from qsens.data.samples import Samples
    from qsens.engine.kl.whole import WholeModel
    from qsens.engine.modelopt.end_to_end import EndToEnd
    from qsens.engine.placement import has_room_for_copy
    from qsens.pipeline.loading import groups_of, load_checkpoint, read_as, with_samples

    checkpoint = load_checkpoint(plan, lambda *_: None)
    loaded = with_samples(plan, cell, checkpoint)
    measured_on = [
        read_as(cell.modality, held_out[dataset.name], plan, dataset, checkpoint)
        for dataset in plan.config.dataset
        if dataset.name in held_out
    ]
    common: dict[str, Any] = {
        "model": loaded.model,
        "groups": groups_of(plan, cell, loaded.model),
        "calibration": loaded.samples,
        "held_out": Samples.joined(measured_on),
        "scored": cell.scored,
    }
    room = has_room_for_copy(loaded.model, plan.config.autoquant.memory_gb)
    if not (by_modelopt and room):
        return WholeModel(**common)
    outside = () if cell.coverage == "all_layers" else plan.config.model.vision_patterns
    return EndToEnd(**common, excluded=outside, kept=[modelopt.literal(name) for name in kept])
