"""From a recipe to a packed checkpoint that servers load. Imports torch when it runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsens.cells import format_name
from qsens.checkpoint.files import find_weights, read_config, served_files
from qsens.checkpoint.quantized import read_quantization
from qsens.checksums import digest_of
from qsens.config import PairConfig, Roots
from qsens.documents import dump_json
from qsens.errors import UserError
from qsens.grid import Plan
from qsens.locks import held, lock_at
from qsens.pipeline.plan import identify_checkpoint
from qsens.pipeline.shapes import by_inner_name, stored_weights
from qsens.published import find_sweep, read_sweep
from qsens.reading import read_json
from qsens.recipes.formats import llm_compressor
from qsens.schema.recipe import Choice, Recipe, read_recipe
from qsens.schema.summary import Summary, SummaryCell
from qsens.store import Store
from qsens.writing import copy_file, make_directory, write_text, writing

if TYPE_CHECKING:
    from qsens.export.shards import PackedModule

RECIPE = "qsens-recipe.json"
# What a half-written checkpoint is of: it is gone on with where that is the same.
_OF = "qsens-export.json"
_AGAIN = "Write the recipe again with `qsens recipe SWEEP --to json --out FILE`."
_TIED = "tie_word_embeddings"
_DTYPE = ("dtype", "torch_dtype")

Progress = Callable[[str, int, int], None]


def export_checkpoint(
    recipe_file: Path, directory: Path, *, progress: Progress, roots: Roots | None = None
) -> dict[str, Any]:
    """Write the checkpoint of a recipe, packed as compressed-tensors stores it.

    It is written beside ``directory``, file by file, and renamed once it is whole. What a run that
    was ended has left there is gone on with.

    Args:
        recipe_file: What ``qsens recipe --to json`` wrote.
        directory: Where the checkpoint goes; not there yet, or empty.
        progress: Called with a phase, steps done, and steps in all.
        roots: Where things lie; from the environment when not given.

    Returns:
        ``{path, bits, weight_bytes, source_bytes, modules}``: bytes of the weight files, theirs and
        of the checkpoint that they come from, and how many modules were packed.

    Raises:
        UserError: The directory holds something, the recipe's sweep or checkpoint is gone or
            changed, or the recipe holds what cannot be packed.
        DiskFull: The disk is full; what is whole is kept for the next run.
        TryAgain: Another process writes it.
    """
    _refuse_full(directory)
    packer = _packer()
    recipe = read_recipe(recipe_file)
    results = (roots or Roots.from_environment()).results
    summary, plan = read_sweep(find_sweep(recipe.sweep_id, results))
    _refuse_another_checkpoint(recipe, plan)
    _refuse_unpackable(recipe)
    half = directory.with_name(f".{directory.name}.qsens-export")
    lock = lock_at(directory.with_name(f".{directory.name}.qsens-export.lock"))
    with held(lock, where=str(directory), wait=False):
        _begin(half, digest_of({"recipe": recipe.model_dump(mode="json"), "by": packer}))
        written = _write(recipe, recipe_file, summary, plan, half, progress)
        with writing(directory.parent):
            half.replace(directory)
    return {"path": str(directory.resolve()), **written}


def _write(
    recipe: Recipe,
    recipe_file: Path,
    summary: Summary,
    plan: Plan,
    half: Path,
    progress: Progress,
) -> dict[str, Any]:
    import torch

    from qsens.export.settings import quantization_config
    from qsens.export.shards import write_shards

    source = plan.config.model.path
    weights = find_weights(source)
    modules = _modules(recipe, plan, summary)
    total = write_shards(weights, modules, half, getattr(torch, plan.config.model.dtype), progress)
    chosen = {name: choice.format for choice in recipe.choices for name in choice.members}
    config = read_config(source)
    config["quantization_config"] = quantization_config(
        recipe.formats,
        {name: format_ for name, format_ in chosen.items() if format_ is not None},
        [*(name for name, format_ in chosen.items() if format_ is None), *recipe.outside],
    )
    _say(config, _DTYPE, plan.config.model.dtype)
    if any(choice.kind == "head" and choice.format is not None for choice in recipe.choices):
        _say(config, (_TIED,), False)
    for file in served_files(source):
        copy_file(file, half / file.name, remedy="Run it again.")
    write_text(half / "config.json", json.dumps(config, indent=2) + "\n")
    copy_file(recipe_file, half / RECIPE, remedy=_AGAIN)
    with writing(half):
        (half / _OF).unlink()
    return {
        "bits": recipe.bits,
        "weight_bytes": total,
        "source_bytes": sum(file.stat().st_size for file in weights.files),
        "modules": len(modules),
    }


def _modules(recipe: Recipe, plan: Plan, summary: Summary) -> list[PackedModule]:
    """Return the modules that are packed.

    Raises:
        UserError: A weight is not found, or its format does not take its shape.
    """
    from qsens.export.shards import PackedModule

    tensors = find_weights(plan.config.model.path).tensors
    named = by_inner_name(tensors)
    amax = _input_amax(recipe, plan, summary)
    found = []
    for choice in recipe.choices:
        if choice.format is None:
            continue
        pair = recipe.formats[choice.format]
        sources = {name: stored_weights(name, choice.kind, named) for name in choice.members}
        for name, own in sources.items():
            if len(own) != 1:
                raise UserError(
                    f"holds no weight of {name}",
                    where=str(plan.config.model.path),
                    remedy="The checkpoint is another one than was scored: sweep it again.",
                )
            _refuse_shape(name, pair, tensors[own[0]].shape)
            tied = choice.kind == "head" and not own[0].endswith(f"{name}.weight")
            found.append(
                PackedModule(
                    name=name if tied else own[0].removesuffix(".weight"),
                    source=own[0],
                    pair=pair,
                    fused=tuple(own[0] for own in sources.values()),
                    inputs=amax.get(choice.format, {}).get(name),
                    keeps=tied,
                )
            )
    return found


def _input_amax(recipe: Recipe, plan: Plan, summary: Summary) -> dict[str, Mapping[str, Any]]:
    """Return the amax that each format with calibrated inputs was scored under."""
    from qsens.pipeline.stored_amax import read_scored

    store = Store(plan)
    found: dict[str, Mapping[str, Any]] = {}
    for name, cell in cells_of(recipe, summary).items():
        inputs = recipe.formats[name].input_quantizer
        if inputs is not None and inputs.needs_calibration():
            spec = plan.cell(cell.cell)
            if not store.state(spec).is_file():
                raise UserError(
                    "the amax that it was scored under are gone",
                    where=f"cell {cell.cell} of sweep {plan.sweep_id}",
                    remedy="Run the sweep again.",
                )
            found[name] = next(iter(read_scored(store, [spec]).values()), {})
    return found


def cells_of(recipe: Recipe, summary: Summary) -> dict[str, SummaryCell]:
    """Return the cell that each format of a recipe was chosen from, by the format's name.

    Of several coverages, that of the recipe: the one which leaves the same modules outside.

    Raises:
        UserError: The sweep has none: it is another one by now.
    """
    found = {
        format_name(cell): cell
        for cell in summary.done
        if (cell.size, cell.domain) == (recipe.size, None)
        and {name for row in cell.rows if row.status == "disabled" for name in row.members}
        <= set(recipe.outside)
    }
    lost = sorted(recipe.formats.keys() - found)
    if lost:
        raise UserError(
            f"has no result of {lost[0]} at size {recipe.size}",
            where=f"sweep {summary.sweep_id}",
            remedy=_AGAIN,
        )
    return {name: found[name] for name in recipe.formats}


def _packer() -> str:
    """Return the version of what packs weights."""
    try:
        return version("compressed-tensors")
    except PackageNotFoundError as error:
        raise UserError(
            "is not installed, and packs the weights",
            where="compressed-tensors",
            remedy="pip install 'qsens[export]'",
        ) from error


def _begin(half: Path, digest: str) -> None:
    """Make the directory of what is half written; what is there of anything else is cleared."""
    mark = half / _OF
    if mark.is_file() and read_json(mark, remedy="Remove it.") == {"of": digest}:
        return
    with writing(half.parent):
        shutil.rmtree(half, ignore_errors=True)
    make_directory(half)
    write_text(mark, dump_json({"of": digest}))


def _say(config: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    """Give the first of ``keys`` a value, and all of them wherever they have another."""
    config[keys[0]] = value
    for section in (config, *(each for each in config.values() if isinstance(each, dict))):
        section.update({key: value for key in keys if key in section})


def _refuse_full(directory: Path) -> None:
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(
            "holds something already; nothing was written",
            where=f"directory {directory}",
            remedy="Name one that is not there yet.",
        )


def _refuse_another_checkpoint(recipe: Recipe, plan: Plan) -> None:
    there = identify_checkpoint(plan.config.model, plan.results)
    if there.digest != recipe.checkpoint_digest:
        raise UserError(
            "is not the checkpoint of the recipe: its files were changed, added or removed",
            where=f"model.path = {plan.config.model.path}",
            remedy="Sweep it again, and choose a recipe of that sweep.",
        )
    weights = find_weights(plan.config.model.path)
    if read_quantization(plan.config.model.path, weights.tensors) is not None:
        raise UserError(
            "is quantized already, and is not packed again",
            where=f"model.path = {plan.config.model.path}",
            remedy="Sweep and export the checkpoint in 16 or 32 bits that it was made from.",
        )


def _refuse_unpackable(recipe: Recipe) -> None:
    for name, pair in recipe.formats.items():
        if not pair.weight_quantizer.by_compressed_tensors:
            raise UserError(
                f"{name} is of ModelOpt's scales, and what is packed would be another format",
                where=f"recipe of sweep {recipe.sweep_id}",
                remedy="Sweep formats of compressed-tensors, `qsens sweep serving`, or write the "
                "recipe with `qsens recipe --to modelopt`.",
            )
        reason = llm_compressor.refusal(pair)
        if reason is not None:
            raise UserError(
                f"compressed-tensors cannot express {name}: {reason}",
                where=f"recipe of sweep {recipe.sweep_id}",
                remedy="Leave the pair out: --pairs.",
            )
    experts: list[Choice] = [
        choice for choice in recipe.choices if choice.kind == "experts" and choice.format
    ]
    if experts:
        raise UserError(
            f"quantizes experts, which are not packed yet: {experts[0].groups[0]}",
            where=f"recipe of sweep {recipe.sweep_id}",
            remedy="Leave them at 16 bits, --keep '*experts*', or write the recipe with "
            "`qsens recipe --to llm-compressor`.",
        )


def _refuse_shape(name: str, pair: PairConfig, shape: tuple[int, ...]) -> None:
    reason = llm_compressor.unfit(pair, shape)
    if len(shape) != 2:
        reason = f"a weight of {len(shape)} dimensions is no matrix"
    if reason is not None:
        raise UserError(
            f"{name} cannot be packed as {pair.name}: {reason}",
            where="the recipe",
            remedy="Choose it again for what is to load it: `qsens recipe --for vllm --to json`.",
        )
