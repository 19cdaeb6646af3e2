"""Precision pairs, and the granularities that are laid over them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from qsens.config.base import Frozen, Name
from qsens.config.block_sizes import BlockSizes, needs_calibration, with_dimensions
from qsens.errors import UserError

DEFAULT_GRANULARITY = "default"
MODELOPT, COMPRESSED_TENSORS = "modelopt", "compressed-tensors"
Reference = Literal["modelopt", "compressed-tensors"]
# Bits of the scale of a static block.
SCALE_BITS = 16


class ScalesConfig(Frozen):
    """Which values of a tensor share a scale, and where a scale's maximum comes from."""

    axis: int | tuple[int, ...] | None = None
    """Axes that keep their own maximum; none means one maximum for the whole tensor."""
    block_sizes: dict[str, int | str | tuple[int, int] | None] | None = None
    """ModelOpt's block sizes, keyed by axis, with ``type`` and ``scale_bits``; a size of none is
    the whole axis."""
    type: Literal["static", "dynamic"] = "static"
    """Whether the maximum comes from calibration or from the tensor itself."""
    symmetric: bool = True
    """Whether 0 is the middle of the range; else a zero point is stored with every scale, which
    only integer weights by compressed-tensors have."""

    @model_validator(mode="after")
    def _axis_or_blocks(self) -> Self:
        if self.axis is not None and self.block_sizes is not None:
            raise ValueError("axis together with block_sizes; a quantizer has one of them")
        for axis, size in self.sizes().items():
            if size is not None and not (isinstance(size, int) and size > 0):
                raise ValueError(
                    f"block size {size!r} of axis {axis}; give a whole number above 0, or null for "
                    "the whole axis"
                )
        return self

    def needs_calibration(self) -> bool:
        """Return whether a maximum comes from calibration rather than from the tensor."""
        return needs_calibration({"type": self.type, "block_sizes": self.block_sizes})

    def has_block_format(self) -> bool:
        """Return whether block scales of their own type are part of the format: MX, NVFP4."""
        return self.block_type() is not None

    def is_whole_tensor(self) -> bool:
        """Return whether one scale serves the whole tensor."""
        return self.axis is None and self.block_sizes is None

    def same_as(self, other: ScalesConfig) -> bool:
        """Return whether both say the same, however it is spelled."""
        return self._spelled() == other._spelled()

    def block_type(self) -> Any:
        """Return (exponent, mantissa) bits of block scales of their own type; none without."""
        return BlockSizes.of(self.block_sizes).scale_bits

    def sizes(self) -> Mapping[int, int | None]:
        """Return the size of blocks by axis; a size of none is the whole axis."""
        return BlockSizes.of(self.block_sizes).sizes

    def axes(self) -> tuple[int, ...]:
        """Return the axes that keep their own maximum."""
        return (self.axis,) if isinstance(self.axis, int) else self.axis or ()

    def _spelled(self) -> tuple[Any, ...]:
        axis = None if self.axis is None else self.axes()
        return axis, BlockSizes.of(self.block_sizes), self.type, self.symmetric


class QuantizerConfig(ScalesConfig):
    """How one tensor is fake-quantized: a ModelOpt quantizer's ``cfg``, and whose arithmetic."""

    num_bits: int | tuple[int, int]
    """Bits of an integer format, or (exponent, mantissa) bits of a float format."""

    reference: Reference = "modelopt"
    """Whose scales and codes these are, bit for bit: ``modelopt``, INT4 in steps of amax / 7, or
    ``compressed-tensors``, which servers load, of amax / 7.5."""

    @model_validator(mode="after")
    def _its_reference_has_zero_points(self) -> Self:
        integer = isinstance(self.num_bits, int)
        if not self.symmetric and not (self.by_compressed_tensors and integer):
            raise ValueError(
                "symmetric: false is for integers of reference compressed-tensors alone"
            )
        return self

    @property
    def by_compressed_tensors(self) -> bool:
        """Whether the reference is compressed-tensors."""
        return self.reference == COMPRESSED_TENSORS

    def cfg(self) -> dict[str, Any]:
        """Return the mapping that :mod:`qsens.numerics` takes: axes of blocks are ints again.

        Under ModelOpt as the reference it is what ModelOpt takes.
        """
        cfg: dict[str, Any] = {"num_bits": self.num_bits}
        if self.block_sizes is None:
            cfg["axis"] = self.axis
        else:
            cfg["block_sizes"] = with_dimensions(self.block_sizes)
        if self.type == "dynamic":
            cfg["type"] = "dynamic"
        if self.by_compressed_tensors:
            cfg["reference"] = self.reference
        if not self.symmetric:
            cfg["symmetric"] = False
        return cfg

    def with_scales(self, scales: ScalesConfig) -> QuantizerConfig:
        """Return this number format with other scales."""
        changed = {name: getattr(scales, name) for name in ScalesConfig.model_fields}
        return self.model_copy(update=changed)

    def block_bits(self) -> float:
        """Return the bits that block scales add to a value: 16 bits a block, and a zero point.

        Scales of a tensor or of a channel count nothing: a channel has thousands of values.
        """
        sizes = [size for size in self.sizes().values() if size is not None]
        zero_point = 0 if self.symmetric else self.bits()
        return (SCALE_BITS + zero_point) / math.prod(sizes) if sizes else 0.0

    def is_coarse(self) -> bool:
        """Return whether 4-bit integers, or smaller ones, share one scale for the whole tensor."""
        return self.is_whole_tensor() and isinstance(self.num_bits, int) and self.num_bits <= 4

    def bits(self) -> int:
        """Return the bits of one value; a float has a sign beside its fields."""
        return self.num_bits if isinstance(self.num_bits, int) else 1 + sum(self.num_bits)


class GranularityConfig(Frozen):
    """Scales laid over a pair's quantizers; files under ``configs/quant_granularity/``."""

    name: Name = DEFAULT_GRANULARITY
    """Name of the granularity; equal to the file's name."""
    weight_quantizer: ScalesConfig | None = None
    """Scales of weights, in place of the pair's; none leaves them alone."""
    input_quantizer: ScalesConfig | None = None
    """Scales of inputs, in place of the pair's; none leaves them alone."""
    reference: Reference | None = None
    """Whose scales and codes the pair's numbers get; none leaves that of the pair."""

    @model_validator(mode="after")
    def _only_default_changes_nothing(self) -> Self:
        parts = (self.weight_quantizer, self.input_quantizer, self.reference)
        empty = all(part is None for part in parts)
        if empty != (self.name == DEFAULT_GRANULARITY):
            raise ValueError(
                f"'{DEFAULT_GRANULARITY}', and it alone, leaves a pair's quantizers as they are"
            )
        for scales in (self.weight_quantizer, self.input_quantizer):
            if scales is not None and scales.has_block_format():
                raise ValueError("scale_bits make another number format: write a pair for it")
        _refuse_calibrated_parts(self.input_quantizer)
        return self


class PairConfig(Frozen):
    """A weight format with an activation format; files under ``configs/quant_pair/``."""

    name: Name
    """Name of the pair, ``w<weight>_a<activation>``; equal to the file's name."""
    weight: Name
    """Weight format, as directories show it."""
    activation: Name
    """Activation format, as directories show it; ``fp16`` stands for not quantized."""
    format: str
    """Name of the format in manifests: ModelOpt's preset where it is one."""
    weight_quantizer: QuantizerConfig
    """How weights are fake-quantized."""
    input_quantizer: QuantizerConfig | None = None
    """How inputs are fake-quantized; none leaves them alone."""
    algorithm: Literal["max"] | None = "max"
    """ModelOpt's calibration algorithm; none where nothing needs calibration."""
    effective_bits: float = Field(gt=0, le=16)
    """Bits a weight costs, block scales included."""
    experimental: bool = False
    """Set for pairs that nobody is known to deploy; reports say so."""
    scheme: str = "{pair}_autoquant_lm"
    """Name of the scheme; ``{pair}``, ``{model}``, ``{short_name}`` are filled in."""
    run_dir: str = "{model}_autoquant_{pair}_lm_{size}"
    """Name of the run directory; as ``scheme``, with ``{size}``."""
    all_layers_scheme: str = "{pair}_autoquant_all_layers"
    """``scheme`` of ``coverage: all_layers``."""
    all_layers_run_dir: str = "{model}_autoquant_{pair}_all_layers_{size}"
    """``run_dir`` of ``coverage: all_layers``."""

    @model_validator(mode="after")
    def _inputs_can_be_calibrated(self) -> Self:
        _refuse_calibrated_parts(self.input_quantizer)
        return self

    def weight_cfg(self) -> dict[str, Any]:
        """Return the weight quantizer's mapping as ModelOpt takes it, the effective bits stated."""
        return {**self.weight_quantizer.cfg(), "effective_bits": self.effective_bits}

    @property
    def by_modelopt(self) -> bool:
        """Whether ModelOpt computes it: its reference is ModelOpt, in weights and inputs."""
        quantizers = (self.weight_quantizer, self.input_quantizer)
        return not any(each is not None and each.by_compressed_tensors for each in quantizers)

    def quant_cfg(self) -> list[dict[str, Any]]:
        """Return ModelOpt's ``quant_cfg`` list for this pair, the effective bits stated."""
        entries: list[dict[str, Any]] = [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": self.weight_cfg()},
        ]
        if self.input_quantizer is not None:
            cfg = self.input_quantizer.cfg()
            entries.append({"quantizer_name": "*input_quantizer", "cfg": cfg})
        return entries

    def modelopt(self) -> dict[str, Any]:
        """Return the ModelOpt configuration in full, as ``mtq.auto_quantize`` takes it."""
        return {"quant_cfg": self.quant_cfg(), "algorithm": self.algorithm}

    def refusal(self, granularity: GranularityConfig) -> str | None:
        """Return why ``granularity`` makes no sense for this pair; none where it does.

        It makes none where the blocks are part of the format (MX, NVFP4), where there is nothing
        to quantize, and where it is what the pair has already.
        """
        parts = (
            ("weights", self.weight_quantizer, granularity.weight_quantizer),
            ("activations", self.input_quantizer, granularity.input_quantizer),
        )
        reference = granularity.reference
        changes = reference not in (None, self.weight_quantizer.reference)
        named = []
        for what, own, scales in parts:
            if scales is None:
                continue
            if own is None:
                return f"its {what} are not quantized"
            if own.has_block_format():
                return f"the blocks of its {what} are part of the format"
            if not scales.symmetric and not isinstance(own.num_bits, int):
                return f"its {what} are no integers, which alone have a zero point"
            named.append(what)
            changes |= not own.same_as(scales)
        if changes or not (named or reference):
            return None
        if not named:
            return f"it is of {reference} already: it would repeat '{DEFAULT_GRANULARITY}'"
        return f"its {' and '.join(named)} have it already: it would repeat '{DEFAULT_GRANULARITY}'"

    def with_granularity(self, granularity: GranularityConfig) -> PairConfig:
        """Return this pair with the scales of ``granularity``, under the same name.

        Where weights get other scales, their ``effective_bits`` are the bits of a value and, for
        static blocks, a scale of 16 bits a block: ``4 + 16 / 64 = 4.25`` for INT4 in blocks of 64;
        a zero point has as many bits as a value.
        Scales of a tensor or of a channel count nothing. ``format`` tells the granularity:
        ``FP8_DEFAULT_CFG+w_channel``. What has 4-bit integers under one scale for the whole tensor
        becomes experimental.

        Raises:
            UserError: The granularity makes no sense for this pair; see `refusal`.
        """
        reason = self.refusal(granularity)
        if reason is not None:
            raise UserError(
                f"{granularity.name} makes no sense for it: {reason}",
                where=f"quant_pair {self.name}",
                remedy=f"Leave {granularity.name} out for this pair.",
            )
        if granularity.name == DEFAULT_GRANULARITY:
            return self
        weight, inputs = self.weight_quantizer, self.input_quantizer
        bits = self.effective_bits
        if granularity.weight_quantizer is not None:
            weight = weight.with_scales(granularity.weight_quantizer)
            bits = weight.bits() + weight.block_bits()
        if granularity.input_quantizer is not None and inputs is not None:
            inputs = inputs.with_scales(granularity.input_quantizer)
        if granularity.reference is not None:
            weight = weight.model_copy(update={"reference": granularity.reference})
            # Kernels of servers scale integers of activations by amax / 127, as ModelOpt does:
            # half of the range, 127.5, would clip the largest value, an outlier as a rule.
            if inputs is not None and not isinstance(inputs.num_bits, int):
                inputs = inputs.model_copy(update={"reference": granularity.reference})
        quantizers = [quantizer for quantizer in (weight, inputs) if quantizer is not None]
        calibrated = any(quantizer.needs_calibration() for quantizer in quantizers)
        return self.model_copy(
            update={
                "format": f"{self.format}+{granularity.name}",
                "weight_quantizer": weight,
                "input_quantizer": inputs,
                "algorithm": "max" if calibrated else self.algorithm,
                "effective_bits": bits,
                "experimental": self.experimental
                or any(quantizer.is_coarse() for quantizer in quantizers),
            }
        )


def _refuse_calibrated_parts(scales: ScalesConfig | None) -> None:
    """Refuse inputs whose parts are calibrated: one maximum a module is what calibration keeps."""
    if scales is None or scales.has_block_format() or scales.is_whole_tensor():
        return
    if scales.needs_calibration():
        raise ValueError(
            "calibrated inputs have one scale for the whole tensor; a scale for each of its parts "
            "needs type: dynamic"
        )
