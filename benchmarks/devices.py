"""One device beside several that share the samples of a pass: seconds, and their ratio.

    python -m benchmarks.devices --shape qwen3-vl-4b --samples 128 --tokens 512 --devices 2

Random weights of a shape, the same on every device. Each pass runs once before it is timed. Prints
a line of JSON a method: seconds of one device and of all, how many times as fast they are, and how
far their scores are apart.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import nn

from benchmarks._passes import pass_parser, timed_pass
from benchmarks._workload import build_shape, pair_configs, samples_of_length, tower_patterns
from qsens.checkpoint.groups import find_groups
from qsens.checkpoint.loading import device_name
from qsens.config.models import AutoquantConfig
from qsens.engine.scoring_pass import ScoringPass
from qsens.engine.team import ProcessTeam, Team, join


def main() -> None:
    """Run the benchmark."""
    parser = pass_parser(__doc__, samples=128, tokens=512)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--methods", default="gradient,fisher")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        context = multiprocessing.get_context("spawn")
        meeting = Path(directory) / "meeting"
        others = [
            context.Process(target=_follow, args=(rank, given, meeting), daemon=True)
            for rank in range(1, given.devices)
        ]
        for each in others:
            each.start()
        team = _lead(given, meeting)
        for each in others:
            each.kill()
        team.close()


def _model(rank: int, given: argparse.Namespace) -> nn.Module:
    """Return the model of a process, on its own device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    return build_shape(given.shape, device, getattr(torch, given.dtype))


def _follow(rank: int, given: argparse.Namespace, meeting: Path) -> None:
    model = _model(rank, given)
    team = ProcessTeam(rank, given.devices, meeting)
    join(model, team)
    team.follow(model)


def _lead(given: argparse.Namespace, meeting: Path) -> ProcessTeam:
    model = _model(0, given)
    groups = find_groups(model, tower_patterns(model))
    samples = samples_of_length(model, given.samples, given.tokens)
    pairs = pair_configs(given.pairs.split(","))

    def timed(autoquant: AutoquantConfig) -> tuple[ScoringPass, float]:
        timed_pass(model, groups, samples, pairs, autoquant)
        return timed_pass(model, groups, samples, pairs, autoquant)

    methods = [AutoquantConfig(method=method) for method in given.methods.split(",")]
    team = ProcessTeam(0, given.devices, meeting)
    for autoquant in methods:
        join(model, Team())
        one, alone = timed(autoquant)
        join(model, team)
        several, together = timed(autoquant)
        sums = [done.scores.per_sample.sum(dim=-1).flatten() for done in (one, several)]
        print(
            json.dumps(
                {
                    "shape": given.shape,
                    "method": autoquant.method,
                    "tokens": [given.samples, given.tokens],
                    "device": device_name(next(model.parameters()).device),
                    "devices": given.devices,
                    "dtype": given.dtype,
                    "one_seconds": round(alone, 2),
                    "several_seconds": round(together, 2),
                    "times_as_fast": round(alone / together, 2),
                    "rank_correlation": float(spearmanr(*sums).statistic),
                }
            ),
            flush=True,
        )
    return team


if __name__ == "__main__":
    main()
