"""Layers streamed from host memory beside the same model resident: seconds, memory, bytes a second.

    python -m benchmarks.streaming --shape qwen3-vl-32b --gib 24 --weights /dev/shm/weights

Random weights of a shape are written to files below ``--weights``, a safetensors file a layer, and
mapped from there; write them where they stay in the page cache. Every pass runs once before it is
timed. Prints a line of JSON a method: the seconds of the resident pass and, at each ``--gib``, of
the streamed one, with their ratio, what was allocated at most, how far the scores are apart, and
the rate at which layers come when nothing is computed beside.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import nn

from benchmarks._passes import pass_parser, requests_of, timed_pass
from benchmarks._workload import build_shape, pair_configs, samples_of_length, tower_patterns
from qsens.checkpoint.groups import find_groups
from qsens.checkpoint.loading import device_name, resolve_device
from qsens.checkpoint.modules import layers_of
from qsens.config.models import AutoquantConfig
from qsens.engine.layer_stream import LayerStream, stream_of
from qsens.engine.memory import GIB
from qsens.engine.scoring_pass import ScoringPass, place


def main() -> None:
    """Run the benchmark."""
    parser = pass_parser(__doc__, samples=16, tokens=256)
    parser.add_argument("--methods", default="gradient,fisher")
    parser.add_argument("--gib", type=float, nargs="+", required=True, help="of the device")
    parser.add_argument("--weights", type=Path, required=True, help="directory for the layers")
    parser.add_argument("--warm-up", type=int, help="samples of the first pass; all by default")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    device, dtype = resolve_device(given.device), getattr(torch, given.dtype)
    model = build_shape(given.shape, device, dtype)
    groups = find_groups(model, tower_patterns(model))
    samples = samples_of_length(model, given.samples, given.tokens)
    pairs = pair_configs(given.pairs.split(","))
    methods = [AutoquantConfig(method=method) for method in given.methods.split(",")]
    first = samples.part(0, given.warm_up) if given.warm_up else samples

    def timed(autoquant: AutoquantConfig) -> tuple[ScoringPass, float]:
        timed_pass(model, groups, first, pairs, autoquant)
        return timed_pass(model, groups, samples, pairs, autoquant)

    resident = {each.method: timed(each) for each in methods}
    _write(model, given.weights)
    for gib in given.gib:
        _map(model, given.weights)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(gib * GIB / total)
        limited = [each.model_copy(update={"memory_gb": gib}) for each in methods]
        place(model, groups, requests_of(pairs, len(samples)), limited[-1], device)
        stream = stream_of(model)
        assert stream is not None, "it fits as a whole"
        rate = _rate(model, stream)
        for each in limited:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            before, seconds = resident[each.method]
            found, streamed = timed(each)
            sums = [done.scores.per_sample.sum(dim=-1).flatten() for done in (before, found)]
            print(
                json.dumps(
                    {
                        "shape": given.shape,
                        "method": each.method,
                        "tokens": [given.samples, given.tokens],
                        "device": device_name(device),
                        "gib": gib,
                        "resident_seconds": round(seconds, 2),
                        "streamed_seconds": round(streamed, 2),
                        "ratio": round(streamed / seconds, 2),
                        "allocated_gib": round(torch.cuda.max_memory_allocated(device) / GIB, 2)
                        if device.type == "cuda"
                        else None,
                        "tokens_at_once": [before.budget.max_tokens, found.budget.max_tokens],
                        "streamed_gib": round(found.streamed / GIB, 2),
                        "streamed_gib_a_second": round(found.streamed / GIB / streamed, 1),
                        "copied_alone_gib_a_second": round(rate, 1),
                        "rank_correlation": float(spearmanr(*sums).statistic),
                        "largest_difference": float(((sums[1] - sums[0]) / sums[0]).abs().max()),
                    }
                ),
                flush=True,
            )
        stream.remove()


def _write(model: nn.Module, directory: Path) -> None:
    """Write a file for each layer."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, layer in layers_of(model).items():
        held: dict[str, Any] = {key: each.cpu() for key, each in layer.named_parameters()}
        save_file(held, directory / f"{name}.safetensors")


def _map(model: nn.Module, directory: Path) -> None:
    """Let the weights of layers lie in their files, and all else in host memory."""
    for name, layer in layers_of(model).items():
        held = load_file(directory / f"{name}.safetensors")
        for key, parameter in layer.named_parameters():
            parameter.data = held[key]
    model.to("cpu")


def _rate(model: nn.Module, stream: LayerStream) -> float:
    """Return the GiB a second at which all layers come one after the other."""
    names = list(layers_of(model))
    before, started = stream.fetched, time.monotonic()
    for name, ahead in zip(names, [*names[1:], None], strict=True):
        stream.fetch(name, ahead)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (stream.fetched - before) / GIB / (time.monotonic() - started)


if __name__ == "__main__":
    main()
