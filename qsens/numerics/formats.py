"""What a quantizer's ``cfg`` asks for, as a value: `Format`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from qsens.config.block_sizes import BlockSizes, needs_calibration
from qsens.config.pairs import COMPRESSED_TENSORS, MODELOPT
from qsens.errors import UserError
from qsens.numerics.floats import E2M1, E3M2, E4M3, Float
from qsens.numerics.integers import Integer

#: Keys of a cfg that change no number that is computed here.
_NEUTRAL = frozenset(
    {
        "backend",
        "backend_extra_args",
        "effective_bits",
        "enable",
        "pass_through_bwd",
        "trt_high_precision_dtype",
    }
)
#: Keys that would change numbers, with the one value under which they do not.
_FIXED: dict[str, object] = {
    "bias": None,
    "calibrator": "max",
    "constant_amax": None,
    "fake_quant": True,
    "learn_amax": False,
    "rotate": False,
    "unsigned": False,
    "use_constant_amax": False,
}
_READ = frozenset(
    {"axis", "block_sizes", "narrow_range", "num_bits", "reference", "symmetric", "type"}
)

_FLOATS = {(2, 1): E2M1, (3, 2): E3M2, (4, 3): E4M3}
_MX_SIZES = (8, 16, 32)


#: Formats read so far, by the text of their cfg: one is asked for thousands of times in a pass.
_READ_BEFORE: dict[str, Format] = {}


class Sharing(Enum):
    """Which values share a scale, and what scales are made of."""

    DIMS = "one scale per index of the kept dimensions"
    BLOCKS = "one scale per block of the last dimension, or of the last two"
    MX = "one power-of-two scale per block of the last dimension"
    NVFP4 = "one E4M3 scale per block of the last dimension, under one scale of the tensor"


@dataclass(frozen=True)
class Format:
    """A number format with the rule by which values share scales.

    Attributes:
        element: The grid that scaled values are rounded to.
        sharing: Which values share a scale.
        dynamic: The amax come from the very tensor that is quantized, never from calibration.
        kept: Under `Sharing.DIMS`, the dimensions that keep their index; all others share. None
            when ``shared`` says it the other way round.
        shared: Under `Sharing.DIMS`, the dimensions that share; all others keep their index.
        size: Values per block along the last dimension.
        rows: Rows per block; more than 1 for blocks of a matrix.
        by_compressed_tensors: Whether scales and codes are those of compressed-tensors; ModelOpt's
            otherwise.
        symmetric: Whether 0 is the middle of the range; only compressed-tensors has another.
    """

    element: Float | Integer
    sharing: Sharing
    dynamic: bool = False
    kept: tuple[int, ...] | None = None
    shared: tuple[int, ...] = ()
    size: int = 0
    rows: int = 1
    by_compressed_tensors: bool = False
    symmetric: bool = True

    @classmethod
    def from_cfg(cls, cfg: Mapping[str, Any]) -> Format:
        """Read a quantizer's ``cfg``.

        Args:
            cfg: Keys as in ModelOpt's ``QuantizerAttributeConfig``, with its defaults;
                ``reference`` and ``symmetric`` as in `qsens.config.pairs.QuantizerConfig`. Lists
                may stand for tuples, and the integer keys of ``block_sizes`` may be strings.

        Raises:
            UserError: The config is not one that is computed here.
        """
        for key, value in cfg.items():
            if key in _NEUTRAL or key in _READ:
                continue
            if key not in _FIXED or value != _FIXED[key]:
                raise _unsupported(cfg, f"{key}: {value!r}")

        theirs = cfg.get("reference", MODELOPT) == COMPRESSED_TENSORS
        symmetric = bool(cfg.get("symmetric", True))
        num_bits = _as_tuple(cfg.get("num_bits", 8))
        narrow = bool(cfg.get("narrow_range", False))
        dynamic = not needs_calibration(cfg)
        blocks = BlockSizes.of(cfg.get("block_sizes"))
        dims = blocks.sizes
        if dims and cfg.get("axis") is not None:
            raise _unsupported(cfg, "axis together with block_sizes")

        if isinstance(num_bits, int) and 2 <= num_bits <= 8:
            element: Float | Integer = Integer(num_bits, narrow)
        elif isinstance(num_bits, tuple) and num_bits in _FLOATS:
            element = _FLOATS[num_bits]
        else:
            raise _unsupported(cfg, f"num_bits: {num_bits!r}")

        if blocks.unknown:
            raise _unsupported(cfg, f"block_sizes: {dict(blocks.unknown)!r}")
        if not symmetric and not (theirs and isinstance(element, Integer) and not dynamic):
            raise _unsupported(cfg, "symmetric: False")
        if theirs:
            made = cls._of_compressed_tensors(cfg, element, blocks, dynamic)
            return replace(made, by_compressed_tensors=True, symmetric=symmetric)
        if blocks.dynamic and any(dims.values()):
            return cls._dynamic_blocks(cfg, element, blocks)
        if not isinstance(element, Integer) and element != E4M3:
            raise _unsupported(cfg, f"num_bits: {num_bits!r} without dynamic blocks")
        if blocks.scale_bits is not None:
            raise _unsupported(cfg, f"scale_bits: {blocks.scale_bits!r} without dynamic blocks")
        if any(dims.values()):
            if set(dims) != {-1} or dynamic:
                raise _unsupported(cfg, f"block_sizes: {dims!r}")
            return cls(element, Sharing.BLOCKS, size=dims[-1] or 0)
        if dims:
            return cls(element, Sharing.DIMS, dynamic, shared=tuple(dims))
        axis = cfg.get("axis")
        kept = (axis,) if isinstance(axis, int) else tuple(axis or ())
        return cls(element, Sharing.DIMS, dynamic, kept=kept)

    @classmethod
    def _dynamic_blocks(
        cls,
        cfg: Mapping[str, Any],
        element: Float | Integer,
        blocks: BlockSizes,
    ) -> Format:
        """Read ``block_sizes`` of type dynamic: the MX family and NVFP4."""
        size = blocks.sizes.get(-1) or 0
        dynamic, alone = not needs_calibration(cfg), len(blocks.sizes) == 1
        if alone and blocks.scale_bits == (8, 0) and size in _MX_SIZES:
            if isinstance(element, Float) or element.bits == 8:
                return cls(element, Sharing.MX, dynamic, size=size)
        elif alone and blocks.scale_bits == (4, 3) and element == E2M1 and size:
            return cls(element, Sharing.NVFP4, dynamic, size=size)
        raise _unsupported(cfg, f"block_sizes: {dict(cfg['block_sizes'])!r}")

    @classmethod
    def _of_compressed_tensors(
        cls, cfg: Mapping[str, Any], element: Float | Integer, blocks: BlockSizes, dynamic: bool
    ) -> Format:
        """Read how compressed-tensors shares scales: by tensor, channel, token or block."""
        dims, axis = blocks.sizes, cfg.get("axis")
        if blocks.scale_bits is not None:
            made = cls._dynamic_blocks(cfg, element, blocks)
            if made.sharing is Sharing.MX and (made.size != 32 or element not in (E2M1, E4M3)):
                raise _unsupported(cfg, f"block_sizes: {dict(cfg['block_sizes'])!r}")
            return made
        if not isinstance(element, Integer) and element != E4M3:
            raise _unsupported(cfg, f"num_bits: {cfg['num_bits']!r} without scales of a format")
        if dims == {-1: None} and dynamic:
            return cls(element, Sharing.DIMS, dynamic, shared=(-1,))
        if set(dims) == {-1} and dims[-1]:
            return cls(element, Sharing.BLOCKS, dynamic, size=dims[-1])
        if set(dims) == {-1, -2} and dims[-1] and dims[-2] and not dynamic:
            return cls(element, Sharing.BLOCKS, size=dims[-1], rows=dims[-2])
        if not dims and axis in (None, 0, (0,), [0]):
            kept = () if axis is None else (0,)
            return cls(element, Sharing.DIMS, dynamic, kept=kept)
        raise _unsupported(cfg, f"axis: {axis!r}, block_sizes: {dims!r}")

    def shared_dims(self, ndim: int) -> tuple[int, ...]:
        """Return the dimensions of a tensor with ``ndim`` that share a scale, in rising order.

        Raises:
            UserError: The format names a dimension that the tensor does not have.
        """
        named = self.shared if self.kept is None else self.kept
        if any(not -ndim <= dim < ndim for dim in named):
            raise UserError(
                f"the format names dimensions {named}, the tensor has {ndim}",
                where="axis or block_sizes",
                remedy="Name dimensions that every tensor under this quantizer has.",
            )
        positive = {dim % ndim for dim in named}
        return tuple(dim for dim in range(ndim) if (dim in positive) == (self.kept is None))

    def has_one_scale(self, ndim: int) -> bool:
        """Return whether one scale serves a whole tensor with ``ndim``, or lies over all others."""
        if self.sharing is Sharing.DIMS:
            return len(self.shared_dims(ndim)) == ndim
        return self.sharing is Sharing.NVFP4

    def separable_dims(self, ndim: int) -> tuple[int, ...]:
        """Return the dimensions of a tensor with ``ndim`` along which parts share no scale.

        Cut along one of them, a tensor is quantized part by part to the same values; where blocks
        have several ``rows``, between blocks. None where one scale, or NVFP4's scale over the
        block scales, serves the whole tensor.
        """
        if self.sharing is Sharing.NVFP4:
            return ()
        if self.rows > 1:
            return (0,)
        if self.sharing is not Sharing.DIMS:
            return tuple(range(ndim - 1))
        shared = self.shared_dims(ndim)
        return tuple(dim for dim in range(ndim) if dim not in shared)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _unsupported(cfg: Mapping[str, Any], what: str) -> UserError:
    return UserError(
        f"{what} is not a quantizer config that qsens computes itself",
        where=f"cfg {dict(cfg)!r}",
        remedy="Use a config that qsens.numerics.supports(), or ModelOpt's own TensorQuantizer.",
    )


def format_of(cfg: Mapping[str, Any]) -> Format:
    """Read a ``cfg``; see `Format.from_cfg`, which is asked once for each.

    Raises:
        UserError: The config is not one that is computed here.
    """
    key = repr(cfg)
    known = _READ_BEFORE.get(key)
    if known is None:
        known = _READ_BEFORE[key] = Format.from_cfg(cfg)
    return known
