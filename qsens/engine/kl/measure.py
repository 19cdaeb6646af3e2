"""Method ``kl_div``: the true KL divergence of one perturbed group at a time. Needs torch.

A batch runs once as it is. A perturbed group then costs only what lies behind it, and as many
groups and candidates as fit go through together, each on a copy of the batch, see
:mod:`qsens.engine.kl.perturbed_forward`. The head is applied in chunks of rows, to those alone that
count.

Everything behind the weights is float32, see :mod:`qsens.engine.float32`; quantized weights are
what :func:`qsens.engine.quantizer.quantize_weight` gives in their own data type. Beside it stands
how far the model as it is, rounding its activations, lies from that.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from qsens.checkpoint.groups import Group
from qsens.checkpoint.structure import traits_of
from qsens.data.samples import (
    BATCH_TOKENS,
    Batch,
    Samples,
    padded_batches,
    padding_share,
)
from qsens.engine.amax import Amax
from qsens.engine.candidates import CalibrationSize, Candidates
from qsens.engine.cross_entropy import negative_log_likelihood
from qsens.engine.float32 import in_float32, is_narrow
from qsens.engine.head import HEAD_ROWS
from qsens.engine.kl.divergence import divergences
from qsens.engine.kl.perturbed_forward import Perturbation, PerturbedForward
from qsens.engine.memory import Budget
from qsens.engine.scores import PassScores, Progress, silent
from qsens.engine.team import team_of, unite

# Tokens that go through together, over all copies of a batch. On a GPU few kernels are what counts;
# a CPU is quickest while what a layer makes of them stays in its caches.
_TOKENS = {"cuda": 4 * BATCH_TOKENS, "cpu": BATCH_TOKENS // 2}
# Tokens of a batch: in a larger one samples differ more in length, and are padded in every copy; of
# a smaller one more go through alone.
_BATCH_TOKENS = BATCH_TOKENS // 32
# Copies that are to fit: the one that stays as it is costs as much as another.
_COPIES = 8


@torch.no_grad()
def diverge(
    model: nn.Module,
    samples: Samples,
    groups: Sequence[Group],
    candidates: Candidates,
    amax: Mapping[CalibrationSize, Amax],
    *,
    boundaries: Sequence[int],
    budget: Budget | None = None,
    only: Collection[tuple[str, int]] | None = None,
    progress: Progress = silent,
) -> PassScores:
    """Measure ``KL(p || q)`` of every candidate on every covered group, in nats.

    ``p`` is the model's distribution of the next token, ``q`` that of the model with one group
    quantized; the divergences are summed over the positions of a sample that count, see
    :meth:`qsens.data.samples.Batch.predicts`. The arguments are those of
    :func:`qsens.engine.gradient.scorer.score`; so is the result, but for ``errors``, which are not
    measured. ``only`` names the groups and candidates to measure; all of them when not given, and
    the others are 0.
    """
    started = time.monotonic()
    covered = tuple(group for group in groups if group.covered)
    scored = min(max(candidates.scored), len(samples))
    forwards = PerturbedForward(model, covered, candidates, amax)
    tokens = _TOKENS["cuda" if forwards.device.type == "cuda" else "cpu"]
    if budget:
        tokens = min(tokens, budget.max_tokens)
    batches = padded_batches(
        samples,
        scored,
        boundaries=[*boundaries, *candidates.scored],
        together=min(_BATCH_TOKENS, tokens // _COPIES),
        pads=traits_of(model).pads,
    )
    padding, team = padding_share(batches), team_of(model)
    batches = team.share(batches)
    nats = torch.zeros(len(covered), len(candidates.pairs), scored, dtype=torch.float64)
    losses = torch.zeros(scored, dtype=torch.float64)
    rounds = is_narrow(next(model.parameters()).dtype)
    floor = torch.zeros(scored, dtype=torch.float64) if rounds else None
    measured = []
    with forwards.recorded():
        for done, batch in enumerate(batches):
            perturbations = [
                Perturbation(group, candidate)
                for group in range(len(covered))
                for active in candidates.active(batch.first).values()
                for _, candidate in active
                if only is None or (covered[group].name, candidate) in only
            ]
            each = max(1, tokens // batch.input_ids.numel() - 1)
            rounded = forwards.alone(batch) if rounds else None
            with in_float32(model):
                measured.append(_Measured(forwards, batch, perturbations, each, rounded))
            progress("score", done + 1, len(batches))
    # Read at the end: until here, nothing has waited for the device.
    for batch, of_batch in zip(batches, measured, strict=True):
        order = list(batch.samples)
        losses[order] = of_batch.losses.cpu()
        if floor is not None and of_batch.floor is not None:
            floor[order] = of_batch.floor.cpu()
        for perturbation, per_sample in of_batch.sums():
            nats[perturbation.group, perturbation.candidate, order] = per_sample
    team.add([nats, losses, *([floor] if floor is not None else [])])
    ran = unite(team, forwards.ran, forwards.failures)
    for group, candidate in forwards.failures.refused:
        nats[group, candidate] = 0
    if forwards.head_group is not None:
        ran |= set(covered[forwards.head_group].members)
    return PassScores(
        groups=covered,
        per_sample=nats,
        errors=None,
        norms=None,
        reached=tuple(all(name in ran for name in group.members) for group in covered),
        failures=forwards.failures,
        loss=losses,
        seconds=time.monotonic() - started,
        padding_share=padding,
        amax=amax,
        floor=floor,
    )


class _Measured:
    """What changes do to the distributions of one batch.

    Args:
        forwards: Runs the batch.
        batch: The batch.
        perturbations: The changes.
        together: Changes that go through the model at once.
        rounded: The head's input where the model rounds activations as it does by itself,
            ``(samples, longest, hidden)``; none where it rounds no more than float32 does.

    Attributes:
        losses: Each sample's cross-entropy over its labels, in nats, ``(samples,)``, float64.
        floor: The divergence of that model from the one in float32, likewise; none without.
    """

    def __init__(
        self,
        forwards: PerturbedForward,
        batch: Batch,
        perturbations: Sequence[Perturbation],
        together: int,
        rounded: torch.Tensor | None,
    ) -> None:
        self._forwards = forwards
        self._head = forwards.head
        self._samples, longest = batch.input_ids.shape
        where = batch.predicts().flatten().nonzero()[:, 0]
        self._where = where.to(forwards.device)
        self._sample = (where // longest).to(forwards.device)
        hidden = forwards.alone(batch)
        self.losses = self._losses(batch, hidden)
        self.floor = None if rounded is None else self._floor(hidden, rounded)
        self._done: list[Perturbation] = []
        self._nats: list[torch.Tensor] = []
        of_head = [
            perturbation
            for perturbation in perturbations
            if perturbation.group == forwards.head_group
        ]
        if of_head:
            self._behind_head(of_head, hidden.flatten(0, 1)[self._where])
        order = forwards.in_order(perturbations)
        for start in range(0, len(order), together):
            chosen = order[start : start + together]
            self._behind(chosen, forwards.run(chosen).flatten(1, 2)[:, self._where])

    def sums(self) -> list[tuple[Perturbation, torch.Tensor]]:
        """Return the divergences of each change, summed over each sample, on the CPU."""
        if not self._done:
            return []
        return list(zip(self._done, torch.cat(self._nats).cpu(), strict=True))

    def _losses(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        mask = batch.label_mask()
        labels = batch.input_ids[:, 1:][mask].to(hidden.device)
        sample, position = (index.to(hidden.device) for index in mask.nonzero(as_tuple=True))
        rows = hidden[sample, position]
        parts = [
            negative_log_likelihood(self._head(some).log_softmax(dim=-1), asked)
            for some, asked in zip(
                torch.split(rows, HEAD_ROWS), torch.split(labels, HEAD_ROWS), strict=True
            )
        ]
        sums = torch.zeros(self._samples, dtype=torch.float64, device=hidden.device)
        return sums.index_add_(0, sample, torch.cat(parts))

    def _floor(self, hidden: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        """Return the divergence of each sample between two inputs of the head."""
        parts = []
        for rows, other in zip(
            torch.split(hidden.flatten(0, 1)[self._where], HEAD_ROWS),
            torch.split(rounded.flatten(0, 1)[self._where], HEAD_ROWS),
            strict=True,
        ):
            # As the model gives them: its logits are rounded as well.
            logits = self._head(other.float()).to(other.dtype).float()
            parts.append(divergences(self._head(rows), logits))
        return self._summed(torch.cat(parts, dim=1))[0]

    def _behind(self, perturbations: Sequence[Perturbation], hidden: torch.Tensor) -> None:
        """Measure how far ``(1 + perturbations, rows, hidden)`` are from their first."""
        parts = []
        for first in range(0, hidden.shape[1], HEAD_ROWS):
            rows = hidden[:, first : first + HEAD_ROWS]
            reference = self._head(rows[0])
            each = max(1, HEAD_ROWS // rows.shape[1])
            by_part = [
                divergences(reference, self._head(changed.flatten(0, 1)))
                for changed in torch.split(rows[1:], each)
            ]
            parts.append(torch.cat(by_part))
        self._book(perturbations, torch.cat(parts, dim=1))

    def _behind_head(self, perturbations: Sequence[Perturbation], hidden: torch.Tensor) -> None:
        """Measure changes of the head, which reads ``(rows, hidden)``."""
        assert self._forwards.head_group is not None
        name = self._forwards.groups[self._forwards.head_group].members[0]
        for alike, weight in self._forwards.heads(perturbations):
            parts: dict[Perturbation, list[torch.Tensor]] = {
                perturbation: [] for perturbation in alike
            }
            for rows in torch.split(hidden, HEAD_ROWS):
                reference = self._head(rows)
                for perturbation in alike:
                    given = self._forwards.given(name, perturbation, rows)
                    if given is not None:
                        changed = self._head(given, weight)
                        parts[perturbation].append(divergences(reference, changed))
            for perturbation, values in parts.items():
                if values:
                    self._book([perturbation], torch.cat(values, dim=1))

    def _book(self, perturbations: Sequence[Perturbation], values: torch.Tensor) -> None:
        """Note ``(perturbations, rows)``, summed over the rows of each sample."""
        self._done += perturbations
        self._nats.append(self._summed(values))

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        sums = values.new_zeros(len(values), self._samples)
        return sums.index_add_(1, self._sample, values)
