"""What a recipe is for: a runtime of the command line, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from qsens.config import Roots, choices
from qsens.config.runtime import Gpu, load_runtime
from qsens.errors import UserError
from qsens.recipes.runtime import Deployment, Ruling
from qsens.schema.recipe import RuntimeUse

Target = Literal["modelopt", "llm-compressor", "json"]


def deployment_of(
    runtime: str | None, gpu: Gpu | None, tensor_parallel: int | None, roots: Roots
) -> Deployment | None:
    """Return what a recipe is for, by the words of the command line; none without a runtime.

    Raises:
        UserError: There is no such runtime, its file is broken, or it is not known to be cut over
            GPUs; or a GPU without a runtime.
    """
    if runtime is None:
        for option, value in (("--gpu", gpu), ("--tensor-parallel", tensor_parallel)):
            if value is not None:
                raise UserError(
                    "says how a runtime is to run, and none is named",
                    where=option,
                    remedy=f"Name one: --for {', '.join(choices('runtime', roots))}.",
                )
        return None
    loaded = load_runtime(runtime, roots)
    gpus = 1 if tensor_parallel is None else tensor_parallel
    if gpus < 1 or (gpus > 1 and loaded.tensor_parallel is None):
        raise UserError(
            f"{loaded.words} is not known to be cut over {gpus} GPUs",
            where="--tensor-parallel",
            remedy="Leave it out.",
        )
    return Deployment(loaded, gpu, gpus)


def use_of(deployment: Deployment) -> RuntimeUse:
    """Return what a recipe states of what it is for."""
    runtime = deployment.runtime
    return RuntimeUse(
        name=runtime.name,
        version=runtime.version,
        gpu=deployment.gpu,
        tensor_parallel=deployment.tensor_parallel,
    )


def taker(target: Target, deployment: Deployment | None) -> str:
    """Return who takes a recipe, in words."""
    return target if deployment is None else use_of(deployment).words


def said_of(
    name: str, rulings: Mapping[str, Ruling], deployment: Deployment | None
) -> Iterator[str]:
    """Say what to know of how a runtime serves a format that was chosen."""
    ruling = rulings.get(name, Ruling())
    if ruling.refusal is not None:
        yield f"{name}: {ruling.refusal}"
    if ruling.note is not None:
        yield f"{name}: {ruling.note}"
    if deployment is not None and ruling.absent:
        words = deployment.runtime.words
        yield f"{name}: {words} does not run it on {', '.join(ruling.absent)}"


def layout_words(deployment: Deployment, target: Target) -> Iterator[str]:
    """Say where a tool writes another layout than the one that a runtime is known by."""
    layouts = {"modelopt": "modelopt", "llm-compressor": "compressed-tensors"}
    layout, runtime = layouts.get(target), deployment.runtime
    if layout not in (None, runtime.layout):
        yield (
            f"{runtime.words} is known by checkpoints in the layout of {runtime.layout}, and "
            f"{target} writes {layout}'s, of which it may load less"
        )
