"""Whole models under mixed formats, where no second copy of the model has room. Needs torch.

Modules are quantized as they run, weights as well: the model stays what it is, and its layers may
be streamed, see :mod:`qsens.engine.layer_stream`. Like :mod:`qsens.engine.modelopt.end_to_end`,
which lets ModelOpt quantize a copy, it measures in float32 with the weights as they are stored.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from qsens.checkpoint.experts import expert_weights, input_names, is_experts, outputs
from qsens.checkpoint.groups import Group
from qsens.checkpoint.modules import apply, weight_of
from qsens.config import PairConfig
from qsens.data.samples import Batch, Samples, equal_length_batches
from qsens.engine.amax import Amax, calibrate, moved
from qsens.engine.cross_entropy import negative_log_likelihood, next_tokens
from qsens.engine.float32 import in_float32, is_narrow
from qsens.engine.fused_weights import FusedWeights
from qsens.engine.head import HEAD_ROWS, Head, head_input, without_head
from qsens.engine.kl.divergence import divergences
from qsens.engine.layer_stream import IN_TURNS, device_of, run_in_turns, stream_of
from qsens.engine.quantizer import quantize, quantize_experts, quantize_weight

_BATCH = 16
# Quantized weights that are held: those of a layer, while batches go through it in turns.
_HELD = 16


Compared: TypeAlias = tuple[Batch, list[float], list[float]]
"""A batch with what formats do to each sample: to its loss, and to its distributions, in nats."""


@dataclass(frozen=True)
class Measured:
    """What one way to quantize does.

    Attributes:
        name: What chose the formats.
        bits: Bits a weight over what may be quantized; what stays unquantized counts 16.
        loss: Increase of the loss, nats a token.
        divergence: KL divergence from the unquantized model, nats a token.
        scored: The same on the samples that predictions are over; none where that is not known.
        predicted: The recipe's own prediction; none where there is none in nats.
        by_caption: Increase of the loss summed over each caption, nats.
        labels: Labels of each caption.
        nats: KL divergence summed over each caption, nats; none where it is not known.
        predictions: Positions of each caption whose distribution counts; likewise.
        formats: Name of the format of each quantized module, where ModelOpt chose it.
    """

    name: str
    bits: float
    loss: float
    divergence: float
    scored: float | None
    predicted: float | None
    by_caption: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    nats: np.ndarray[Any, Any] | None = None
    predictions: np.ndarray[Any, Any] | None = None
    formats: Mapping[str, str] | None = None

    @classmethod
    def of(
        cls,
        name: str,
        bits: float,
        predicted: float | None,
        held_out: Iterable[Compared],
        scored: Iterable[Compared],
    ) -> Measured:
        """Return what comparisons of batches come to.

        Args:
            name: What chose the formats.
            bits: Bits a weight.
            predicted: The recipe's own prediction, nats a token.
            held_out: Batches of the samples that are measured on.
            scored: Those of the samples that predictions are over; empty where that is not known.
        """
        lost, labels, nats, predictions = [], [], [], []
        for batch, of_loss, of_divergence in held_out:
            lost += of_loss
            labels += batch.lengths("labels")
            nats += of_divergence
            predictions += batch.lengths("predictions")
        of_scored, positions = 0.0, 0
        for batch, _, of_divergence in scored:
            of_scored += sum(of_divergence)
            positions += sum(batch.lengths("predictions"))
        return cls(
            name=name,
            bits=bits,
            loss=sum(lost) / sum(labels),
            divergence=sum(nats) / sum(predictions),
            scored=of_scored / positions if positions else None,
            predicted=predicted,
            by_caption=np.array(lost),
            labels=np.array(labels),
            nats=np.array(nats),
            predictions=np.array(predictions),
        )

    def against(self, other: Measured) -> tuple[float, float]:
        """Return how much more loss a token this has than ``other``, with its standard error.

        Both ran on the same captions: what all captions have in common drops out.
        """
        return per_token(self.by_caption - other.by_caption, self.labels)

    def divergence_against(self, other: Measured) -> tuple[float, float]:
        """Return how much more KL divergence a token this has than ``other``, likewise."""
        assert self.nats is not None
        assert other.nats is not None
        assert self.predictions is not None
        return per_token(self.nats - other.nats, self.predictions)

    def numbers(self) -> dict[str, Any]:
        """Return it as JSON can hold it, without the captions."""
        numbers = {"name": self.name, "bits": self.bits, "loss": self.loss}
        divergences = {"divergence": self.divergence, "scored": self.scored}
        return numbers | divergences | {"predicted": self.predicted}


def per_token(sums: np.ndarray[Any, Any], tokens: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return what sums over samples come to a token, with its standard error.

    Args:
        sums: Of each sample, ``(samples,)``.
        tokens: Tokens of each sample, same shape.
    """
    mean = float(sums.sum() / tokens.sum())
    if len(sums) < 2:
        return mean, float("nan")
    rest = sums - mean * tokens
    return mean, float(np.sqrt(len(rest) * rest.var(ddof=1)) / tokens.sum())


def whole_batches(samples: Samples, device: torch.device, count: int | None = None) -> list[Batch]:
    """Return batches without padding of the first ``count`` samples; of all when not given."""
    count = len(samples) if count is None else count
    bounds = [count, len(samples)]
    batches = equal_length_batches(samples, boundaries=bounds, batch_size=_BATCH)
    return [batch.to(device) for batch in batches if batch.first < count]


@dataclass(frozen=True)
class WholeModel:
    """A model that is measured under formats, module by module.

    Attributes:
        model: The model, on its device or streamed to it.
        groups: Its groups; those covered count for the bits.
        calibration: Samples to calibrate on.
        held_out: Samples to measure on.
        scored: How many of the samples to calibrate on predictions are over.
    """

    model: nn.Module
    groups: Sequence[Group]
    calibration: Samples
    held_out: Samples
    scored: int = 0

    def measure(
        self, name: str, formats: Mapping[str, PairConfig], predicted: float | None = None
    ) -> Measured:
        """Measure the model with each module of ``formats`` in its format."""
        quantized = QuantizedModules(self.model, formats, self.amax, self.groups)
        return Measured.of(
            name,
            self._bits(formats),
            predicted,
            self._compared(quantized, self.held_out),
            self._compared(quantized, self.calibration, self.scored),
        )

    def floor(self) -> float | None:
        """Return the divergence of the unquantized model from itself in float32, nats a token.

        Measured on the held-out samples; none where it rounds no more than float32 does.
        """
        if not is_narrow(next(self.model.parameters()).dtype):
            return None
        rounded = QuantizedModules(self.model, {}, {}, self.groups, exact=False)
        compared = self._compared(rounded, self.held_out)
        return sum(sum(nats) for _, _, nats in compared) / self.held_out.predictions()

    @functools.cached_property
    def amax(self) -> Amax:
        """Amax of every module's input over the samples to calibrate on."""
        count = len(self.calibration)
        sizes = calibrate(self.model, self.calibration, self.groups, calibration_sizes=[count])
        return sizes[count]

    def _bits(self, formats: Mapping[str, PairConfig]) -> float:
        """Return bits a weight over the groups covered."""
        used = total = 0.0
        for group in self.groups:
            for name in group.members if group.covered else ():
                module = self.model.get_submodule(name)
                parts = expert_weights(module) if is_experts(module) else (weight_of(module),)
                weights = sum(part.numel() for part in parts)
                total += weights
                used += weights * (formats[name].effective_bits if name in formats else 16.0)
        return used / total

    @torch.no_grad()
    def _compared(
        self, quantized: QuantizedModules, samples: Samples, count: int | None = None
    ) -> Iterator[Compared]:
        """Yield batches with what formats do.

        Args:
            quantized: The formats.
            samples: The samples.
            count: How many of them; all when not given.
        """
        batches = whole_batches(samples, device_of(self.model), count)
        together = 1 if stream_of(self.model) is None else IN_TURNS
        head = Head.of(self.model)
        for start in range(0, len(batches), together):
            window = batches[start : start + together]
            with in_float32(self.model), without_head(head.module):
                before = self._hidden(window)
            with quantized.active(), without_head(head.module):
                after = self._hidden(window)
            with in_float32(self.model):
                for batch, *hidden in zip(window, before, after, strict=True):
                    yield batch, *_difference(head, quantized, batch, *hidden)

    def _hidden(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Return what the head reads of each batch."""
        runs = [functools.partial(head_input, self.model, batch) for batch in batches]
        return run_in_turns(self.model, runs)


class QuantizedModules:
    """Modules that quantize what they read and their weights as they run.

    Args:
        model: The model.
        formats: The format of each module.
        amax: Calibrated amax of every module's input.
        groups: Groups of the model, whose members have one format.
        exact: Whether all but the formats is float32.
    """

    def __init__(
        self,
        model: nn.Module,
        formats: Mapping[str, PairConfig],
        amax: Amax,
        groups: Sequence[Group],
        *,
        exact: bool = True,
    ) -> None:
        self._model, self._formats, self._exact = model, formats, exact
        self._amax = moved(amax, device_of(model))
        self._modules = {name: model.get_submodule(name) for name in formats}
        self._fused = FusedWeights(model, groups)
        # Of the modules that ran last: batches go through a layer one after the other.
        self._weights: dict[str, Any] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Quantize all but the head while the context lasts; see :meth:`logits`."""
        head = Head.of(self._model).module
        inner = {name: module for name, module in self._modules.items() if module is not head}
        for name, module in inner.items():
            module.forward = functools.partial(self._run, name)
        try:
            if self._exact:
                with in_float32(self._model):
                    yield
            else:
                yield
        finally:
            for module in inner.values():
                del module.forward
            self._weights.clear()

    def logits(self, head: Head, rows: torch.Tensor) -> torch.Tensor:
        """Return the logits of what the head reads, ``(rows, vocabulary)``, float32."""
        name = next((n for n, module in self._modules.items() if module is head.module), None)
        if name is not None:
            return head(self._input(name, rows.float()), self._weight(name))
        logits = head(rows.float())
        return logits if self._exact else logits.to(rows.dtype).float()

    def _run(self, name: str, x: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        module = self._modules[name]
        if not is_experts(module):
            return apply(module, self._input(name, x), self._weight(name))
        first, second = input_names(name, module)
        chosen, gates = routing
        weights = self._weight(name)
        inner = functools.partial(self._input, second, of=name)
        return outputs(module, self._input(first, x, of=name), chosen, gates, weights, inner)

    def _input(self, name: str, x: torch.Tensor, of: str | None = None) -> torch.Tensor:
        given = self._formats[of or name].input_quantizer
        if given is None:
            return x
        cfg = given.cfg()
        amax = self._amax[name] if given.needs_calibration() else None
        return quantize(x.contiguous(), cfg, amax)

    def _weight(self, name: str) -> Any:
        if name not in self._weights:
            if len(self._weights) >= _HELD:
                self._weights.pop(next(iter(self._weights)))
            module, cfg = self._modules[name], self._formats[name].weight_quantizer.cfg()
            if is_experts(module):
                quantized: Any = tuple(quantize_experts(w, cfg) for w in expert_weights(module))
            else:
                amax = self._fused.amax(name, cfg)
                quantized = quantize_weight(weight_of(module), cfg, amax)
            self._weights[name] = quantized
        return self._weights[name]


def _difference(
    head: Head, quantized: QuantizedModules, batch: Batch, before: torch.Tensor, after: torch.Tensor
) -> tuple[list[float], list[float]]:
    """Return what formats do to each sample: the change of its loss, and the divergence, in nats.

    Args:
        head: The head.
        quantized: The formats.
        batch: The batch.
        before: What the head reads without them, ``(samples, longest, hidden)``.
        after: The same with them.
    """
    labels, counts = next_tokens(batch), batch.predicts()
    lost, nats = [], []
    for sample in range(len(before)):
        where = (counts[sample] | (labels[sample] >= 0)).nonzero()[:, 0]
        of_loss = of_divergence = 0.0
        for rows in torch.split(where, HEAD_ROWS):
            logits = head(before[sample, rows].float())
            changed = quantized.logits(head, after[sample, rows])
            own = labels[sample, rows]
            losses = [
                negative_log_likelihood(each.log_softmax(dim=-1), own) for each in (logits, changed)
            ]
            of_loss += float((losses[1] - losses[0]).sum())
            counted = counts[sample, rows]
            of_divergence += float(divergences(logits, changed)[0][counted].sum())
        lost.append(of_loss)
        nats.append(of_divergence)
    return lost, nats
