"""The grid over all layers, vision tower included, from pictures with captions.

From the root of the repository, on a machine with a GPU:

    python -m benchmarks.pictures --shape qwen3-vl-4b

Random weights, random patches and random ids: 512 pictures of 512 x 512 with captions of the
lengths of real ones, three sizes, 128 scored. Seconds are those after loading; memory is that above
the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import _engines, _machine, _workload
from qsens.checkpoint.groups import find_groups
from qsens.checkpoint.loading import resolve_device
from qsens.config import AutoquantConfig
from qsens.data.samples import Picture, Samples
from qsens.engine.scoring_pass import run_pass

SCORED = 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=["qwen3-vl-4b"], default="qwen3-vl-4b")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--pairs", type=lambda text: text.split(","), default=["wint8_aint8"])
    parser.add_argument("--side", type=int, default=512, help="pixels of a picture's side")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    given = parser.parse_args(arguments)
    measured = _run(given)
    print(
        f"{measured['cells']} cells, {measured['groups']} groups, {measured['samples']} pictures "
        f"of {given.side} x {given.side}: calibration {measured['calibrate']:.1f} s, score "
        f"{measured['score']:.1f} s, peak {measured['peak']:.2f} GiB above the weights "
        f"({measured['predicted']:.2f} predicted)"
    )
    if given.json:
        given.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return 0


def _run(given: argparse.Namespace) -> dict[str, Any]:
    load = _workload.build(
        model=None,
        shape=given.shape,
        device=resolve_device(given.device),
        dtype=given.dtype,
        captions=None,
        batch_size=8,
        score_size=SCORED,
    )
    model: Any = load.model
    samples = _with_pictures(load.samples, model.config, given.side, getattr(torch, given.dtype))
    pairs = _workload.pair_configs(given.pairs)
    cells = [load.cell(pair, size) for pair in pairs for size in load.sizes]
    groups = find_groups(model, load.disabled, all_layers=True)
    done = run_pass(
        model,
        samples,
        groups,
        [_engines.request(cell) for cell in cells],
        AutoquantConfig(),
        boundaries=list(load.sizes.values()),
    )
    scores = done.scores
    if not all(scores.reached) or scores.failures.refused:
        raise RuntimeError(f"not every group was scored: {scores.failures.refused}")
    return {
        "machine": _machine.describe(load.device),
        "versions": _machine.versions(),
        "shape": given.shape,
        "cells": len(cells),
        "groups": len(scores.groups),
        "samples": len(samples),
        "tokens": samples.tokens(),
        "patches": samples.patches(),
        **done.seconds,
        **done.memory(),
    }


def _with_pictures(texts: Samples, config: Any, side: int, dtype: torch.dtype) -> Samples:
    """Return the captions of ``texts``, each behind a random picture."""
    vision = config.vision_config
    rows = side // vision.patch_size
    channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    merged = (rows // vision.spatial_merge_size) ** 2
    before = [config.vision_start_token_id, *[config.image_token_id] * merged]
    before.append(config.vision_end_token_id)
    generator = torch.Generator().manual_seed(0)
    pictures = []
    for _ in texts.ids:
        patches = torch.randn(rows * rows, channels, generator=generator).to(dtype)
        tensors = {
            "pixel_values": patches,
            "image_grid_thw": torch.tensor([[1, rows, rows]]),
        }
        shown = torch.tensor(before) == config.image_token_id
        tokens = {"mm_token_type_ids": shown.long()}
        pictures.append(Picture(tensors, tokens, len(patches), merged))
    return Samples(
        ids=tuple((*before, *ids) for ids in texts.ids),
        truncated=texts.truncated,
        spans=tuple(((len(before), len(before) + len(ids)),) for ids in texts.ids),
        pictures=tuple(pictures),
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
