"""Whole models under mixed formats, measured on captions. Needs torch and modelopt."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from qsens.config import PairConfig
from qsens.engine.experts import FIRST, SECOND, is_experts
from qsens.engine.groups import Group
from qsens.engine.quantizer import on_cpu
from qsens.engine.samples import Batch, Samples, equal_length_batches

MODELOPT = "ModelOpt"
_BATCH = 16
# ModelOpt's solver takes scores near 1e-5 for 0.
_LOSS_SCALE = 1e4


@dataclass(frozen=True)
class Measured:
    """What one way to quantize does.

    Attributes:
        name: What chose the formats.
        bits: Bits a weight over what may be quantized; what stays unquantized counts 16.
        loss: Increase of the loss, nats a token.
        divergence: KL divergence from the unquantized model, nats a token.
        predicted: The recipe's own prediction; none where there is none in nats.
        by_caption: Increase of the loss summed over each caption, nats.
        labels: Labels of each caption.
    """

    name: str
    bits: float
    loss: float
    divergence: float
    predicted: float | None
    by_caption: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]

    def against(self, other: Measured) -> tuple[float, float]:
        """Return how much more loss a token this has than ``other``, with its standard error.

        Both ran on the same captions: what all captions have in common drops out.
        """
        difference = self.by_caption - other.by_caption
        mean = float(difference.sum() / self.labels.sum())
        rest = difference - mean * self.labels
        return mean, float(np.sqrt(len(rest) * rest.var(ddof=1)) / self.labels.sum())

    def numbers(self) -> dict[str, Any]:
        """Return it as JSON can hold it, without the captions."""
        numbers = {"name": self.name, "bits": self.bits, "loss": self.loss}
        return numbers | {"divergence": self.divergence, "predicted": self.predicted}


@dataclass(frozen=True)
class Trial:
    """A model that copies are quantized of, as a whole, and measured.

    Attributes:
        model: The unquantized model.
        groups: Its groups; those covered count for the bits.
        excluded: Module name patterns outside the coverage: no bits count them.
        kept: Module name patterns that stay at 16 bits and count.
        calibration: Samples to calibrate on.
        held_out: Samples to measure on.
    """

    model: nn.Module
    groups: Sequence[Group]
    excluded: Sequence[str]
    kept: Sequence[str]
    calibration: Samples
    held_out: Samples

    def uniform(self, pair: PairConfig) -> dict[str, Any]:
        """Return the configuration of one pair everywhere but in what stays at 16 bits."""
        off = [
            {"quantizer_name": suffixed, "enable": False}
            for pattern in (*self.excluded, *self.kept)
            for suffixed in (pattern, f"{pattern}.*")
        ]
        return {**pair.modelopt(), "quant_cfg": [*pair.quant_cfg(), *off]}

    def measure(
        self, name: str, config: Mapping[str, Any], predicted: float | None = None
    ) -> Measured:
        """Quantize a copy by ``config``, as ``mtq.quantize`` takes it, and measure it."""
        model = copy.deepcopy(self.model)
        with _quiet():
            mtq.quantize(model, self._of_device(config), self._calibrate)
        return self._judge(name, model, predicted)

    def auto_quantize(self, pairs: Sequence[PairConfig], bits: float) -> Measured:
        """Let ModelOpt choose from ``pairs`` at ``bits``, its loss scaled for its solver."""
        model = copy.deepcopy(self.model)
        batches = self._batches(self.calibration)
        with _quiet(), torch.enable_grad():
            model, _ = mtq.auto_quantize(
                model,
                constraints={
                    "effective_bits": bits,
                    "cost": {"excluded_module_name_patterns": list(self.excluded)},
                },
                quantization_formats=[self._of_device(_stated(pair)) for pair in pairs],
                data_loader=batches,
                forward_step=_logits,
                loss_func=lambda logits, batch: _LOSS_SCALE * _losses(logits, batch).mean(),
                disabled_layers=[*self.excluded, *self.kept],
                num_calib_steps=len(batches),
                num_score_steps=len(batches),
                verbose=False,
            )
        return self._judge(MODELOPT, model, None)

    def _judge(self, name: str, model: nn.Module, predicted: float | None) -> Measured:
        """Measure a quantized model against the unquantized one."""
        lost, labels = [], []
        divergence, tokens = 0.0, 0
        with torch.no_grad():
            for batch in self._batches(self.held_out):
                before, after = _logits(self.model, batch), _logits(model, batch)
                change = _losses(after, batch).double() - _losses(before, batch).double()
                lost += change.sum(dim=1).tolist()
                labels += [change.shape[1]] * len(change)
                # One sample at a time: a large vocabulary in double is much.
                for one, other in zip(before, after, strict=True):
                    p, q = (logits.double().log_softmax(dim=-1) for logits in (one, other))
                    divergence += float((p.exp() * (p - q)).sum())
                tokens += batch.input_ids.numel()
        covered = [group for group in self.groups if group.covered]
        bits, mean = effective_bits(model, covered), sum(lost) / sum(labels)
        found = (np.array(lost), np.array(labels))
        return Measured(name, bits, mean, divergence / tokens, predicted, *found)

    def _calibrate(self, model: nn.Module) -> None:
        with torch.no_grad():
            for batch in self._batches(self.calibration):
                _logits(model, batch)

    def _batches(self, samples: Samples) -> list[Batch]:
        device = next(self.model.parameters()).device
        batches = equal_length_batches(samples, boundaries=[len(samples)], batch_size=_BATCH)
        return [batch.to(device) for batch in batches]

    def _of_device(self, config: Mapping[str, Any]) -> dict[str, Any]:
        on_a_cpu = next(self.model.parameters()).device.type == "cpu"
        return on_cpu(config) if on_a_cpu else dict(config)


def effective_bits(model: nn.Module, groups: Sequence[Group]) -> float:
    """Return bits a weight over ``groups``; what has no quantizer on counts 16."""
    used = total = 0.0
    for name in (name for group in groups for name in group.members):
        module: Any = model.get_submodule(name)
        parts = [("weight", "weight_quantizer")]
        if is_experts(module):  # each has quantizers of its own, all alike
            parts = [(part, f"{part}_weight_quantizers") for part in (FIRST, SECOND)]
        for weight, attribute in parts:
            count = getattr(module, weight).numel()
            found = getattr(module, attribute)
            quantizer = found[0] if isinstance(found, nn.ModuleList) else found
            total += count
            used += count * (quantizer._effective_bits if quantizer.is_enabled else 16.0)
    return used / total


def _stated(pair: PairConfig) -> dict[str, Any]:
    """Return a pair as ModelOpt takes it, its bits stated on the inputs as well.

    ModelOpt counts the fewest bits that any quantizer of a format has: FP8 weights with INT4
    activations would count as 4 bits a weight, and its choice would miss the target.
    """
    entries = [
        {**entry, "cfg": {**entry["cfg"], "effective_bits": pair.effective_bits}}
        if "cfg" in entry
        else entry
        for entry in pair.quant_cfg()
    ]
    return {**pair.modelopt(), "quant_cfg": entries}


def _logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return ``(samples, tokens, vocabulary)``; batches hold no padding."""
    logits: torch.Tensor = model(input_ids=batch.input_ids, use_cache=False).logits
    return logits


def _losses(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the cross-entropy of every label, ``(samples, labels)``, in nats."""
    labels = batch.input_ids[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels.flatten(), reduction="none"
    )
    return losses.view(labels.shape)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
