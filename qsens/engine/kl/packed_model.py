"""A packed model beside the same one fake-quantized: do they give the same? Needs torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qsens.config import PairConfig
from qsens.data.samples import Batch
from qsens.engine.float32 import in_float32
from qsens.engine.head import Head, head_input, run, without_head
from qsens.engine.kl.divergence import divergences
from qsens.engine.kl.whole import QuantizedModules, WholeModel, whole_batches
from qsens.engine.layer_stream import device_of
from qsens.engine.quantizer import quantize
from qsens.numerics.formats import format_of


@dataclass(frozen=True)
class Agreement:
    """How a packed model compares, over the samples held out.

    Attributes:
        faked: KL divergence of the fake-quantized model from the unquantized one, nats a token.
        packed: The same of the packed model.
        difference: Largest difference of a logit between the two.
        largest: Largest magnitude of a logit of the fake-quantized model.
    """

    faked: float
    packed: float
    difference: float
    largest: float


def quantize_as_served(packed: nn.Module, formats: Mapping[str, PairConfig]) -> None:
    """Let integers of activations be scaled as servers' kernels scale them, by amax / 127.

    compressed-tensors' own code has half of the range there, 127.5, and clips what is largest.

    Args:
        packed: The packed model.
        formats: The format of each module that is packed.
    """
    for name, pair in formats.items():
        inputs = pair.input_quantizer
        if inputs is None or inputs.by_compressed_tensors:
            continue
        module: Any = packed.get_submodule(name)
        scheme = module.quantization_scheme
        module.quantization_scheme = scheme.model_copy(update={"input_activations": None})
        cfg, amax = inputs.cfg(), None
        if inputs.needs_calibration():
            amax = module.input_scale * format_of(cfg).element.largest
        module.register_forward_pre_hook(functools.partial(_quantized, cfg, amax))


def _quantized(
    cfg: Mapping[str, Any], amax: torch.Tensor | None, _: nn.Module, inputs: tuple[torch.Tensor]
) -> tuple[torch.Tensor]:
    return (quantize(inputs[0].contiguous(), cfg, amax),)


@torch.no_grad()
def agree(whole: WholeModel, formats: Mapping[str, PairConfig], packed: nn.Module) -> Agreement:
    """Run a packed model and the fake-quantized one over the samples held out, in float32.

    Args:
        whole: The unquantized model with its samples.
        formats: The format of each module that is packed.
        packed: The packed model, on the same device.
    """
    quantize_as_served(packed, formats)
    model, head = whole.model, Head.of(whole.model)
    quantized = QuantizedModules(model, formats, whole.amax, whole.groups)
    nats = [0.0, 0.0]
    difference = largest = 0.0
    for batch in whole_batches(whole.held_out, device_of(model)):
        with in_float32(model), without_head(head.module):
            before = head_input(model, batch)
        with quantized.active(), without_head(head.module):
            after = head_input(model, batch)
        logits = _logits(packed, batch)
        counts = batch.predicts()
        with in_float32(model):
            for sample in range(len(before)):
                rows = counts[sample].nonzero()[:, 0]
                reference = head(before[sample, rows].float())
                faked = quantized.logits(head, after[sample, rows])
                own = logits[sample, rows].float()
                for index, each in enumerate((faked, own)):
                    nats[index] += float(divergences(reference, each)[0].sum())
                difference = max(difference, float((own - faked).abs().max()))
                largest = max(largest, float(faked.abs().max()))
    tokens = whole.held_out.predictions()
    return Agreement(nats[0] / tokens, nats[1] / tokens, difference, largest)


def _logits(packed: Any, batch: Batch) -> torch.Tensor:
    logits: torch.Tensor = run(packed, batch.inputs()).logits
    return logits
