"""One pass over the samples: calibration where it is missing, then all candidates. Needs torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from qsens.checkpoint.groups import Group
from qsens.config.models import AutoquantConfig
from qsens.data.samples import Samples, batch_tokens
from qsens.engine import amax as running_amax
from qsens.engine.amax import AmaxBySize
from qsens.engine.batching import calibrates
from qsens.engine.candidates import Candidates, Request, distinct
from qsens.engine.gradient import fisher, scorer
from qsens.engine.kl.measure import diverge
from qsens.engine.layer_stream import LayerStream, device_of, layer_bytes, stream_of
from qsens.engine.memory import (
    GIB,
    Budget,
    memory_share,
    peak,
    plan_budget,
    reset_peak,
    weight_bytes,
)
from qsens.engine.placement import plan_placement
from qsens.engine.scores import PassScores, Progress, silent
from qsens.engine.team import team_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoringPass:
    """What a pass found, and what it took.

    Attributes:
        scores: What it found.
        candidates: What it computed.
        budget: How much went through at once.
        seconds: Seconds of ``calibrate`` and ``score``.
        taken: Bytes that it took at most above the weights, calibration left out.
        weights: Bytes of weights on the device.
        streamed: Bytes of weights that were copied there, layer by layer.
    """

    scores: PassScores
    candidates: Candidates
    budget: Budget
    seconds: Mapping[str, float]
    taken: int
    weights: int
    streamed: int

    def memory(self) -> dict[str, float]:
        """Return GiB: of weights on the device, above them predicted and taken, and streamed."""
        return {
            "weights": self.weights / GIB,
            "predicted": self.budget.predicted / GIB,
            "peak": self.taken / GIB,
            "streamed": self.streamed / GIB,
        }


def run_pass(
    model: nn.Module,
    samples: Samples,
    groups: Sequence[Group],
    requests: Sequence[Request],
    autoquant: AutoquantConfig,
    *,
    boundaries: Sequence[int],
    calibrated: Callable[[Candidates], AmaxBySize] = lambda _: {},
    only: Collection[tuple[str, str]] | None = None,
    progress: Progress = silent,
) -> ScoringPass:
    """Score all that is asked for by the method of ``autoquant``.

    Args:
        model: The model, in evaluation mode, its weights frozen.
        samples: Its samples.
        groups: Its groups.
        requests: What to compute.
        autoquant: The method, its draws and seed, and the limit of memory.
        boundaries: Sample counts that no batch crosses.
        calibrated: Returns what is calibrated already, by calibration size; what is shared with
            other passes has to be.
        only: Names of groups and cells to measure, with method ``kl_div``; all when not given.
        progress: Called as work goes on.
    """
    candidates = distinct(requests)
    scoring = _Scoring(
        samples, groups, candidates, autoquant, boundaries, calibrated(candidates), only
    )
    return team_of(model).do(scoring, model, progress)


def calibrate(
    model: nn.Module,
    samples: Samples,
    groups: Sequence[Group],
    sizes: Sequence[int],
    boundaries: Sequence[int],
    progress: Progress = silent,
) -> AmaxBySize:
    """Return the amax at each of ``sizes``, in batches that fit this process' share of memory.

    What does not fit in one batch goes through in several: no maximum depends on it.
    """
    calibration = _Calibration(samples, groups, sizes, boundaries)
    return team_of(model).do(calibration, model, progress)


@dataclass(frozen=True)
class _Calibration:
    """The calibration of a model, see :func:`calibrate`."""

    samples: Samples
    groups: Sequence[Group]
    sizes: Sequence[int]
    boundaries: Sequence[int]

    def run(self, model: nn.Module, progress: Progress = silent) -> AmaxBySize:
        """Do this process' part; return what all have found."""
        share, team = memory_share(), team_of(model)
        together = batch_tokens(device_of(model))
        limits = [int(together * share)] if share < 1 else []
        if team.count > 1:
            limits.append(-(-self.samples.tokens(max(self.sizes)) // team.count))
        return running_amax.calibrate(
            model,
            self.samples,
            self.groups,
            calibration_sizes=self.sizes,
            boundaries=self.boundaries,
            max_tokens=min(limits, default=None),
            progress=progress,
        )


@dataclass(frozen=True)
class _Scoring:
    """One pass over samples, see :func:`run_pass`."""

    samples: Samples
    groups: Sequence[Group]
    candidates: Candidates
    autoquant: AutoquantConfig
    boundaries: Sequence[int]
    amax: AmaxBySize
    only: Collection[tuple[str, str]] | None

    def run(self, model: nn.Module, progress: Progress = silent) -> ScoringPass:
        """Do this process' part; return what all have found."""
        candidates, samples, team = self.candidates, self.samples, team_of(model)
        budget = plan_budget(
            model,
            self.groups,
            candidates,
            memory_gb=self.autoquant.memory_gb,
            losses=_losses(self.autoquant),
            samples=samples,
        )
        tokens = team.least(budget.max_tokens)
        if team.count > 1 and self.autoquant.method != "kl_div":  # whose batches are small anyway
            tokens = min(tokens, -(-samples.tokens(max(candidates.scored)) // team.count))
        budget = replace(budget, max_tokens=tokens)
        stream = stream_of(model)
        streamed = -stream.fetched if stream is not None else 0
        started = time.monotonic()
        found = dict(self.amax)
        missing = [count for count in candidates.calibration_sizes() if count not in found]
        in_passing = (
            not (found or candidates.shares)
            and self.autoquant.method != "kl_div"
            and calibrates(model, samples, candidates, boundaries=self.boundaries, budget=budget)
        )
        if missing and not in_passing:
            calibration = _Calibration(samples, self.groups, missing, self.boundaries)
            found |= calibration.run(model, progress)
        seconds = time.monotonic() - started
        log.info(
            "%d cells, %d candidates, at most %d tokens at once; memory above the weights: "
            "%.2f GiB predicted of %.2f GiB",
            len(candidates.of_cell),
            len(candidates.pairs),
            budget.max_tokens,
            budget.predicted / GIB,
            budget.limit / GIB,
        )
        device = device_of(model)
        before = reset_peak(device)
        scores = self._measure(None if in_passing else found)(
            model, samples, boundaries=self.boundaries, budget=budget, progress=progress
        )
        taken = max(0, peak(device) - before)
        log.info("memory above the weights: %.2f GiB taken at most", taken / GIB)
        if stream is not None:
            streamed += stream.fetched
            log.info("%.2f GiB of layers were copied to the device", streamed / GIB)
        took = {"calibrate": seconds, "score": scores.seconds}
        weights = weight_bytes(model)
        return ScoringPass(scores, candidates, budget, took, taken, weights, streamed)

    def _measure(self, known: AmaxBySize | None) -> Callable[..., PassScores]:
        """Return what measures, given amax where they are known."""
        candidates, groups = self.candidates, self.groups
        if self.autoquant.method == "gradient":
            return partial(scorer.score, groups=groups, candidates=candidates, amax=known)
        if self.autoquant.method == "fisher":
            draws, seed = self.autoquant.draws, self.autoquant.seed
            fixed = partial(fisher.estimate, draws=draws, seed=seed)
            return partial(fixed, groups=groups, candidates=candidates, amax=known)
        chosen = None
        if self.only is not None:
            names = {name for name, _ in self.only}
            groups = [group for group in groups if group.name in names]
            chosen = {(name, candidates.of_cell[cell]) for name, cell in self.only}
        return partial(diverge, groups=groups, candidates=candidates, amax=known or {}, only=chosen)


def place(
    model: nn.Module,
    groups: Sequence[Group],
    requests: Sequence[Request],
    autoquant: AutoquantConfig,
    device: torch.device,
) -> None:
    """Move a model to a device, as a whole where it fits, else with its layers streamed.

    Args:
        model: The model, in host memory.
        groups: Its groups.
        requests: What is to be computed.
        autoquant: As of :func:`run_pass`.
        device: Where to.

    Raises:
        UserError: Not even one layer fits.
    """
    placement = plan_placement(
        model,
        groups,
        distinct(requests),
        device,
        memory_gb=autoquant.memory_gb,
        losses=_losses(autoquant),
    )
    if not placement.streamed:
        model.to(device)
        return
    log.info(
        "layers are streamed from host memory: %.2f GiB of weights on the device at once, %.2f GiB "
        "cross the bus each way that a window of samples goes",
        placement.weights / GIB,
        sum(layer_bytes(model).values()) / GIB,
    )
    LayerStream(model, device)


def _losses(autoquant: AutoquantConfig) -> int:
    """Return how many losses go backward."""
    return {"gradient": 1, "fisher": autoquant.draws, "kl_div": 0}[autoquant.method]
