"""Passes over random samples of a model of a given shape: their options, and their seconds."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from torch import nn

from benchmarks._engines import request
from benchmarks._workload import NIGHTLY, SHAPES, Cell
from qsens.checkpoint.groups import Group
from qsens.config import PairConfig
from qsens.config.models import AutoquantConfig
from qsens.data.samples import Samples
from qsens.engine.candidates import Request
from qsens.engine.scoring_pass import ScoringPass, run_pass


def pass_parser(doc: str, *, samples: int, tokens: int) -> argparse.ArgumentParser:
    """Return a parser of the options that these benchmarks share.

    Args:
        doc: Docstring of the benchmark; its first line describes it.
        samples: Samples by default.
        tokens: Tokens of a sample by default.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--tokens", type=int, default=tokens, help="tokens of a sample")
    parser.add_argument("--pairs", default=",".join((*NIGHTLY, "wnvfp4_anvfp4")))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    return parser


def requests_of(pairs: Sequence[PairConfig], count: int) -> list[Request]:
    """Return what every pair asks of a pass over as many samples."""
    return [request(Cell(pair, str(count), count, count)) for pair in pairs]


def timed_pass(
    model: nn.Module,
    groups: Sequence[Group],
    samples: Samples,
    pairs: Sequence[PairConfig],
    autoquant: AutoquantConfig,
) -> tuple[ScoringPass, float]:
    """Return what a pass finds, and its seconds, the device's work included."""
    requests = requests_of(pairs, len(samples))
    started = time.monotonic()
    found = run_pass(model, samples, groups, requests, autoquant, boundaries=())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, time.monotonic() - started
