"""A recipe as llm-compressor takes it, with schemes as compressed-tensors defines them."""

from __future__ import annotations

import re
from typing import Any

import yaml

from qsens.config import PairConfig
from qsens.config.pairs import QuantizerConfig
from qsens.errors import UserError
from qsens.recipes.formats.evidence import experts_of, header, members_of
from qsens.schema.recipe import Recipe

_E2M1, _E4M3, _E8M0 = (2, 1), (4, 3), (8, 0)
# The observer that keeps the maximum over all samples, as calibration here does.
_OBSERVER = "static_minmax"


def config(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe: one stage with one ``QuantizationModifier``.

    Raises:
        UserError: compressed-tensors cannot express a pair; it is named.
    """
    groups = {}
    for index, (name, pair) in enumerate(recipe.formats.items()):
        groups[f"group_{index}"] = {"targets": _targets(recipe, name), **scheme(pair)}
    modifier = {"config_groups": groups, "ignore": [*_targets(recipe, None), *recipe.outside]}
    return {"quantization_stage": {"quantization_modifiers": {"QuantizationModifier": modifier}}}


def dump(recipe: Recipe) -> str:
    """Return the recipe as YAML, for ``llmcompressor.oneshot(recipe=FILE)``.

    Raises:
        UserError: compressed-tensors cannot express a pair; it is named.
    """
    return header(recipe, "llm-compressor") + yaml.safe_dump(
        config(recipe), sort_keys=False, width=200
    )


def scheme(pair: PairConfig) -> dict[str, Any]:
    """Return ``weights`` and ``input_activations`` of a compressed-tensors scheme.

    Raises:
        UserError: compressed-tensors cannot express the pair; it is named.
    """
    reason = refusal(pair)
    if reason is not None:
        raise UserError(
            f"llm-compressor cannot express it: {reason}",
            where=f"quant_pair {pair.name} ({pair.format})",
            remedy="Leave the pair out, or export with --to modelopt.",
        )
    written = {"weights": _weights(pair.weight_quantizer)}
    if pair.input_quantizer is not None:
        written["input_activations"] = _inputs(pair.input_quantizer)
    return written


def refusal(pair: PairConfig) -> str | None:
    """Return why compressed-tensors cannot express ``pair``; none where it can."""
    for what, quantizer, convert in (
        ("weights", pair.weight_quantizer, _weights),
        ("activations", pair.input_quantizer, _inputs),
    ):
        if quantizer is None:
            continue
        try:
            convert(quantizer)
        except ValueError as error:
            return f"its {what} are {error}"
    return None


def unfit(pair: PairConfig, shape: tuple[int, ...]) -> str | None:
    """Return why compressed-tensors cannot quantize a weight in ``pair``; none where it can.

    Its groups must divide the columns, of weights and of inputs; NVFP4's and MX blocks are such
    groups, and blocks of rows and columns must divide the columns alone.

    Args:
        pair: The pair.
        shape: The weight's, ``(out, in)``.
    """
    for quantizer in (pair.weight_quantizer, pair.input_quantizer):
        size = quantizer.sizes().get(-1) if quantizer is not None else None
        if size and shape[-1] % size:
            return f"{shape[-1]} columns do not divide into blocks of {size}"
    return None


def _targets(recipe: Recipe, name: str | None) -> list[str]:
    """Return names of modules of a format; experts by a pattern, since they become modules there.

    llm-compressor takes a layer of experts apart into three linear modules for each of them.
    """
    experts = experts_of(recipe)
    return [
        rf"re:^{re.escape(member)}\.\d+\.(gate|up|down)_proj$" if member in experts else member
        for member in members_of(recipe, name)
    ]


def _weights(quantizer: QuantizerConfig) -> dict[str, Any]:
    if quantizer.has_block_format():
        return _blocks_of_a_format(quantizer) | {"dynamic": False}
    number = _number(quantizer)
    sizes = quantizer.sizes()
    strategy: dict[str, Any]
    if not sizes:
        if quantizer.axis not in (None, 0, (0,)):
            raise ValueError(f"scaled along axis {quantizer.axis}, not by output channel")
        strategy = {"strategy": "tensor" if quantizer.axis is None else "channel"}
    elif sizes.keys() == {-1}:
        size = sizes[-1]
        strategy = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    elif sizes.keys() == {-1, -2} and sizes[-1] and sizes[-2]:
        strategy = {"strategy": "block", "block_structure": [sizes[-2], sizes[-1]]}
    else:
        raise ValueError(f"in blocks along axes {', '.join(map(str, sizes))}")
    return {**number, "symmetric": quantizer.symmetric, "dynamic": False, **strategy}


def _inputs(quantizer: QuantizerConfig) -> dict[str, Any]:
    if quantizer.has_block_format():
        written = _blocks_of_a_format(quantizer)
        if quantizer.block_type() == _E8M0:
            return written | {"dynamic": True}
        # The scale over the block scales is calibrated, the block scales are not.
        return written | {"dynamic": "local", "observer": _OBSERVER}
    written = {**_number(quantizer), "symmetric": True}
    sizes = quantizer.sizes()
    if quantizer.type == "static":
        if sizes or quantizer.axis is not None:
            raise ValueError("calibrated with more than one scale for the whole tensor")
        return written | {"dynamic": False, "strategy": "tensor", "observer": _OBSERVER}
    written["dynamic"] = True
    if quantizer.is_whole_tensor():
        return written | {"strategy": "tensor"}
    if sizes.keys() != {-1}:
        raise ValueError("scaled along another axis than the last")
    size = sizes[-1]
    return written | ({"strategy": "group", "group_size": size} if size else {"strategy": "token"})


def _number(quantizer: QuantizerConfig) -> dict[str, Any]:
    bits = quantizer.num_bits
    if isinstance(bits, int):
        if not 2 <= bits <= 8:
            raise ValueError(f"integers of {bits} bits")
        return {"num_bits": bits, "type": "int"}
    if bits != _E4M3:
        raise ValueError(f"floats of format E{bits[0]}M{bits[1]} without scales of a format")
    return {"num_bits": 8, "type": "float"}


def _blocks_of_a_format(quantizer: QuantizerConfig) -> dict[str, Any]:
    """Return what MX and NVFP4 are there: blocks of 32 under a power of two, of 16 under E4M3."""
    scale, sizes = quantizer.block_type(), quantizer.sizes()
    bits = quantizer.num_bits
    known = {_E2M1: 4, (2, 3): 6, _E4M3: 8}
    written: dict[str, Any] = {"type": "float", "symmetric": True}
    if scale == _E8M0 and sizes == {-1: 32} and not isinstance(bits, int) and bits in known:
        return written | {
            "num_bits": known[bits],
            "strategy": "group",
            "group_size": 32,
            "scale_dtype": "torch.uint8",
            "zp_dtype": "torch.uint8",
        }
    if scale == _E4M3 and sizes == {-1: 16} and bits == _E2M1:
        return written | {
            "num_bits": 4,
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
            "zp_dtype": "torch.float8_e4m3fn",
        }
    number = f"INT{bits}" if isinstance(bits, int) else f"E{bits[0]}M{bits[1]}"
    blocks = "x".join(str(size) for size in sizes.values())
    raise ValueError(f"{number} in blocks of {blocks} under scales of {scale}")
