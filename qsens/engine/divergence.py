"""Method ``kl_div``: the true KL divergence of one perturbed group at a time. Needs torch.

For each batch, the outputs of all layers are kept. A perturbed group then costs only what lies
behind it: the layers before hand out what they gave, so no code of a model is repeated here.
"""

from __future__ import annotations

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
from qsens.engine.families import head_of
from qsens.engine.groups import Group
from qsens.engine.model_pass import HEAD_ROWS, layers_of
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
    batches = padded_batches(
        samples,
        scored,
        boundaries=cuts,
        together=batch_tokens(device),
        max_tokens=budget.max_tokens if budget else None,
    )
    found = torch.zeros(len(covered), len(candidates.pairs), scored, dtype=torch.float64)
    losses = torch.zeros(scored, dtype=torch.float64)
    failures: dict[tuple[int, int], str] = {}
    ran: set[str] = set()
    layers = _Layers(model)
    with layers.recording():
        for done, batch in enumerate(batches):
            moved = batch.to(device)
            reference = layers.run(moved)
            losses[list(batch.samples)] = _losses(reference, moved).cpu()
            for position, group in enumerate(covered):
                for weight, active in candidates.active(batch.first).items():
                    for entry, candidate in active:
                        if only is not None and (group.name, candidate) not in only:
                            continue
                        try:
                            with _perturbed(model, group, candidates, weight, entry, maxima, ran):
                                changed = layers.run(moved, behind=group.members)
                        except (torch.OutOfMemoryError, MemoryError):
                            raise
                        except Exception as error:
                            reason = f"{group.name}: {error}".splitlines()[0]
                            failures.setdefault((position, candidate), reason)
                            continue
                        per_sample = _divergence(reference, changed, moved.predicts())
                        found[position, candidate, list(batch.samples)] = per_sample.cpu()
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

    @contextmanager
    def recording(self) -> Iterator[None]:
        for name, module in self.named.items():
            module.forward = self._wrap(name, module.forward)
        try:
            yield
        finally:
            for module in self.named.values():
                del module.forward

    def run(self, batch: Batch, behind: Sequence[str] | None = None) -> torch.Tensor:
        """Return logits ``(samples, longest, vocabulary)``.

        Args:
            batch: The batch.
            behind: Names of perturbed modules: layers that ran before all of them are not run
                again. Without, everything runs and is kept.
        """
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
                return self.outputs[name]
            output = forward(*args, **kwargs)
            if name not in self.outputs:
                self.order.append(name)
                self.outputs[name] = output
            return output

        return run


@contextmanager
def _perturbed(
    model: nn.Module,
    group: Group,
    candidates: Candidates,
    weight: int,
    entry: int,
    maxima: Mapping[int, Maxima],
    ran: set[str],
) -> Iterator[None]:
    """Quantize the members of ``group`` while the context lasts; note in ``ran`` which ran."""
    with ExitStack() as stack:
        for name in group.members:
            module = model.get_submodule(name)
            chosen = candidates.inputs[entry]
            amax = maxima[chosen.snapshot][name] if chosen.snapshot is not None else None
            quantized = quantize_weight(
                module.weight,  # type: ignore[arg-type]
                candidates.weights[weight],
            )
            module.forward = _changed(module, quantized, chosen.cfg, amax)
            stack.callback(delattr, module, "forward")
            hook = module.register_forward_pre_hook(lambda *_, name=name: ran.add(name))
            stack.callback(hook.remove)
        yield


def _changed(
    module: nn.Module,
    weight: torch.Tensor,
    cfg: Mapping[str, Any] | None,
    amax: torch.Tensor | None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if cfg is not None:
            x = quantize(x, cfg, None if amax is None else amax.to(x.device))
        bias: torch.Tensor | None = module.bias  # type: ignore[assignment]
        if isinstance(module, nn.Linear):
            return F.linear(x, weight, bias)
        output: torch.Tensor = module._conv_forward(x, weight, bias)  # type: ignore[operator]
        return output

    return forward


def _divergence(
    reference: torch.Tensor, changed: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Return ``sum KL(p || q)`` over the positions of each sample that count, float64."""
    per_token = torch.zeros(counts.shape, dtype=torch.float64, device=reference.device)
    where = counts.nonzero(as_tuple=True)
    values = torch.empty(len(where[0]), dtype=torch.float64, device=reference.device)
    for start in range(0, len(values), HEAD_ROWS):
        rows = tuple(index[start : start + HEAD_ROWS] for index in where)
        # Small divergences are sums of differences near 0: float32 would drown them.
        p = torch.log_softmax(reference[rows].double(), dim=-1)
        q = torch.log_softmax(changed[rows].double(), dim=-1)
        values[start : start + HEAD_ROWS] = (p.exp() * (p - q)).sum(dim=-1)
    per_token[where] = values
    return per_token.sum(dim=1)


def _losses(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return each sample's summed cross-entropy over its labels, in nats."""
    labels = batch.input_ids[:, 1:].masked_fill(~batch.label_mask(), -100)
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
    )
    return losses.view(labels.shape).double().sum(dim=1)
