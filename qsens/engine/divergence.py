"""Method ``kl_div``: the true KL divergence of one perturbed group at a time. Needs torch.

For each batch, the outputs of all layers are kept. A perturbed group then costs only what lies
behind it: the layers before hand out what they gave, so no code of a model is repeated here. As
many candidates of a group as fit go through at once, each with a copy of the batch.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qsens.engine.budget import Budget
from qsens.engine.calibrate import Maxima
from qsens.engine.candidates import Candidates
from qsens.engine.experts import input_names, is_experts, run
from qsens.engine.families import head_of
from qsens.engine.groups import Group
from qsens.engine.model_pass import HEAD_ROWS, layers_of, weight_of
from qsens.engine.quantizer import quantize, quantize_weight
from qsens.engine.samples import Batch, Samples, batch_tokens, padded_batches, padding_share
from qsens.engine.scores import PassScores, Progress, silent


@torch.no_grad()
def diverge(
    model: nn.Module,
    samples: Samples,
    groups: Sequence[Group],
    candidates: Candidates,
    maxima: Mapping[int, Maxima],
    *,
    boundaries: Sequence[int],
    budget: Budget | None = None,
    only: Collection[tuple[str, int]] | None = None,
    progress: Progress = silent,
) -> PassScores:
    """Measure ``KL(p || q)`` of every candidate on every covered group, in nats.

    ``p`` is the model's distribution of the next token, ``q`` that of the model with one group
    quantized; the divergences are summed over the positions of a sample that count, see
    :meth:`qsens.engine.samples.Batch.predicts`. The arguments are those of
    :func:`qsens.engine.fused.score`; so is the result, but for ``errors``, which are not measured.
    ``only`` names the groups and candidates to measure; all of them when not given, and the others
    are 0.
    """
    started = time.monotonic()
    covered = tuple(group for group in groups if group.covered)
    scored = min(max(candidates.scored), len(samples))
    cuts = [*boundaries, *candidates.scored]
    device = next(model.parameters()).device
    together = batch_tokens(device)
    limit = budget.max_tokens if budget else together
    batches = padded_batches(samples, scored, boundaries=cuts, together=together, max_tokens=limit)
    together = min(together, limit)
    found = torch.zeros(len(covered), len(candidates.pairs), scored, dtype=torch.float64)
    losses = torch.zeros(scored, dtype=torch.float64)
    failures: dict[tuple[int, int], str] = {}
    ran: set[str] = set()
    layers = _Layers(model)
    with layers.recording():
        for done, batch in enumerate(batches):
            moved = batch.to(device)
            copies = max(1, together // batch.input_ids.numel())
            reference = layers.run(moved)
            losses[list(batch.samples)] = _losses(reference, moved).cpu()
            for position, group in enumerate(covered):
                wanted = [
                    candidate
                    for active in candidates.active(batch.first).values()
                    for _, candidate in active
                    if only is None or (group.name, candidate) in only
                ]
                for start in range(0, len(wanted), copies):
                    chosen = wanted[start : start + copies]
                    change = _Change(model, group, candidates, chosen, maxima)
                    with change.made():
                        changed = layers.run(moved.repeat(len(chosen)), group.members, len(chosen))
                    ran |= change.ran
                    failures |= {(position, c): why for c, why in change.failures.items()}
                    divergences = _divergences(reference, changed, moved.predicts()).cpu()
                    for candidate, per_sample in zip(chosen, divergences, strict=True):
                        if (position, candidate) not in failures:
                            found[position, candidate, list(batch.samples)] = per_sample
            progress("score", done + 1, len(batches))
    return PassScores(
        groups=covered,
        per_sample=found,
        errors=None,
        norms=None,
        reached=tuple(all(name in ran for name in group.members) for group in covered),
        failures=failures,
        loss=losses,
        seconds=time.monotonic() - started,
        padding_share=padding_share(batches),
        maxima=maxima,
    )


class _Layers:
    """Runs a model and keeps what its layers gave, so that a later run can start behind some."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.named = layers_of(model)
        self.order: list[str] = []
        self.outputs: dict[str, Any] = {}
        self.skip: frozenset[str] = frozenset()
        self.copies = 1

    @contextmanager
    def recording(self) -> Iterator[None]:
        for name, module in self.named.items():
            module.forward = self._wrap(name, module.forward)
        try:
            yield
        finally:
            for module in self.named.values():
                del module.forward

    def run(
        self, batch: Batch, behind: Sequence[str] | None = None, copies: int = 1
    ) -> torch.Tensor:
        """Return logits ``(samples, longest, vocabulary)``.

        Args:
            batch: The batch.
            behind: Names of perturbed modules: layers that ran before all of them are not run
                again. Without, everything runs and is kept.
            copies: How often the batch that was kept stands in this one.
        """
        self.copies = copies
        if behind is None:
            self.order, self.outputs, self.skip = [], {}, frozenset()
        else:
            self.skip = frozenset(self._before(behind))
        output = self.model(**batch.inputs(), attention_mask=batch.attention_mask, use_cache=False)
        logits: torch.Tensor = output.logits
        return logits

    def _before(self, members: Sequence[str]) -> list[str]:
        inside = [
            index
            for index, layer in enumerate(self.order)
            if any(member.startswith(f"{layer}.") for member in members)
        ]
        if inside:
            return self.order[: min(inside)]
        # The head lies behind all layers; what else lies outside them may lie before the first.
        head = head_of(self.model)
        is_head = all(self.model.get_submodule(member) is head for member in members)
        return self.order if is_head else []

    def _wrap(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if name in self.skip:
                return _repeated(self.outputs[name], self.copies)
            output = forward(*args, **kwargs)
            if name not in self.outputs:
                self.order.append(name)
                self.outputs[name] = output
            return output

        return run


class _Change:
    """One group quantized in several ways at once: each way has a copy of the batch.

    Args:
        model: The model.
        group: The group.
        candidates: What is computed.
        chosen: The candidates, in the order of their copies.
        maxima: Calibrated maxima of every module's input, by snapshot.

    Attributes:
        ran: Members that ran.
        failures: Why a candidate cannot be computed; its copy stays as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        group: Group,
        candidates: Candidates,
        chosen: Sequence[int],
        maxima: Mapping[int, Maxima],
    ) -> None:
        self.group = group
        self.modules = {name: model.get_submodule(name) for name in group.members}
        self.candidates = candidates
        self.chosen = chosen
        self.maxima = maxima
        self.ran: set[str] = set()
        self.failures: dict[int, str] = {}

    @contextmanager
    def made(self) -> Iterator[None]:
        """Quantize the members while the context lasts."""
        with ExitStack() as stack:
            for name, module in self.modules.items():
                module.forward = self._forward(name, module)
                stack.callback(delattr, module, "forward")
            yield

    def _forward(self, name: str, module: nn.Module) -> Callable[..., torch.Tensor]:
        if is_experts(module):
            return functools.partial(self._experts, name, module)
        weight = weight_of(module)
        quantized: dict[int, torch.Tensor] = {}
        for index in {self.candidates.pairs[candidate][0] for candidate in self.chosen}:
            try:
                quantized[index] = quantize_weight(weight, self.candidates.weights[index])
            except Exception as error:
                readers = [c for c in self.chosen if self.candidates.pairs[c][0] == index]
                self._fail(readers, error)

        def forward(x: torch.Tensor) -> torch.Tensor:
            self.ran.add(name)
            outputs = []
            for candidate, part in zip(self.chosen, x.chunk(len(self.chosen)), strict=True):
                index, entry = self.candidates.pairs[candidate]
                try:
                    given = self._quantized(name, entry, part)
                except Exception as error:
                    self._fail([candidate], error)
                    given = part
                outputs.append(_apply(module, given, quantized.get(index, weight)))
            return torch.cat(outputs)

        return forward

    def _experts(
        self, name: str, module: nn.Module, x: torch.Tensor, *routing: torch.Tensor
    ) -> torch.Tensor:
        """Return what experts give: each copy's with its own formats."""
        self.ran.add(name)
        first, second = input_names(name, module)
        outputs = []
        copies = (each.chunk(len(self.chosen)) for each in (x, *routing))
        for candidate, part, chosen, gates in zip(self.chosen, *copies, strict=True):
            weight, entry = self.candidates.pairs[candidate]
            quantized = functools.partial(quantize_weight, cfg=self.candidates.weights[weight])
            inner = functools.partial(self._quantized, second, entry)
            try:
                given = self._quantized(first, entry, part)
                found = run(module, given, chosen, gates, weights=quantized, inner=inner)
            except Exception as error:
                self._fail([candidate], error)
                found = part
            outputs.append(found)
        return torch.cat(outputs)

    def _quantized(self, name: str, entry: int, x: torch.Tensor) -> torch.Tensor:
        chosen = self.candidates.inputs[entry]
        if chosen.cfg is None:
            return x
        amax = self.maxima[chosen.snapshot][name] if chosen.snapshot is not None else None
        return quantize(x.contiguous(), chosen.cfg, None if amax is None else amax.to(x.device))

    def _fail(self, candidates: Sequence[int], error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise error
        for candidate in candidates:
            self.failures.setdefault(candidate, f"{self.group.name}: {error}".splitlines()[0])


def _apply(module: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    bias: torch.Tensor | None = module.bias  # type: ignore[assignment]
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    output: torch.Tensor = module._conv_forward(x, weight, bias)  # type: ignore[operator]
    return output


def _repeated(output: Any, copies: int) -> Any:
    """Return what a layer gave, as often as there are copies of the batch."""
    if copies == 1:
        return output
    if isinstance(output, tuple):
        return tuple(_repeated(part, copies) for part in output)
    if not isinstance(output, torch.Tensor):
        return output
    return output.repeat(copies, *[1] * (output.ndim - 1))


def _divergences(
    reference: torch.Tensor, changed: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Return ``sum KL(p || q)`` over the positions of each sample that count, float64.

    Args:
        reference: Logits of the model, ``(samples, longest, vocabulary)``.
        changed: Logits of every copy, ``(copies * samples, longest, vocabulary)``.
        counts: Where a position counts, ``(samples, longest)``, bool.

    Returns:
        ``(copies, samples)``
    """
    each = changed.view(-1, *reference.shape)
    per_token = torch.zeros(len(each), *counts.shape, dtype=torch.float64, device=reference.device)
    where = counts.nonzero(as_tuple=True)
    for start in range(0, len(where[0]), HEAD_ROWS):
        rows = tuple(index[start : start + HEAD_ROWS] for index in where)
        # Small divergences are sums of differences near 0: float32 would drown them.
        log_p = torch.log_softmax(reference[rows].double(), dim=-1)
        p = log_p.exp()
        for copy, logits in zip(per_token, each, strict=True):
            log_q = torch.log_softmax(logits[rows].double(), dim=-1)
            copy[rows] = (p * log_p.sub(log_q)).sum(dim=-1)
    return per_token.sum(dim=-1)


def _losses(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return each sample's summed cross-entropy over its labels, in nats."""
    labels = batch.input_ids[:, 1:].masked_fill(~batch.label_mask(), -100)
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
    )
    return losses.view(labels.shape).double().sum(dim=1)
