"""What a recipe really costs: the whole model on captions that the sweep did not use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsens.analysis.options import matches
from qsens.config import PairConfig
from qsens.config.models import SIZES, Size
from qsens.engine.captions import read_captions
from qsens.errors import UserError
from qsens.export import modelopt
from qsens.export.recipe import Recipe
from qsens.grid import Plan

if TYPE_CHECKING:
    from qsens.engine.trial import Trial

RECIPE = "recipe"


def check_recipe(
    recipe: Recipe,
    plan: Plan,
    *,
    formats: Mapping[str, PairConfig],
    keep: Sequence[str] = (),
    tied_head: bool = False,
    captions: Path | None = None,
) -> dict[str, Any]:
    """Measure a recipe against each uniform pair that fits, and against ModelOpt's choice.

    All are calibrated on the captions of the recipe's size, and keep the same modules at 16 bits.

    Args:
        recipe: The recipe.
        plan: The plan of its sweep.
        formats: The formats that were to choose from, by name.
        keep: Patterns of groups or modules that the recipe was told to keep.
        tied_head: Whether a tied head might be quantized.
        captions: File of captions to measure on; unused ones of the data set when not given.

    Returns:
        ``{captions, scored, measured: [{name, bits, loss, divergence, scored, predicted}], better:
        [...]}``, the recipe first: how many captions were measured on and scored, increase of the
        loss and KL divergence on the former, KL divergence on the latter; ``better`` names what
        fits the target and has a lower KL divergence.

    Raises:
        UserError: There are no captions that the sweep did not use, or it was one over pictures.
    """
    if any(cell.modality != "text" for cell in plan.cells):
        raise UserError(
            "was scored on pictures, and a recipe is measured on captions alone",
            where=f"sweep {recipe.sweep_id}",
            remedy="Check a recipe of a sweep with coverage=lm_only and dataset.modality=text.",
        )
    texts = held_out(plan, captions)
    kept = [
        member
        for choice in recipe.choices
        if (choice.kind == "head" and plan.checkpoint.tied_head is not False and not tied_head)
        or any(matches(group, choice.members, keep) for group in choice.groups)
        for member in choice.members
    ]
    trial = trial_of(plan, recipe.size, texts, kept)
    predicted = recipe.damage if recipe.damage_unit == "nats a token" else None
    measured = [trial.measure(RECIPE, modelopt.config(recipe), predicted)]
    total = sum(choice.weights for choice in recipe.choices)
    fixed = sum(choice.weights for choice in recipe.choices if choice.members[0] in kept)
    for name, pair in formats.items():
        bits = (16 * fixed + pair.effective_bits * (total - fixed)) / total
        if bits <= recipe.bits_asked + 1e-9:
            measured.append(trial.measure(name, trial.uniform(pair)))
    measured.append(trial.auto_quantize(list(formats.values()), recipe.bits_asked))
    ours, *others = measured
    return {
        "captions": len(texts),
        "scored": trial.scored,
        "measured": [entry.numbers() for entry in measured],
        "better": [
            entry.name
            for entry in others
            if entry.bits <= recipe.bits_asked + 1e-9 and entry.divergence < ours.divergence
        ],
    }


def held_out(plan: Plan, captions: Path | None) -> list[str]:
    """Return captions that no cell of ``plan`` used.

    Args:
        plan: The plan.
        captions: Where to take them from; the data set's largest file when not given.

    Raises:
        UserError: None are left.
    """
    used: set[str] = set()
    for cell in plan.cells:
        read = read_captions(plan.samples[cell.size].path, cell.size)
        used |= set(read[: plan.samples_used(cell)])
    dataset = plan.config.dataset
    largest = max(dataset.files, key=SIZES.index)
    path = captions or dataset.path(largest)
    left = [text for text in read_captions(path, largest) if text not in used]
    if not left:
        raise UserError(
            "holds no caption that the sweep did not use",
            where=f"captions file {path}",
            remedy="Name a file of other captions with --captions FILE.",
        )
    return left


def trial_of(plan: Plan, size: Size, captions: Sequence[str], kept: Sequence[str]) -> Trial:
    """Load the checkpoint, with the captions of a size to calibrate on, and others to measure on.

    Args:
        plan: The plan.
        size: The calibration size.
        captions: Captions to measure on.
        kept: Names of modules that stay at 16 bits.
    """
    from qsens.engine.checkpoint import load_tokenizer
    from qsens.engine.samples import tokenize
    from qsens.engine.trial import Trial
    from qsens.pipeline.loading import groups_of, load

    cell = next(cell for cell in plan.cells if cell.size == size)
    loaded = load(plan, cell, lambda *_: None)
    model, longest = plan.config.model, plan.config.dataset.calib_seq_len
    return Trial(
        model=loaded.model,
        groups=groups_of(plan, cell, loaded.model),
        excluded=model.vision_patterns,
        kept=[modelopt.literal(name) for name in kept],
        calibration=loaded.samples,
        held_out=tokenize(captions, load_tokenizer(model), longest=longest),
        scored=plan.samples_scored(cell),
    )
