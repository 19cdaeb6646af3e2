"""What ``config.json`` of a packed checkpoint says: which module is in which format."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)

from qsens.config import PairConfig
from qsens.export.packed_weight import scheme_of
from qsens.names import inner_name

_MIXED = "mixed-precision"


def quantization_config(
    formats: Mapping[str, PairConfig], chosen: Mapping[str, str], others: Collection[str]
) -> dict[str, Any]:
    """Return ``quantization_config`` of compressed-tensors.

    Modules are named by patterns of how their names end: servers call a model's parts otherwise
    (``language_model.model.layers`` for ``model.language_model.layers``), and match ``lm_head``
    by a pattern alone.

    Args:
        formats: The formats, by name.
        chosen: The name of the format of each module that is quantized.
        others: Names of the linear modules that are not.
    """
    names = [*chosen, *others]
    groups: dict[str, QuantizationScheme] = {}
    for name, pair in formats.items():
        members = [module for module, format_ in chosen.items() if format_ == name]
        if members:
            targets = tuple(patterns(members, names))
            groups[f"group_{len(groups)}"] = scheme_of(pair, targets)
    layouts = {CompressionFormat(scheme.format).value for scheme in groups.values()}
    config = QuantizationConfig(
        config_groups=groups,
        format=layouts.pop() if len(layouts) == 1 else _MIXED,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(patterns(others, names)),
    )
    written: dict[str, Any] = config.model_dump(mode="json")
    return written


def patterns(names: Iterable[str], everything: Iterable[str]) -> Iterable[str]:
    """Return a regular expression for each name that matches no other of ``everything``."""
    inner: dict[str, int] = {}
    for name in everything:
        inner[inner_name(name)] = inner.get(inner_name(name), 0) + 1
    ends = list(inner)
    for name in names:
        end = inner_name(name)
        alone = inner[end] == 1 and not any(
            other != end and other.endswith(f".{end}") for other in ends
        )
        yield rf"re:(.*\.)?{re.escape(end if alone else name)}$"
