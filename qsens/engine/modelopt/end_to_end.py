"""Whole models under mixed formats, measured on captions. Needs torch and modelopt.

Both models, the one under test and the one it is held to, run in float32 with their weights as they
are stored, see :mod:`qsens.engine.float32`.
"""

from __future__ import annotations

import copy
import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.algorithms import QuantRecipe
from torch import nn

from qsens.checkpoint.experts import is_experts, weight_names
from qsens.checkpoint.groups import Group
from qsens.config import PairConfig
from qsens.data.samples import Batch, Samples
from qsens.engine.cross_entropy import losses_of
from qsens.engine.float32 import in_float32, is_narrow
from qsens.engine.kl.divergence import divergences
from qsens.engine.kl.whole import Compared, Measured, whole_batches
from qsens.engine.modelopt.quantizers import by_numerics, quiet
from qsens.names import group_name

MODELOPT = "ModelOpt"
# ModelOpt's solver takes scores near 1e-5 for 0.
_LOSS_SCALE = 1e4


@dataclass(frozen=True)
class EndToEnd:
    """A model that copies are quantized of, as a whole, and measured.

    Attributes:
        model: The unquantized model.
        groups: Its groups; those covered count for the bits.
        excluded: Module name patterns outside the coverage: no bits count them.
        kept: Module name patterns that stay at 16 bits and count.
        calibration: Samples to calibrate on.
        held_out: Samples to measure on.
        scored: How many of the samples to calibrate on predictions are over: what a prediction
            leaves out shows on them.
    """

    model: nn.Module
    groups: Sequence[Group]
    excluded: Sequence[str]
    kept: Sequence[str]
    calibration: Samples
    held_out: Samples
    scored: int = 0

    def uniform(self, pair: PairConfig) -> dict[str, Any]:
        """Return the configuration of one pair everywhere but in what stays at 16 bits.

        Embeddings do: no score and no bits are of them, and a preset's patterns match them.
        """
        modules = self.model.named_modules()
        tables = [glob.escape(name) for name, each in modules if isinstance(each, nn.Embedding)]
        off = [
            {"quantizer_name": suffixed, "enable": False}
            for pattern in (*self.excluded, *self.kept, *tables)
            for suffixed in (pattern, f"{pattern}.*")
        ]
        return {**pair.modelopt(), "quant_cfg": [*pair.quant_cfg(), *off]}

    def measure(
        self, name: str, config: Mapping[str, Any], predicted: float | None = None
    ) -> Measured:
        """Quantize a copy by ``config``, as ``mtq.quantize`` takes it, and measure it."""
        model = copy.deepcopy(self.model)
        with quiet():
            mtq.quantize(model, by_numerics(config), self._calibrate)
        return self._judge(name, model, predicted)

    def auto_quantize(
        self, pairs: Sequence[PairConfig], bits: float, state: Path | None = None
    ) -> Measured:
        """Let ModelOpt choose from ``pairs`` at ``bits``, its loss scaled for its solver.

        Args:
            pairs: The formats to choose from.
            bits: Bits a weight, at most.
            state: File of ModelOpt's that keeps its scores, which another target then starts from;
                none is kept when not given.
        """
        model = copy.deepcopy(self.model)
        batches = self._batches(self.calibration)
        with quiet(), torch.enable_grad():
            model, search = mtq.auto_quantize(
                model,
                constraints={
                    "effective_bits": bits,
                    "cost": {"excluded_module_name_patterns": list(self.excluded)},
                },
                quantization_formats=[by_numerics(_stated(pair)) for pair in pairs],
                data_loader=batches,
                forward_step=_logits,
                loss_func=lambda logits, batch: (
                    _LOSS_SCALE * losses_of(logits, batch).sum() / sum(batch.lengths("labels"))
                ),
                disabled_layers=[*self.excluded, *self.kept],
                num_calib_steps=len(batches),
                num_score_steps=len(batches),
                verbose=False,
                checkpoint=str(state) if state is not None else None,
            )
        measured = self._judge(MODELOPT, model, None)
        return replace(measured, formats=self._chosen(search["best"]["recipe"], pairs))

    def _chosen(
        self, recipes: Mapping[str, QuantRecipe], pairs: Sequence[PairConfig]
    ) -> dict[str, str]:
        """Return the name of the pair of each module that ModelOpt quantized."""
        configs = {pair.name: by_numerics(_stated(pair)) for pair in pairs}
        names = {QuantRecipe(config, name): name for name, config in configs.items()}
        of_group = {group.name: group.members for group in self.groups}
        return {
            member: names[recipe]
            for key, recipe in recipes.items()
            if recipe in names
            for member in of_group[group_name(key)]
        }

    def floor(self) -> float | None:
        """Return the divergence of the unquantized model from itself in float32, nats a token.

        Measured on the held-out samples; none where it rounds no more than float32 does. A whole
        model whose divergence is near it loses little that rounding does not lose.
        """
        if not is_narrow(next(self.model.parameters()).dtype):
            return None
        nats = 0.0
        with torch.no_grad():
            for batch in self._batches(self.held_out):
                rounded = _logits(self.model, batch)
                with in_float32(self.model):
                    nats += sum(_divergences(_logits(self.model, batch), rounded, batch))
        return nats / self.held_out.predictions()

    def _judge(self, name: str, model: nn.Module, predicted: float | None) -> Measured:
        """Measure a quantized model against the unquantized one."""
        covered = [group for group in self.groups if group.covered]
        bits = effective_bits(model, covered)
        with torch.no_grad():
            _fold(model, covered)
            with in_float32(self.model), in_float32(model):
                return Measured.of(
                    name,
                    bits,
                    predicted,
                    self._compared(model, self.held_out),
                    self._compared(model, self.calibration, self.scored),
                )

    def _compared(
        self, model: nn.Module, samples: Samples, count: int | None = None
    ) -> Iterator[Compared]:
        """Yield batches of the first ``count`` samples with what quantizing does; all if none."""
        for batch in self._batches(samples, count):
            before, after = _logits(self.model, batch), _logits(model, batch)
            lost = (losses_of(after, batch) - losses_of(before, batch)).tolist()
            yield batch, lost, _divergences(before, after, batch)

    def _calibrate(self, model: nn.Module) -> None:
        with torch.no_grad():
            for batch in self._batches(self.calibration):
                _logits(model, batch)

    def _batches(self, samples: Samples, count: int | None = None) -> list[Batch]:
        return whole_batches(samples, next(self.model.parameters()).device, count)


def effective_bits(model: nn.Module, groups: Sequence[Group]) -> float:
    """Return bits a weight over ``groups``; what has no quantizer on counts 16."""
    used = total = 0.0
    for module in _modules(model, groups):
        for weight, quantizer in _weights(module):
            total += weight.numel()
            bits = quantizer._effective_bits if quantizer.is_enabled else 16.0
            used += weight.numel() * bits
    return used / total


def _fold(model: nn.Module, groups: Sequence[Group]) -> None:
    """Quantize the weights once, instead of in every forward pass.

    Each gets a parameter of its own: that of a head may be the embedding's as well.
    """
    for module in _modules(model, groups):
        for weight, quantizer in _weights(module):
            if not quantizer.is_enabled:
                continue
            if is_experts(module):  # a part of the one parameter
                weight.copy_(quantizer(weight))
            else:
                module.weight = nn.Parameter(quantizer(weight), requires_grad=False)
            quantizer.disable()


def _modules(model: nn.Module, groups: Sequence[Group]) -> list[nn.Module]:
    return [model.get_submodule(name) for group in groups for name in group.members]


def _weights(module: Any) -> list[tuple[torch.Tensor, Any]]:
    """Return the weights of a quantized module, each with its quantizer; experts have many."""
    if not is_experts(module):
        return [(module.weight, module.weight_quantizer)]
    return [
        pair
        for part in weight_names(module)
        for pair in zip(
            getattr(module, part), getattr(module, f"{part}_weight_quantizers"), strict=True
        )
    ]


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
    logits: torch.Tensor = model(**batch.inputs(), use_cache=False).logits
    return logits


def _divergences(before: torch.Tensor, after: torch.Tensor, batch: Batch) -> list[float]:
    """Return the KL divergence of two outputs where it counts, summed over each sample, in nats."""
    # One sample at a time: a large vocabulary in double is much.
    return [
        float(divergences(one[counts].float(), other[counts].float()).sum())
        for one, other, counts in zip(before, after, batch.predicts(), strict=True)
    ]
