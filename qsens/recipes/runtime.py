"""What a runtime makes of formats and modules, by its file: refused, run otherwise, or taken."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

from qsens.config import PairConfig
from qsens.config.runtime import GPUS, Gpu, RuntimeConfig, RuntimeFormat
from qsens.names import Kind

_OF_EXPERTS = re.compile(r"^(.*\.experts)\.\d+\.")


@dataclass(frozen=True)
class Ruling:
    """What a runtime makes of a format.

    Attributes:
        refusal: Why it is refused, with the runtime's version; none where it is not.
        misread: Whether it would be loaded all the same, and computed as something else.
        note: What to know of it; none where there is nothing.
        absent: GPU generations that do not run it, where none in particular is asked for.
    """

    refusal: str | None = None
    misread: bool = False
    note: str | None = None
    absent: tuple[Gpu, ...] = ()


@dataclass(frozen=True)
class Weight:
    """One weight of a module, a matrix.

    Attributes:
        name: Its name in the files, ``.weight`` left out; of an expert, that of the expert's.
        kind: What its group is.
        shape: ``(out, in)``.
        fused_rows: Output channels of the whole layer that it is fused into.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    fused_rows: int

    @property
    def leaf(self) -> str:
        """Return the last part of its name."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Deployment:
    """A runtime on GPUs of one generation.

    Attributes:
        runtime: What it loads.
        gpu: The generation; none where any may come.
        tensor_parallel: GPUs that every layer is cut over.
    """

    runtime: RuntimeConfig
    gpu: Gpu | None = None
    tensor_parallel: int = 1

    def ruling(self, pair: PairConfig) -> Ruling:
        """Return what the runtime makes of a format.

        What it runs as it is on no generation is refused, wherever it runs otherwise.
        """
        found, words = self._format(pair), self.runtime.words
        if found is None:
            return Ruling(f"{words} loads no such format")
        if found.misread is not None:
            return Ruling(f"{words} reads it as another format: {found.misread}", misread=True)
        if not found.runs:
            return Ruling(f"{words} runs it nowhere as it is, but {_otherwise(found)}")
        if self.gpu is not None and self.gpu not in (*found.runs, *found.otherwise):
            where = ", ".join(found.runs)
            return Ruling(f"{words} does not run it on {self.gpu}, but on {where}")
        parts = [found.note] if found.note is not None else []
        if self.gpu is None and found.otherwise:
            parts.append(f"it runs {_otherwise(found)}")
        elif self.gpu in found.otherwise:
            parts.append(f"on {self.gpu} it runs {found.otherwise[self.gpu]}")
        absent = [gpu for gpu in GPUS if gpu not in (*found.runs, *found.otherwise)]
        return Ruling(
            note=f"{words}: {'; '.join(parts)}" if parts else None,
            absent=tuple(absent) if self.gpu is None else (),
        )

    def module_refusal(self, pair: PairConfig, member: str, kind: Kind) -> str | None:
        """Return why a module, whatever its shape, cannot be of a format; none where it can."""
        for what, patterns in self.runtime.never.items():
            if any(fnmatch.fnmatchcase(member, pattern) for pattern in patterns):
                return f"{self.runtime.words} never quantizes {what}"
        found = self._format(pair)
        if found is not None and found.kinds is not None and kind not in found.kinds:
            return f"{self.runtime.words} runs it for {', '.join(found.kinds)} alone"
        return None

    def unfit(self, pair: PairConfig, weight: Weight) -> str | None:
        """Return why a weight's widths do not allow a format; none where they do.

        Args:
            pair: The format; one that the runtime loads.
            weight: The weight.
        """
        reason = self._unfit(pair, weight)
        return None if reason is None else f"{self.runtime.words}: {reason}"

    def fused(self, members: Iterable[str]) -> list[tuple[str, ...]]:
        """Return the modules that the runtime makes one of, in the order in which it does."""
        found: dict[tuple[str, int], dict[int, str]] = {}
        experts: dict[str, list[str]] = {}
        for member in members:
            parent, _, leaf = member.rpartition(".")
            of_experts = _OF_EXPERTS.match(member)
            if self.runtime.fused_experts and of_experts:
                experts.setdefault(of_experts.group(1), []).append(member)
                continue
            for at, leaves in enumerate(self.runtime.fused):
                if leaf in leaves:
                    found.setdefault((parent, at), {})[leaves.index(leaf)] = member
        sets = [tuple(parts[at] for at in sorted(parts)) for parts in found.values()]
        return [each for each in (*sets, *map(tuple, experts.values())) if len(each) > 1]

    def _format(self, pair: PairConfig) -> RuntimeFormat | None:
        weights, inputs = pair.weight_quantizer, pair.input_quantizer
        formats = self.runtime.formats
        return next((each for each in formats if each.matches(weights, inputs)), None)

    def _unfit(self, pair: PairConfig, weight: Weight) -> str | None:
        rows, columns = weight.shape
        cut = self._cut(weight)
        shard = f" on each of {self.tensor_parallel} GPUs" if cut else ""
        # A vocabulary is filled up, whatever its size.
        free_rows = weight.kind == "head"
        if cut == "rows" and not free_rows and rows % self.tensor_parallel:
            return f"{rows} rows do not divide over {self.tensor_parallel} GPUs"
        if cut == "columns" and columns % self.tensor_parallel:
            return f"{columns} columns do not divide over {self.tensor_parallel} GPUs"
        fused_rows = weight.fused_rows
        if cut == "rows":
            rows, fused_rows = rows // self.tensor_parallel, fused_rows // self.tensor_parallel
        if cut == "columns":
            columns //= self.tensor_parallel
        for quantizer in (pair.weight_quantizer, pair.input_quantizer):
            size = quantizer.sizes().get(-1) if quantizer is not None else None
            if size and columns % size:
                return f"{columns} columns{shard} do not divide into groups of {size}"
        size = pair.weight_quantizer.sizes().get(-2)
        if size and not free_rows and (cut == "rows" or not self._is_last(weight)):
            # Gate and up of one weight are two parts of a fused layer.
            parts = 2 if weight.leaf == "gate_up_proj" else 1
            if rows % parts or rows // parts % size:
                return f"{rows // parts} rows{shard} do not divide into blocks of {size}"
        return self._off_tile(pair, fused_rows, columns, shard, free_rows=free_rows)

    def _off_tile(
        self, pair: PairConfig, rows: int, columns: int, shard: str, *, free_rows: bool
    ) -> str | None:
        found = self._format(pair)
        if found is None:
            return None
        asked = found.runs if self.gpu is None else (self.gpu,)
        for tile in found.tiles:
            on = ", ".join(gpu for gpu in asked if gpu in tile.gpus)
            if not on:
                continue
            if columns % tile.columns:
                return f"{columns} columns{shard} are no multiple of {tile.columns}, on {on}"
            if rows % tile.rows and not free_rows:
                return f"{rows} rows{shard} are no multiple of {tile.rows}, on {on}"
        return None

    def _cut(self, weight: Weight) -> str | None:
        """Return which dimension is cut over GPUs; none where none is."""
        by = self.runtime.tensor_parallel
        if by is None or self.tensor_parallel == 1:
            return None
        if weight.leaf in by.rows:
            return "rows"
        return "columns" if weight.leaf in by.columns else None

    def _is_last(self, weight: Weight) -> bool:
        """Return whether nothing follows a weight in its fused layer, which may end anywhere."""
        if weight.kind == "experts" or _OF_EXPERTS.match(weight.name):
            return weight.leaf in ("down_proj", "w2")
        if weight.leaf == "gate_up_proj":
            return False
        return all(weight.leaf not in leaves[:-1] for leaves in self.runtime.fused)


def _otherwise(found: RuntimeFormat) -> str:
    by_words: dict[str, list[str]] = {}
    for gpu, words in found.otherwise.items():
        by_words.setdefault(words, []).append(gpu)
    return ", ".join(f"{words} on {', '.join(gpus)}" for words, gpus in by_words.items())
