"""What an engine hands back for one cell: a score a group, with its status."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from qsens.checkpoint.groups import Group
from qsens.engine.candidates import CalibrationSize
from qsens.errors import Fault, UserError
from qsens.schema.manifest import Status

Progress = Callable[[str, int, int], None]
"""Called as work goes on: the phase, steps done, steps in all."""


def silent(phase: str, done: int, total: int) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class ExpertScores:
    """The scores of the experts of one mixture, each as if it alone were quantized.

    Attributes:
        sensitivity: By expert, as :attr:`GroupScore.sensitivity`; none where it got no token, or
            where it is not finite.
        tokens: Real tokens of the samples scored that each expert got.
    """

    sensitivity: tuple[float | None, ...]
    tokens: tuple[int, ...]

    def without_tokens(self) -> tuple[int, ...]:
        """Return the experts that got no token."""
        return tuple(number for number, tokens in enumerate(self.tokens) if not tokens)


class Failures:
    """What of a pass could not be computed; the rest of it goes on.

    A format that the numerics refuse for a group is a fact about both, and will be one again: it is
    a row of the result. Anything else (a full disk, a missing compiler, a bug) may pass or be
    mended: the cells that read the candidate get no result.

    Attributes:
        refused: Why the numerics refuse it, by group and candidate index.
        broken: What went wrong otherwise, by candidate index: the first of it.
    """

    def __init__(self) -> None:
        self.refused: dict[tuple[int, int], str] = {}
        self.broken: dict[int, Exception] = {}

    def add(self, name: str, group: int, candidates: Iterable[int], error: Exception) -> None:
        """Note why candidates cannot be computed on a module; lack of memory ends the pass.

        Args:
            name: The module or group, for the message.
            group: Index of its group.
            candidates: Indices of the candidates.
            error: What was raised.
        """
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise error
        for candidate in candidates:
            if isinstance(error, UserError):
                reason = f"{name}: {error}".splitlines()[0]
                self.refused.setdefault((group, candidate), reason)
            else:
                self.broken.setdefault(candidate, error)

    def absorb(self, other: Failures) -> None:
        """Note what another process of the same pass could not compute."""
        for place, reason in other.refused.items():
            self.refused.setdefault(place, reason)
        for candidate, error in other.broken.items():
            self.broken.setdefault(candidate, error)

    def fault(self, candidate: int, where: str) -> Fault | None:
        """Return why the cells that read a candidate have no result; none where they have one.

        Args:
            candidate: Index of the candidate.
            where: The cell, for the message.
        """
        error = self.broken.get(candidate)
        if error is None:
            return None
        first = (str(error).strip() or "no message").splitlines()[0]
        fault = Fault(
            f"{type(error).__name__}: {first}",
            where=where,
            remedy="Nothing of it was stored. Run it again; if it stays, it is a bug: report it.",
        )
        fault.__cause__ = error
        return fault


@dataclass(frozen=True)
class GroupScore:
    """The score of one group in one format.

    Attributes:
        group: The group.
        status: Whether it was scored, and if not, why not.
        reason: The same in words, where it was not.
        sensitivity: Method ``gradient``: ``sum_i s_i / T_b(i)^2``; ``fisher`` and ``kl_div``: the
            divergence summed over all real tokens, in nats. None unless scored.
        sensitivity_per_token: ``gradient``: ``sum_i s_i / sum_i T_i``; the others: nats a real
            token. None where the engine cannot tell.
        standard_error: Of ``sensitivity_per_token``, from the draws of ``fisher`` alone: how far
            off the divergence of these very samples may be. None for other methods.
        relative_error: ``||dY||^2 / ||Y||^2``, summed over members; none where not measured.
        experts: Of a mixture, its experts apart, where they were measured.
        by_domain: Of several data sets: ``sensitivity_per_token`` over the samples of each.
    """

    group: Group
    status: Status
    reason: str | None = None
    sensitivity: float | None = None
    sensitivity_per_token: float | None = None
    relative_error: float | None = None
    standard_error: float | None = None
    experts: ExpertScores | None = None
    by_domain: Mapping[str, float] | None = None


@dataclass(frozen=True)
class ExpertTable:
    """What a pass found for each expert of one mixture.

    Attributes:
        per_sample: As :attr:`PassScores.per_sample`, with only one expert
            quantized, ``(experts, candidates, samples)``, float32.
        tokens: Real tokens of each sample that each expert got, ``(experts, samples)``, int64.
    """

    per_sample: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def empty(cls, experts: int, candidates: int, samples: int) -> ExpertTable:
        """Return a table of zeros."""
        return cls(
            torch.zeros(experts, candidates, samples),
            torch.zeros(experts, samples, dtype=torch.int64),
        )


@dataclass(frozen=True)
class PassScores:
    """What one pass over the samples found, for all its candidates.

    Attributes:
        groups: The covered groups, in model order.
        per_sample: ``(groups, candidates, samples)``, float64 on the CPU; 0 where a candidate does
            not score a sample. Method ``gradient``: ``s_i``; the others: nats.
        errors: ``||dY||^2`` over the real tokens of each sample, shaped as ``per_sample``; none
            where it is not measured.
        norms: ``||Y||^2`` of the same tokens, ``(groups, samples)``; none where it is not measured.
        reached: Whether a gradient reached every member of each group; ``kl_div``: whether every
            member ran.
        failures: What could not be computed.
        loss: Summed loss of each sample, in nats.
        seconds: What the pass took.
        padding_share: Padded tokens over all tokens, 0 to 1.
        amax: The calibrated amax that it used, by calibration size.
        draws: Method ``fisher``: what each draw says, ``(groups, candidates, samples, draws)``, in
            nats; their mean is ``per_sample``.
        experts: What each expert of a mixture has to do with it, by module name.
        floor: Method ``kl_div`` of a model that rounds more than float32: the divergence of the
            model as it is from itself in float32, in nats, ``(samples,)``; none for other models.
    """

    groups: tuple[Group, ...]
    per_sample: torch.Tensor
    errors: torch.Tensor | None
    norms: torch.Tensor | None
    reached: tuple[bool, ...]
    failures: Failures
    loss: torch.Tensor
    seconds: float
    padding_share: float
    amax: Mapping[CalibrationSize, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    draws: torch.Tensor | None = None
    experts: Mapping[str, ExpertTable] = field(default_factory=dict)
    floor: torch.Tensor | None = None


@dataclass(frozen=True)
class CellScores:
    """The scores of one cell.

    Attributes:
        groups: One entry a group, in model order.
        module_types: Class under ModelOpt of every module that can be quantized, by name.
        tensors: Per-sample scores and calibrated amax, for the state file.
        timings: Seconds by phase.
        padding_share: Padded tokens over all tokens that went through the model, 0 to 1.
        notices: What a reader should know about how it was computed.
        floor: As :attr:`PassScores.floor`, nats a token over the samples scored.
    """

    groups: tuple[GroupScore, ...]
    module_types: Mapping[str, str]
    tensors: Mapping[str, torch.Tensor]
    timings: Mapping[str, float]
    padding_share: float
    notices: tuple[str, ...] = field(default=())
    floor: float | None = None
