"""How large a checkpoint's weights are, and its layers, from the headers of its files.

Never imports torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

SLOTS = 2
"""Layers that are on a device at once where they are streamed: at work, and on their way."""

_GIB = 1 << 30
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# The first index in a name is a layer's: "model.layers.3.mlp.up_proj.weight".
_LAYER = re.compile(r"(\D*\.\d+)\.")


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of weights in the data type that they are loaded in.

    Attributes:
        total: Of all.
        layers: Of all layers: what crosses the bus each way that a window of samples goes, where
            layers are streamed.
        largest: Of the largest layer.
    """

    total: int
    layers: int
    largest: int

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> WeightSizes:
        """Return those of a checkpoint.

        Args:
            shapes: Shape of every tensor, by name.
            dtype: The data type, ``bfloat16``.
        """
        layers: Counter[str] = Counter()
        total = 0
        for name, shape in shapes.items():
            size = math.prod(shape) * _BYTES[dtype]
            total += size
            match = _LAYER.match(name)
            if match and len(shape) > 1:
                layers[match[1]] += size
        return cls(total, layers.total(), max(layers.values(), default=0))

    @property
    def streamed(self) -> int:
        """Return the bytes of a device that they take where layers are streamed."""
        return min(self.total, self.total - self.layers + SLOTS * self.largest)

    def placement(self, memory_gb: float | None) -> str:
        """Return in words where they will lie, as far as a device's memory is known.

        Args:
            memory_gb: GiB of the device; none where that is not known yet.
        """
        if memory_gb is not None and self.total > memory_gb * _GIB:
            fits = f", more than autoquant.memory_gb={memory_gb:g}: "
        else:
            fits = "; where they do not fit beside a pass, layers are streamed: "
        return (
            f"weights: {self.total / _GIB:.2f} GiB{fits}{self.streamed / _GIB:.2f} GiB of them are "
            f"on the device at once, and {self.layers / _GIB:.2f} GiB cross the bus each way that "
            "a window of samples goes"
        )
