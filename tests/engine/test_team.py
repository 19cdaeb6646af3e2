"""Two and three processes that share a pass find what one finds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qsens.checkpoint.groups import find_groups
from qsens.config.models import AutoquantConfig
from qsens.data.samples import Samples
from qsens.engine.candidates import Request
from qsens.engine.layer_stream import LayerStream
from qsens.engine.scoring_pass import ScoringPass, run_pass
from qsens.engine.team import ProcessTeam, join
from tests.engine import pictures
from tests.engine.test_layer_stream import FP8, REQUESTS, dense, mixture, samples

METHODS = ("gradient", "fisher", "kl_div")


def seeing() -> nn.Module:
    model: nn.Module = pictures.model().requires_grad_(False)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Samples], list[Request]]] = {
    "dense": (dense, samples, REQUESTS),
    "mixture": (mixture, samples, REQUESTS),
    "pictures": (seeing, lambda: pictures.samples(8), [Request("a", FP8, FP8, 8, 8)]),
    # Fewer batches than processes: one has nothing to do.
    "few": (dense, lambda: samples().part(0, 2), [Request("a", FP8, FP8, 2, 1)]),
}


def passes(model: nn.Module, read: Samples, requests: list[Request]) -> dict[str, ScoringPass]:
    return {
        method: run_pass(
            model,
            read,
            find_groups(model),
            requests,
            AutoquantConfig(method=method, draws=4),
            boundaries=(8,),
        )
        for method in METHODS
    }


def held(found: dict[str, ScoringPass]) -> dict[str, Any]:
    return {
        method: {
            "per_sample": done.scores.per_sample,
            "loss": done.scores.loss,
            "errors": done.scores.errors,
            "norms": done.scores.norms,
            "reached": done.scores.reached,
            "amax": {str(size): dict(amax) for size, amax in done.scores.amax.items()},
            "experts": {
                name: (table.per_sample, table.tokens)
                for name, table in done.scores.experts.items()
            },
            "padding": done.scores.padding_share,
        }
        for method, done in found.items()
    }


def member(rank: int, count: int, meeting: Path, streamed: bool) -> None:
    """Be one of ``count`` processes; the first one writes what it has found."""
    torch.set_num_threads(1)
    team = ProcessTeam(rank, count, meeting)
    for kind, (make, read, requests) in MODELS.items():
        model = make()
        if streamed:
            LayerStream(model, torch.device("cpu"))
        join(model, team)
        if rank:
            for _ in METHODS:
                team.follow_once(model)
        else:
            torch.save(held(passes(model, read(), requests)), meeting.with_name(f"{kind}.pt"))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {
        kind: held(passes(make(), read(), requests))
        for kind, (make, read, requests) in MODELS.items()
    }


@pytest.mark.parametrize(("count", "streamed"), [(2, False), (3, False), (2, True)])
def test_what_several_find_is_what_one_finds(
    alone: dict[str, Any], tmp_path: Path, count: int, streamed: bool
) -> None:
    context = multiprocessing.get_context("spawn")
    members = [
        context.Process(target=member, args=(rank, count, tmp_path / "meeting", streamed))
        for rank in range(count)
    ]
    for each in members:
        each.start()
    for each in members:
        each.join()
    assert [each.exitcode for each in members] == [0] * count
    for kind, expected in alone.items():
        found = torch.load(tmp_path / f"{kind}.pt")
        for method in METHODS:
            # Batches are cut otherwise, and products of other shapes round otherwise; a tower reads
            # all pictures of a batch as one sequence.
            rtol = 1e-2 if kind == "pictures" else 1e-9 if method == "kl_div" else 1e-4
            torch.testing.assert_close(found[method], expected[method], rtol=rtol, atol=1e-9)
            sums = [each[method]["per_sample"].sum(dim=-1) for each in (found, expected)]
            rtol = 2e-5 if kind == "pictures" else 1e-6
            torch.testing.assert_close(*sums, rtol=rtol, atol=0)
