"""What one pass takes on a model of a given shape with random weights: seconds, and memory.

    python -m benchmarks.pass_time --shape qwen3-30b-a3b --samples 16 --tokens 256 --method gradient

Every sample has as many tokens. The model is built on the device and run once before it is timed.
Prints JSON: the seconds of each timed pass, its calibration included, and the most that it took
above the weights; with ``--modelopt PAIR``, also the seconds of ``mtq.auto_quantize`` on that pair
and these samples, in batches of eight, which nothing warmed up; with ``--floor``, what the matrix
products of one more pass took by themselves, by the profiler.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks._passes import pass_parser, timed_pass
from benchmarks._workload import (
    build_shape,
    pair_configs,
    samples_of_length,
    tower_patterns,
)
from qsens.checkpoint.groups import find_groups
from qsens.checkpoint.loading import choose_experts, device_name, resolve_device
from qsens.config.models import AutoquantConfig
from qsens.data.samples import Samples
from qsens.engine.memory import GIB
from qsens.engine.scoring_pass import ScoringPass

_BATCH = 8
# What names of kernels, or of a CPU's operators, hold that multiply matrices.
_PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "aten::mm", "aten::addmm", "aten::bmm")


def main() -> None:
    """Run the benchmark."""
    parser = pass_parser(__doc__, samples=16, tokens=256)
    parser.add_argument("--method", choices=("gradient", "fisher"), default="gradient")
    parser.add_argument("--runs", type=int, default=2, help="passes after the first one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--floor", action="store_true", help="seconds of matrix products alone")
    parser.add_argument("--modelopt", help="a pair that ModelOpt scores on the same samples")
    given = parser.parse_args()
    device, dtype = resolve_device(given.device), getattr(torch, given.dtype)
    model = build_shape(given.shape, device, dtype)
    groups = find_groups(model, tower_patterns(model))
    samples = samples_of_length(model, given.samples, given.tokens)
    pairs = pair_configs(given.pairs.split(","))

    def one_pass() -> tuple[ScoringPass, float]:
        return timed_pass(model, groups, samples, pairs, AutoquantConfig(method=given.method))

    first, seconds, taken = 0.0, [], []
    for run in range(given.runs + 1):
        found, took = one_pass()
        took = round(took, 2)
        if run:
            seconds.append(took)
        else:
            first = took
        taken.append(round(found.taken / GIB, 2))
    beside: dict[str, Any] = {}
    if given.floor:
        beside["matrix_products"] = _products(one_pass, device)
    if given.modelopt:
        beside |= _modelopt(model, samples, given.modelopt)
    print(
        json.dumps(
            {
                "shape": given.shape,
                "method": given.method,
                "pairs": given.pairs.split(","),
                "tokens": [given.samples, given.tokens],
                "device": device_name(device),
                "dtype": given.dtype,
                "first_seconds": first,
                "seconds": seconds,
                "gib_above_weights": taken,
                "scored": int((found.scores.per_sample.sum(dim=(1, 2)) > 0).sum()),
                **beside,
            }
        )
    )


def _products(one_pass: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that the matrix products of a pass take on their device."""
    on_a_gpu = device.type == "cuda"
    kind = ProfilerActivity.CUDA if on_a_gpu else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiled:
        one_pass()
    microseconds: float = sum(
        event.self_device_time_total if on_a_gpu else event.self_cpu_time_total
        for event in profiled.key_averages()
        if any(name in event.key.lower() for name in _PRODUCTS)
    )
    return round(microseconds / 1e6, 2)


def _modelopt(model: Any, samples: Samples, name: str) -> dict[str, Any]:
    """Return what ModelOpt takes for one pair; the model is of no use afterwards."""
    from qsens.engine.modelopt import reference

    choose_experts(model, torch.device("cpu"), torch.float32)  # its own experts run one by one
    (pair,) = pair_configs([name])
    count = len(samples)
    scores = reference.score_cell(
        model,
        samples,
        pair,
        vision=tower_patterns(model),
        sizes=[count],
        scored=count,
        batch_size=_BATCH,
    )
    seconds = {key: round(value, 1) for key, value in scores.timings.items()}
    return {"modelopt": {"pair": name, **seconds}}


if __name__ == "__main__":
    main()
