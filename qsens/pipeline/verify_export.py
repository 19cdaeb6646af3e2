"""Whether a packed checkpoint is what its recipe promised: loaded, and run beside the original."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from qsens.config import Roots
from qsens.config.block_sizes import E4M3
from qsens.errors import UserError
from qsens.pipeline.evaluate_recipe import evaluation_of, held_out
from qsens.pipeline.export import RECIPE, cells_of
from qsens.published import find_sweep, read_sweep
from qsens.reading import has_file
from qsens.schema.recipe import read_recipe

# Of logits, where activations stay as they are: what rounding in another order leaves, and what
# bfloat16 does, in which compressed-tensors unpacks NVFP4 whatever the checkpoint is.
LOGITS = {False: 1e-3, True: 4e-3}
# Of the KL divergence where activations are quantized, which makes tenths of a nat of 1e-7.
DIVERGENCE = 0.1
_AGAIN = "Name a directory that `qsens export RECIPE DIR` wrote."


def verify_export(
    directory: Path, *, captions: Path | None = None, roots: Roots | None = None
) -> dict[str, Any]:
    """Load a packed checkpoint by transformers, and compare it with the fake-quantized model.

    Both run in float32 on samples that the sweep did not use, beside the unquantized model. Where
    activations stay as they are, logits have to be equal to 0.1 % of the largest (0.4 % with
    NVFP4); where they are quantized, the two KL divergences from the unquantized model to 10 %.

    Args:
        directory: What :func:`qsens.pipeline.export.export_checkpoint` wrote.
        captions: File of samples to measure on; unused ones of the data set when not given.
        roots: Where things lie; from the environment when not given.

    Returns:
        ``{faked, packed, difference, largest, weight_only, agrees, samples}``; see
        :class:`qsens.engine.kl.packed_model.Agreement`.

    Raises:
        UserError: It is no such checkpoint, or cannot be loaded.
    """
    from qsens.checkpoint.loading import load_packed
    from qsens.engine.kl.packed_model import agree
    from qsens.engine.kl.whole import WholeModel
    from qsens.engine.layer_stream import device_of

    if not has_file(directory / RECIPE, remedy=_AGAIN):
        raise UserError(f"has no {RECIPE}", where=f"directory {directory}", remedy=_AGAIN)
    recipe = read_recipe(directory / RECIPE)
    results = (roots or Roots.from_environment()).results
    summary, plan = read_sweep(find_sweep(recipe.sweep_id, results))
    cell = plan.cell(next(iter(cells_of(recipe, summary).values())).cell)
    unused = held_out(plan, cell.modality, captions)
    whole = evaluation_of(plan, cell, unused, (), by_modelopt=False)
    assert isinstance(whole, WholeModel)
    packed = load_packed(directory, device_of(whole.model), plan.config.model.dtype)
    formats = {
        member: recipe.formats[choice.format]
        for choice in recipe.choices
        for member in choice.members
        if choice.format is not None
    }
    found = agree(whole, formats, packed)
    weight_only = all(pair.input_quantizer is None for pair in formats.values())
    if weight_only:
        rounds = any(pair.weight_quantizer.block_type() == E4M3 for pair in formats.values())
        agrees = found.difference <= LOGITS[rounds] * found.largest
    else:
        agrees = abs(found.packed - found.faked) <= DIVERGENCE * found.faked
    return {
        **asdict(found),
        "weight_only": weight_only,
        "agrees": agrees,
        "samples": len(whole.held_out),
    }
