"""ModelOpt's ``block_sizes``, taken apart: which dimensions share a scale, and in what type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# (exponent, mantissa) bits of NVFP4's block scales: one more scale lies over them.
E4M3 = (4, 3)


@dataclass(frozen=True)
class BlockSizes:
    """The sizes and the options of a quantizer's ``block_sizes``.

    Attributes:
        sizes: Values per block by dimension; none is the whole dimension.
        dynamic: Block scales come from the tensor itself.
        scale_bits: (exponent, mantissa) bits of block scales of their own type; none where they
            have none.
        unknown: Options that qsens does not know, those that are empty left out.
    """

    sizes: Mapping[int, int | None] = field(default_factory=dict)
    dynamic: bool = False
    scale_bits: Any = None
    unknown: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping[Any, Any] | None) -> BlockSizes:
        """Take a mapping apart, whose dimensions may be spelled as text.

        Args:
            given: ``{-1: 16, "type": "dynamic", "scale_bits": (4, 3)}``, say; none is no blocks.
        """
        sizes: dict[int, int | None] = {}
        options: dict[str, Any] = {}
        for key, value in (given or {}).items():
            if _is_dimension(key):
                sizes[int(key)] = value
            else:
                options[key] = value
        scale_bits = options.pop("scale_bits", None)
        return cls(
            sizes,
            options.pop("type", "static") == "dynamic",
            tuple(scale_bits) if isinstance(scale_bits, list) else scale_bits,
            {key: value for key, value in options.items() if value},
        )


def with_dimensions(given: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return ``given`` with its dimensions spelled as numbers, as ModelOpt takes them."""
    return {int(key) if _is_dimension(key) else key: value for key, value in given.items()}


def needs_calibration(cfg: Mapping[str, Any]) -> bool:
    """Return whether a maximum comes from calibration rather than from the tensor in hand.

    Not with ``type: dynamic`` (a scale for each token, say), nor in the MX family. It does in
    NVFP4: its block scales are dynamic, but the scale over them is calibrated.

    Args:
        cfg: A ModelOpt quantizer's ``cfg``; keys that are not there have ModelOpt's defaults.
    """
    if cfg.get("type") == "dynamic":
        return False
    blocks = BlockSizes.of(cfg.get("block_sizes"))
    return not blocks.dynamic or blocks.scale_bits == E4M3


def _is_dimension(key: Any) -> bool:
    return str(key).lstrip("-").isdigit()
