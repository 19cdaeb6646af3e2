"""Processes that share the samples of a pass, each with the model on a device of its own.

Needs torch. The first leads: it says what is to be done, and has the result. All do the same on
batches of their own; amax are the largest of any, scores of samples are put together. Batches are
those of one process, cut so that each has some, and draws hang on a sample's index: what is found
does not depend on how many they are.

What they exchange is small and lies in host memory, megabytes at the end of a pass, so gloo carries
it, whatever the devices are.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn

from qsens.data.samples import Batch
from qsens.engine.scores import Failures, Progress, silent

T = TypeVar("T")
R_co = TypeVar("R_co", covariant=True)
Guard = Callable[[], AbstractContextManager[None]]

# A process that ends closes its connections, which ends the others: none waits for as long.
_LONGEST = datetime.timedelta(days=7)


class Work(Protocol[R_co]):
    """What all processes of a team do together; it is sent to them."""

    def run(self, model: nn.Module, progress: Progress = silent) -> R_co:
        """Do it on this process' own model."""
        ...


class Team:
    """One process alone: it has all batches, and nobody to exchange anything with.

    Attributes:
        rank: Its number, from 0; the first leads.
        count: How many they are.
    """

    rank = 0
    count = 1

    def do(self, work: Work[R_co], model: nn.Module, progress: Progress) -> R_co:
        """Let all processes do some work; return what came of it."""
        return work.run(model, progress)

    def share(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return the batches of this process, in their order."""
        return list(batches)

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Add up what all have found, in place; each has zeros where others have something."""

    def largest(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the largest of what any has found, by name."""
        return tensors

    def least(self, value: int) -> int:
        """Return the smallest value that any has."""
        return value

    def gather(self, value: T) -> list[T]:
        """Return what each has, in order of rank."""
        return [value]


class ProcessTeam(Team):
    """One of several processes of a host; all of them are there once this returns.

    Args:
        rank: Its number.
        count: How many they are.
        meeting: A file that they find each other by, which is not there yet.
        guard: A context that work is done in: it knows better why others ended than this process.
    """

    def __init__(
        self, rank: int, count: int, meeting: Path, guard: Guard = contextlib.nullcontext
    ) -> None:
        self.rank, self.count, self._guard = rank, count, guard
        if sys.platform == "linux":  # the host's own name may lead nowhere
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=count,
            timeout=_LONGEST,
        )

    def close(self) -> None:
        """Leave the team."""
        dist.destroy_process_group()

    def do(self, work: Work[R_co], model: nn.Module, progress: Progress) -> R_co:
        """See :meth:`Team.do`; the others are in :meth:`follow`."""
        with self._guard():
            dist.broadcast_object_list([work], src=0)
            return work.run(model, progress)

    def follow(self, model: nn.Module) -> None:
        """Do what the first process says, until this one is ended."""
        while True:
            self.follow_once(model)

    def follow_once(self, model: nn.Module) -> None:
        """Do the next thing that the first process says."""
        told: list[Any] = [None]
        dist.broadcast_object_list(told, src=0)
        told[0].run(model)

    def share(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return the batches of this process: tokens are spread as evenly as batches allow."""
        held = [0] * self.count
        own = []
        for index in sorted(range(len(batches)), key=lambda i: -batches[i].input_ids.numel()):
            rank = held.index(min(held))
            held[rank] += batches[index].input_ids.numel()
            if rank == self.rank:
                own.append(index)
        return [batches[index] for index in sorted(own)]

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """See :meth:`Team.add`."""
        for tensor in tensors:
            dist.all_reduce(tensor)

    def largest(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See :meth:`Team.largest`."""
        if not tensors:
            return {}
        stacked = torch.stack(list(tensors.values()))
        dist.all_reduce(stacked, op=dist.ReduceOp.MAX)
        return dict(zip(tensors, stacked, strict=True))

    def least(self, value: int) -> int:
        """See :meth:`Team.least`."""
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor)

    def gather(self, value: T) -> list[T]:
        """See :meth:`Team.gather`."""
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, value)
        return gathered


def unite(team: Team, names: set[str], failures: Failures) -> set[str]:
    """Return the names that any process has; note in ``failures`` what any could not compute."""
    for own, of_others in team.gather((names, failures)):
        names = names | own
        failures.absorb(of_others)
    return names


_ALONE = Team()
_TEAMS: WeakKeyDictionary[nn.Module, Team] = WeakKeyDictionary()


def team_of(model: nn.Module) -> Team:
    """Return the team whose part of the work is done with a model."""
    return _TEAMS.get(model, _ALONE)


def join(model: nn.Module, team: Team) -> None:
    """Note that a team's part of the work is done with ``model``."""
    _TEAMS[model] = team
