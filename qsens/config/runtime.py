"""What runtimes load: their formats, fused modules and widths; files under ``configs/runtime/``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from qsens.config.base import Frozen, Name
from qsens.config.files import read_mapping
from qsens.config.load import choices
from qsens.config.pairs import QuantizerConfig
from qsens.config.roots import Roots
from qsens.errors import UserError
from qsens.names import Kind
from qsens.reading import shown
from qsens.visible import visible

GROUP = "runtime"
Gpu = Literal["turing", "ampere", "ada", "hopper", "blackwell", "cpu"]
GPUS: tuple[Gpu, ...] = ("turing", "ampere", "ada", "hopper", "blackwell", "cpu")
Number = Literal["int4", "int8", "fp4", "fp8"]
Scales = Literal["tensor", "channel", "token", "group", "block", "mx", "nvfp4"]
_FLOATS = {(2, 1): "fp4", (4, 3): "fp8"}


class TensorFormat(Frozen):
    """What the format of one tensor has to be; what is not said may be anything."""

    number: Number | None = None
    """The number: ``fp8`` is E4M3, ``fp4`` E2M1."""
    scales: tuple[Scales, ...] | None = None
    """What shares a scale: the ``tensor``, an output ``channel`` of weights, a ``token`` of
    activations, a ``group`` of columns, a ``block`` of rows and columns, or the blocks that are
    part of a number format, ``mx`` (32 under a power of two) and ``nvfp4`` (16 under E4M3)."""
    sizes: tuple[int, ...] | None = None
    """Columns of a group or a block; holds those alone."""
    symmetric: bool | None = None
    """Whether there are no zero points."""
    dynamic: bool | None = None
    """Whether scales come from the tensor itself; holds what is no ``mx`` or ``nvfp4`` alone."""

    def matches(self, quantizer: QuantizerConfig, *, weights: bool) -> bool:
        """Return whether a quantizer is of this format.

        Args:
            quantizer: The quantizer.
            weights: Whether it is that of weights.
        """
        scales, size = _scales_of(quantizer, weights=weights)
        return (
            self.number in (None, _number_of(quantizer))
            and (self.scales is None or scales in self.scales)
            and (self.sizes is None or scales not in ("group", "block") or size in self.sizes)
            and self.symmetric in (None, quantizer.symmetric)
            and (scales in ("mx", "nvfp4") or self.dynamic in (None, quantizer.type == "dynamic"))
        )


class Tile(Frozen):
    """What the two widths of a shard must be multiples of, in a runtime's kernels."""

    rows: int = Field(default=1, gt=0)
    """Of the output channels of a fused layer, on one GPU."""
    columns: int = Field(default=1, gt=0)
    """Of the input channels, on one GPU."""
    gpus: tuple[Gpu, ...] = GPUS
    """Where it holds."""


class RuntimeFormat(Frozen):
    """A format that a runtime knows, and where it runs."""

    what: str
    """The runtime's name of it."""
    weights: TensorFormat
    """What weights have to be."""
    inputs: TensorFormat | None = None
    """What activations have to be; none where they are not quantized."""
    runs: tuple[Gpu, ...] = ()
    """GPU generations that run it as it is."""
    otherwise: dict[Gpu, str] = {}
    """What others load and compute instead, in words that follow *it runs*."""
    misread: str | None = None
    """How the runtime loads it as another format without a word; none where it does not."""
    note: str | None = None
    """What to know of it wherever it runs."""
    kinds: tuple[Kind, ...] | None = None
    """The kinds of modules that it runs for; none where for all."""
    tiles: tuple[Tile, ...] = ()
    """What widths must divide by, beside groups and blocks."""

    @model_validator(mode="after")
    def _is_read_one_way(self) -> Self:
        twice = [gpu for gpu in self.runs if gpu in self.otherwise]
        if twice:
            raise ValueError(f"{twice[0]} both runs it as it is and otherwise")
        if self.misread is None and not (self.runs or self.otherwise):
            raise ValueError("neither runs nor otherwise nor misread: say where it is loaded")
        if self.misread is not None and (self.runs or self.otherwise):
            raise ValueError("misread together with where it runs; it is one or the other")
        return self

    def matches(self, weights: QuantizerConfig, inputs: QuantizerConfig | None) -> bool:
        """Return whether weights and activations are of this format."""
        if (inputs is None) != (self.inputs is None):
            return False
        if not self.weights.matches(weights, weights=True):
            return False
        return inputs is None or self.inputs is None or self.inputs.matches(inputs, weights=False)


class TensorParallel(Frozen):
    """How a runtime cuts modules over GPUs, by the last part of their names."""

    rows: tuple[str, ...]
    """Cut by output channels."""
    columns: tuple[str, ...]
    """Cut by input channels. What neither names is whole on every GPU."""


class RuntimeConfig(Frozen):
    """What one version of a runtime loads."""

    name: Name
    """Name of the runtime; equal to the file's name."""
    title: str
    """Its name in words."""
    version: str
    """The version that all of it was found in."""
    layout: Literal["compressed-tensors", "modelopt"]
    """The layout of checkpoints that it was found with."""
    formats: tuple[RuntimeFormat, ...]
    """The formats; the first that matches decides, and what none matches is not loaded."""
    fused: tuple[tuple[str, ...], ...] = ()
    """Last parts of the names of modules that become one, in order: they share a format."""
    fused_experts: bool = True
    """Whether all experts of a layer become one."""
    never: dict[str, tuple[str, ...]] = {}
    """Patterns (fnmatch) of modules that it leaves at 16 bits, by what they are."""
    tensor_parallel: TensorParallel | None = None
    """How it cuts modules over GPUs; none where that is not known."""

    @property
    def words(self) -> str:
        """Return its name and version."""
        return f"{self.title} {self.version}"


def load_runtime(name: str, roots: Roots | None = None, *, where: str = "--for") -> RuntimeConfig:
    """Read a file below ``configs/runtime/``.

    Args:
        name: Its name.
        roots: Where to look; from the environment when not given.
        where: What asked for it, in messages.

    Raises:
        UserError: There is none of the name, or it is broken; its path and the key are named.
    """
    files = choices(GROUP, roots)
    if name not in files:
        close = difflib.get_close_matches(name, files, n=1)
        raise UserError(
            f"unknown runtime '{shown(name)}'",
            where=where,
            remedy=f"Allowed: {', '.join(files)}."
            + (f" Did you mean {close[0]}?" if close else ""),
        )
    path = files[name]
    given = {"name": name, **read_mapping(path)}
    if given["name"] != name:
        raise UserError(
            f"{shown(given['name'])} is not equal to the file's name",
            where=f"name ({path})",
            remedy="Leave it out.",
        )
    try:
        return RuntimeConfig.model_validate(given)
    except ValidationError as error:
        first: Mapping[str, Any] = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    unknown = first["type"] == "extra_forbidden"
    said = "is no key of a runtime" if unknown else first["msg"].removeprefix("Value error, ")
    raise UserError(
        visible(said), where=f"{visible(key) or GROUP} ({path})", remedy="Mend the file."
    )


def _number_of(quantizer: QuantizerConfig) -> str | None:
    bits = quantizer.num_bits
    return f"int{bits}" if isinstance(bits, int) else _FLOATS.get(bits)


def _scales_of(quantizer: QuantizerConfig, *, weights: bool) -> tuple[Scales | None, int | None]:
    """Return what shares a scale, and the columns of a group or block."""
    sizes = quantizer.sizes()
    if quantizer.has_block_format():
        known: dict[Any, tuple[Scales, int]] = {(8, 0): ("mx", 32), (4, 3): ("nvfp4", 16)}
        scales, size = known.get(quantizer.block_type(), (None, None))
        return (scales, size) if sizes == {-1: size} else (None, None)
    if quantizer.is_whole_tensor():
        return "tensor", None
    if not sizes:
        return ("channel", None) if weights and quantizer.axes() == (0,) else (None, None)
    if sizes.keys() == {-1}:
        whole: Scales = "channel" if weights else "token"
        return ("group", sizes[-1]) if sizes[-1] else (whole, None)
    if sizes.keys() == {-1, -2} and sizes[-1] and sizes[-1] == sizes[-2]:
        return "block", sizes[-1]
    return None, None
