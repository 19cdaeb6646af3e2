"""What a benchmark works on: a model, samples, and the cells of the grid."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoConfig

from qsens.checkpoint.components import resolve_components
from qsens.checkpoint.loading import (
    auto_class,
    choose_experts,
    disable_cudnn_attention,
    load_model,
    load_tokenizer,
)
from qsens.checkpoint.structure import Structure, structure_of
from qsens.config import DatasetConfig, ModelConfig, PairConfig, choices, load_sweep
from qsens.data.captions import read_captions
from qsens.data.samples import Samples, tokenize

ROOT = Path(__file__).resolve().parent.parent
PAIRS = ("wfp8_afp8", "wint8_aint8", "wfp8_afp16", "wint8_afp16")
NIGHTLY = (
    "wfp4_afp8",
    "wfp4_afp16",
    "wfp8_afp8",
    "wfp8_afp16",
    "wint8_afp16",
    "wint8_afp8",
    "wint8_aint8",
)
_CAPTIONS = (
    ROOT.parent / "shared" / "captions" / "coco2017_captions_large.txt",
    ROOT / "configs" / "dataset" / "demo" / "captions_large.txt",
)
# Ids at the end of a large vocabulary are special tokens: images, turns.
_SPECIAL_IDS = 1024

SHAPES: dict[str, dict[str, Any]] = yaml.safe_load(
    (ROOT / "benchmarks" / "shapes.yaml").read_text(encoding="utf-8")
)
"""Models that can be built without a checkpoint, with random weights."""


@dataclass(frozen=True)
class Cell:
    """A pair at a size.

    Attributes:
        pair: The pair.
        size: Name of the size, or its sample count.
        calibrated: Samples that it is calibrated on.
        scored: Samples that it is scored on.
    """

    pair: PairConfig
    size: str
    calibrated: int
    scored: int

    @property
    def name(self) -> str:
        """Return the cell's id."""
        return f"{self.pair.name}-{self.size}"


@dataclass(frozen=True)
class Workload:
    """A model with samples.

    Attributes:
        name: The checkpoint's directory or the shape.
        model: The model, weights frozen; never converted, only its copies are.
        samples: All samples.
        captions: Name of the file that they come from.
        disabled: Patterns of modules that stay unquantized.
        batch_size: Samples of a nominal batch.
        score_size: Samples that are scored at most.
        sizes: Samples of each size.
    """

    name: str
    model: nn.Module
    samples: Samples
    captions: str
    disabled: tuple[str, ...]
    batch_size: int
    score_size: int
    sizes: dict[str, int]

    @property
    def device(self) -> torch.device:
        """Return where the model lies."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Return the data type of its weights."""
        return next(self.model.parameters()).dtype

    def identity(self) -> dict[str, Any]:
        """Return what two runs must share for their seconds to be put side by side."""
        return {
            "model": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "captions": self.captions,
            "samples": len(self.samples),
            "tokens": self.samples.tokens(),
            "samples_digest": hashlib.sha256(repr(self.samples.ids).encode()).hexdigest()[:12],
            "batch_size": self.batch_size,
            "score_size": self.score_size,
        }

    def cell(self, pair: PairConfig, size: str | int) -> Cell:
        """Return the cell of a pair at a named size or a sample count."""
        asked = self.sizes[size] if isinstance(size, str) else size
        count = min(asked, len(self.samples))
        return Cell(pair, str(size), count, min(count, self.score_size))

    def boundaries(self) -> list[int]:
        """Return the sample counts that no batch crosses."""
        return [*self.sizes.values(), self.score_size]

    def repeated(self, count: int) -> Samples:
        """Return ``count`` samples, from the first again where there are fewer."""
        times = -(-count // len(self.samples))
        return Samples(
            ids=(self.samples.ids * times)[:count],
            truncated=(self.samples.truncated * times)[:count],
        )


def build(
    *,
    model: Path | None,
    shape: str | None,
    device: torch.device,
    dtype: str,
    captions: Path | None,
    batch_size: int,
    score_size: int,
) -> Workload:
    """Load a checkpoint, or build a shape, and get its samples ready.

    Args:
        model: Directory of a checkpoint; its own tokenizer is used.
        shape: Name of a shape, where there is no checkpoint.
        device: Where it goes.
        dtype: Data type of its weights.
        captions: One caption a line; those of the project when not given.
        batch_size: Samples of a nominal batch.
        score_size: Samples that are scored at most.
    """
    file = captions or captions_file()
    lines = read_captions(file)
    dataset = DatasetConfig()
    if model is not None:
        config = ModelConfig(path=model.resolve(), dtype=dtype)
        loaded = load_model(config, device)
        disabled = resolve_components(config).vision_patterns
        samples = tokenize(lines, load_tokenizer(config), longest=dataset.calib_seq_len)
    else:
        assert shape is not None
        loaded = build_shape(shape, device, getattr(torch, dtype))
        disabled = tower_patterns(loaded)
        vocabulary = loaded.config.get_text_config().vocab_size  # type: ignore[union-attr,operator]
        samples = random_samples(lines, vocabulary, longest=dataset.calib_seq_len)
    return Workload(
        name=model.resolve().name if model else shape or "",
        model=loaded,
        samples=samples,
        captions=file.name,
        disabled=disabled,
        batch_size=batch_size,
        score_size=score_size,
        sizes={size: count for size, count in dataset.sizes.items() if isinstance(count, int)},
    )


def captions_file() -> Path:
    """Return the captions that are used where none are named."""
    return next(path for path in _CAPTIONS if path.is_file())


def build_shape(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Build a model of that shape where it is to run: every matrix is normal(0, 0.02)."""
    disable_cudnn_attention()
    torch.manual_seed(0)
    sizes = {"model_type": "qwen3_vl", "tie_word_embeddings": True, **SHAPES[name]}
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    with torch.device(device):
        model = auto_class(config).from_config(config, dtype=dtype)
    choose_experts(model, device, dtype)
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.02)
    module: nn.Module = model.eval()
    return module


def tower_patterns(model: Any) -> tuple[str, ...]:
    """Return the patterns of what reads pictures in a model of a known type."""
    structure = structure_of(model.config.model_type)
    assert isinstance(structure, Structure)
    return structure.vision


def ordinary_ids(vocabulary: int) -> int:
    """Return how many ids, from 0, are of text; those at the end of a large one are special."""
    return vocabulary - _SPECIAL_IDS if vocabulary > 2 * _SPECIAL_IDS else vocabulary


def random_samples(captions: Sequence[str], vocabulary: int, *, longest: int) -> Samples:
    """Return random ids, as many a caption as it has words and marks of punctuation."""
    generator = torch.Generator().manual_seed(0)
    high = ordinary_ids(vocabulary)
    ids = []
    for caption in captions:
        length = len(re.findall(r"\w+|[^\w\s]", caption))
        drawn = torch.randint(0, high, (length,), generator=generator).tolist()
        ids.append(tuple(drawn[:longest]))
    return Samples(ids=tuple(ids), truncated=(False,) * len(ids))


def samples_of_length(model: Any, count: int, tokens: int) -> Samples:
    """Return samples of random ids, all of one length."""
    high = ordinary_ids(model.config.get_text_config().vocab_size)
    ids = torch.randint(0, high, (count, tokens), generator=torch.Generator().manual_seed(0))
    return Samples(tuple(map(tuple, ids.tolist())), (False,) * count)


def pair_configs(names: Sequence[str]) -> list[PairConfig]:
    """Return the pairs of that name, ``wint8_aint8-ct_token`` at that granularity.

    Every pair of ``configs/quant_pair`` where there is no name.
    """
    names = names or list(choices("quant_pair"))
    config = load_sweep("single", [f"quant_pair={','.join(names)}"]).config
    return [pair.with_granularity(granularity) for pair, granularity in config.formats]
