"""The first step: read configuration, check what it names, lay out the grid.

Never imports torch.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qsens.cells import Cell
from qsens.checkpoint.components import resolve_components
from qsens.checkpoint.files import find_weights, identify, read_config
from qsens.checkpoint.quantized import read_quantization, shapes
from qsens.checkpoint.settings import check_settings
from qsens.checkpoint.templates import check_chat_template
from qsens.checkpoint.tokenizer_files import check_tokenizer
from qsens.checkpoint.weight_sizes import WeightSizes
from qsens.config import DatasetConfig, ModelConfig, Roots, SweepConfig, load_sweep
from qsens.config.models import CONVERSATIONS, Size, tokens_of
from qsens.data.captions import identify_samples
from qsens.data.images import PictureReader, cache_of, read_resolution
from qsens.data.records import Record
from qsens.documents import dump_document
from qsens.errors import UserError
from qsens.grid import Plan, make_plan
from qsens.identity import CheckpointIdentity, SamplesIdentity, identify_patterns
from qsens.pipeline.preflight import check_disk, check_formats, covered_shapes
from qsens.reading import read_bytes
from qsens.store import CELLS, Store
from qsens.writing import write_text

_PINS = "Set QSENS_CONSTRAINTS to the file of pins, or unset it."
_DISTRIBUTIONS = ("qsens", "torch", "transformers", "nvidia-modelopt")


def plan_sweep(
    preset: str = "single",
    overrides: Iterable[str] = (),
    *,
    lanes: int | None = None,
    out: Path | None = None,
    roots: Roots | None = None,
) -> Plan:
    """Validate a sweep and lay out its grid; no GPU time is spent.

    Args:
        preset: Name of a file below ``configs/sweep/``.
        overrides: ``key=value`` strings.
        lanes: Shares to split the grid into; as the configuration says when not given, else 1.
        out: Where to write ``plan.json``; nothing is written when not given.
        roots: Where things lie; from the environment when not given.

    Raises:
        UserError: Something in the configuration, the checkpoint or the samples must be mended, or
            the disk is too full.
    """
    roots = roots or Roots.from_environment()
    loaded = load_sweep(preset, overrides, roots=roots)
    given = loaded.config.model
    weights = shapes(given.path)  # whatever else is wrong, first that weights can be read
    check_settings(given)
    config = loaded.config.model_copy(update={"model": resolve_components(given, roots.results)})
    checkpoint = identify_checkpoint(config.model, roots.results)
    samples: dict[str, dict[Size, SamplesIdentity]] = {}
    readers, notices = [], []
    for dataset in config.dataset:
        reader = picture_reader(config, dataset, roots)
        samples[dataset.name], said = identify_samples(
            dataset, dataset.size, reader, token_counter(config.model, dataset)
        )
        notices += said
        readers += [reader] if reader is not None else []
    if any(one.kind in CONVERSATIONS for sizes in samples.values() for one in sizes.values()):
        check_chat_template(config.model.path, "conversations")
    notices += check_formats(config, covered_shapes(weights, _left_alone(config)))
    plan = make_plan(
        config,
        roots,
        checkpoint=checkpoint,
        samples=samples,
        versions={name: installed_version(name) for name in _DISTRIBUTIONS},
        patterns=identify_patterns(
            given,
            config.model,
            str(read_config(config.model.path).get("model_type")),
            weights,
        ),
        lanes=lanes or config.dag.lanes or 1,
        notices=(*loaded.notices, *checkpoint.notices, *notices),
    )
    check_disk(plan, weights)
    _mark_used(plan)
    for reader in readers:
        with contextlib.suppress(OSError):
            reader.mark_used()
    if out is not None:
        write_text(out, plan_json(plan))
    return plan


def identify_checkpoint(config: ModelConfig, results: Path | None) -> CheckpointIdentity:
    """Read what the checkpoint of a sweep is; of a file that did not change, the digest is known.

    Args:
        config: The checkpoint, with its patterns resolved.
        results: Results root, where digests are kept, if anywhere.

    Raises:
        UserError: Its files are not whole, or leave open which of them count.
    """
    identity = identify(
        config.path,
        cache=results / CELLS / "digests.json" if results else None,
        trust_remote_code=config.trust_remote_code,
        heads=config.head_patterns,
        dtype=config.dtype,
        check_tokenizer=check_tokenizer,
    )
    quantization = read_quantization(config.path, find_weights(config.path).tensors)
    if quantization is None:
        return identity
    notices = [*identity.notices, quantization.notice(config.dtype)]
    return identity.model_copy(update={"quantization": quantization.format, "notices": notices})


def token_counter(
    model: ModelConfig, dataset: DatasetConfig
) -> Callable[[Sequence[Record]], Sequence[int]] | None:
    """Return what counts the tokens of samples; none where no size counts them.

    The checkpoint's own tokenizer does, which needs torch: nothing else of a plan does.

    Raises:
        UserError: Here is no torch.
    """
    if all(tokens_of(count) is None for count in dataset.sizes.values()):
        return None
    try:
        from qsens.checkpoint.loading import load_tokenizer
        from qsens.data.text import lengths
    except ImportError as error:
        raise UserError(
            f"counts tokens, and the tokenizer needs {error.name}, which is not installed here",
            where="dataset.sizes",
            remedy="Give numbers of samples, or plan where torch and transformers are installed.",
        ) from error
    return partial(lengths, tokenizer=load_tokenizer(model), dataset=dataset)


def picture_reader(
    config: SweepConfig, dataset: DatasetConfig, roots: Roots
) -> PictureReader | None:
    """Return what reads the pictures of a data set; none where no cell of the sweep reads any.

    Raises:
        UserError: The checkpoint cannot be given pictures.
    """
    if not any(dataset.read_as(coverage) == "image_text" for coverage in config.coverage):
        return None
    resolution = read_resolution(config.model, dataset.max_pixels)
    check_chat_template(config.model.path, "pictures")
    return PictureReader(dataset.images_root(), cache_of(roots.results), resolution)


def _left_alone(config: SweepConfig) -> tuple[str, ...]:
    """Return the patterns of modules that no cell quantizes."""
    return () if "all_layers" in config.coverage else config.model.vision_patterns


def _mark_used(plan: Plan) -> None:
    """Note that somebody plans with the results that are there, so that none is pruned as old."""
    store = Store(plan)
    used = [store.manifest(cell) for cell in plan.cells]
    used += [store.calibration(cell.calibration) for cell in plan.cells]
    for path in used:
        # A results root that cannot be written to is left as it is.
        with contextlib.suppress(OSError):
            os.utime(path)


def plan_json(plan: Plan) -> str:
    """Return ``plan.json`` as text."""
    return dump_document(plan)


def describe(plan: Plan, path: Path | None) -> dict[str, Any]:
    """Return what ``qsens plan --json`` prints."""
    store = Store(plan)
    model = plan.config.model
    sizes = WeightSizes.of(shapes(model.path), model.dtype)
    return {
        "plan_id": plan.plan_id,
        "sweep_id": plan.sweep_id,
        "plan_path": str(path) if path else None,
        "notices": plan.notices,
        "weights": {
            "bytes": sizes.total,
            "streamed_bytes": sizes.streamed,
            "bus_bytes": sizes.layers,
            "placement": sizes.placement(plan.config.autoquant.memory_gb),
        },
        "cells": [
            {
                **cell.model_dump(include=Cell.model_fields.keys() - {"digest"}),
                "done": store.is_done(cell),
            }
            for cell in plan.cells
        ],
    }


def installed_version(name: str) -> str:
    """Return the version of a distribution, or ``none``.

    Where it is not installed, because another environment computes, the file of pins that both
    were made from says it: ``QSENS_CONSTRAINTS``.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        pins = os.environ.get("QSENS_CONSTRAINTS")
        match = re.search(
            rf"^{re.escape(name)}==(\S+)",
            read_bytes(Path(pins), remedy=_PINS).decode("utf-8", "replace") if pins else "",
            re.MULTILINE | re.IGNORECASE,
        )
        return match[1] if match else "none"
