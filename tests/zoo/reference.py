"""Scores by plain autograd, one module after the other. Needs torch.

Shares nothing with the engine but the quantizers: modules run by their own code or by loops over
tokens, gradients come from one backward pass of the whole model with nothing recomputed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from qsens.numerics import fake_quantize

Cfg = Mapping[str, Any]
_STEP = 1 / 64


@dataclass(frozen=True)
class Format:
    """A weight quantizer and an input quantizer; none leaves inputs alone."""

    weight: Cfg
    input: Cfg | None


@dataclass
class Run:
    """One run of a module: what it was called with, what it gave, and its place in the graph."""

    name: str
    args: tuple[Any, ...]
    value: torch.Tensor
    output: torch.Tensor


class Reference:
    """A model with the modules that are scored, over samples of one length.

    Args:
        model: The model, in evaluation mode.
        ids: Token ids, ``(samples, tokens)``.
        members: Names of the modules of each group.
        more: What else the model is called with, such as a picture.
        first: Index of the first token that is a label.
    """

    def __init__(
        self,
        model: Any,
        ids: torch.Tensor,
        members: Sequence[Sequence[str]],
        more: Mapping[str, torch.Tensor] | None = None,
        first: int = 1,
    ) -> None:
        self.model, self.ids, self.members, self._first = model, ids, members, first
        self.inputs: dict[str, Any] = {"input_ids": ids, **(more or {})}
        if "use_cache" in inspect.signature(model.forward).parameters:
            self.inputs["use_cache"] = False  # some have none for all of their layers
        self.modules: dict[str, nn.Module] = {
            name: model.get_submodule(name) for names in members for name in names
        }
        self.runs: list[Run] = []
        self.gradients: Sequence[torch.Tensor | None] = []
        self._backward()
        self.amax: dict[str, torch.Tensor] = {}
        for run in self.runs:
            self._changed(run, None)  # notes what every quantizer reads

    def gradient(self, form: Format) -> torch.Tensor:
        """Return ``sum((G * dY)^2)`` of each group and sample, float64."""
        scores = torch.zeros(len(self.members), len(self.ids), dtype=torch.float64)
        for run, grad in zip(self.runs, self.gradients, strict=True):
            if grad is None:
                continue
            change = self._changed(run, form).view_as(run.value) - run.value
            squares = (grad * change).double().square().reshape(len(self.ids), -1).sum(dim=1)
            (group,) = (at for at, names in enumerate(self.members) if run.name in names)
            scores[group] += squares
        return scores

    def fisher(self, form: Format) -> torch.Tensor:
        """Return half the expected squared product with the gradient of a drawn label's likelihood.

        Of each group, over all samples, float64. Labels of different positions are independent, and
        the expectation of the square is the variance of the change of the logits under ``p``.
        """
        changes = [self._changed(run, form).view_as(run.value) - run.value for run in self.runs]
        with torch.no_grad():
            p = self.model(**self.inputs).logits.double().softmax(dim=-1)
        totals = []
        for names in self.members:
            both = enumerate(zip(self.runs, changes, strict=True))
            moves = {at: change for at, (run, change) in both if run.name in names}
            change = self._along(moves).double()
            centred = change - (p * change).sum(dim=-1, keepdim=True)
            totals.append((p * centred.square()).sum() / 2)
        return torch.stack(totals)

    def _backward(self) -> None:
        start = torch.zeros((), requires_grad=True)

        def note(name: str, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            output = output + start
            kept = tuple(each.detach().clone() if torch.is_tensor(each) else each for each in args)
            self.runs.append(Run(name, kept, output.detach().clone(), output))
            return output.clone()

        with self._hooked(lambda name, args, output: note(name, args, output)), torch.enable_grad():
            logits = self.model(**self.inputs).logits.float()
            loss = sum(
                F.cross_entropy(one[self._first - 1 : -1], own[self._first :], reduction="sum")
                for one, own in zip(logits, self.ids, strict=True)
            )
            reached = [run for run in self.runs if run.output.requires_grad]
            grads = torch.autograd.grad(loss, [run.output for run in reached], allow_unused=True)
        by_run = {id(run): grad for run, grad in zip(reached, grads, strict=True)}
        self.gradients = [by_run.get(id(run)) for run in self.runs]

    def _along(self, moves: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Return the derivative of the logits when what some runs give moves that way.

        It is what a vector-Jacobian product, which is linear in its vector, is the transpose of.
        """
        step = torch.zeros((), requires_grad=True)
        try:
            # Other kernels have no second derivative.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                logits = self._moved(moves, step)
                if not logits.requires_grad:  # none of them reaches the logits
                    return torch.zeros_like(logits)
                vector = torch.zeros_like(logits, requires_grad=True)
                (product,) = torch.autograd.grad(logits, step, vector, create_graph=True)
                (derivative,) = torch.autograd.grad(product, vector)
                return derivative
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
        with torch.no_grad():  # what a model writes in place has no second derivative
            ahead, behind = (self._moved(moves, torch.tensor(sign * _STEP)) for sign in (1, -1))
        return (ahead - behind) / (2 * _STEP)

    def _moved(self, moves: Mapping[int, torch.Tensor], step: torch.Tensor) -> torch.Tensor:
        count = iter(range(len(self.runs)))

        def moved(name: str, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            move = moves.get(next(count))
            return output if move is None else output + step * move

        with self._hooked(moved):
            logits: torch.Tensor = self.model(**self.inputs).logits
        return logits

    @torch.no_grad()
    def _changed(self, run: Run, form: Format | None) -> torch.Tensor:
        """Return what a run gives under a format; under none, note what quantizers would read."""
        module: Any = self.modules[run.name]
        if hasattr(module, "is_concatenated"):
            return self._experts(run, module, form)
        x = self._input(run.name, run.args[0], form)
        weight = module.weight.T.contiguous() if isinstance(module, Conv1D) else module.weight
        if form is not None:
            weight = fake_quantize(weight, form.weight)
        return F.linear(x, weight, module.bias)

    def _experts(self, run: Run, module: Any, form: Format | None) -> torch.Tensor:
        """Return what experts give, a token and an expert of it at a time."""
        x, chosen, gates = run.args[:3]
        x = x.reshape(-1, x.shape[-1])
        chosen, gates = chosen.reshape(len(x), -1), gates.reshape(len(x), -1)
        first = "gate_up_proj" if module.has_gate else "up_proj"
        weights = [getattr(module, name) for name in (first, "down_proj")]
        if module.is_transposed:
            weights = [weight.transpose(1, 2) for weight in weights]
        if form is not None:
            weights = [
                torch.stack([fake_quantize(one.contiguous(), form.weight) for one in weight])
                for weight in weights
            ]
        x = self._input(f"{run.name}.{first}", x, form)
        output = torch.zeros_like(x)
        for token in range(len(x)):
            for expert, gate in zip(chosen[token].tolist(), gates[token], strict=True):
                hidden = weights[0][expert] @ x[token]
                if module.has_bias:
                    hidden = hidden + getattr(module, f"{first}_bias")[expert]
                if module.has_gate:
                    hidden = module._apply_gate(hidden[None])[0]
                else:
                    hidden = module.act_fn(hidden)
                hidden = self._input(f"{run.name}.down_proj", hidden[None], form)[0]
                given = weights[1][expert] @ hidden
                if module.has_bias:
                    given = given + module.down_proj_bias[expert]
                output[token] += gate * given
        return output

    def _input(self, name: str, x: torch.Tensor, form: Format | None) -> torch.Tensor:
        if form is None:
            largest = x.abs().max()
            self.amax[name] = torch.maximum(self.amax.get(name, largest), largest)
            return x
        return (
            x if form.input is None else fake_quantize(x.contiguous(), form.input, self.amax[name])
        )

    def _hooked(self, change: Any) -> Any:
        handles = [
            module.register_forward_hook(
                lambda module, args, output, name=name: change(name, args, output)
            )
            for name, module in self.modules.items()
        ]
        return _Handles(handles)


class _Handles:
    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
