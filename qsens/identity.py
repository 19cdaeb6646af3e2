"""What decides a result's numbers: the input of its digest, key by key.

A digest is the name of a result on disk, so nothing here changes by itself. Every key and every
field that enters is written down, spelled as the first version spelled it. A field that is new
enters only where it is not its default, and only if numbers depend on it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qsens.config import DatasetConfig, ModelConfig, PairConfig, SweepConfig
from qsens.config.base import Frozen
from qsens.config.models import (
    CONVERSATIONS,
    AutoquantConfig,
    Coverage,
    Modality,
    RecordKind,
    Size,
    tokens_of,
)
from qsens.config.pairs import QuantizerConfig

# Raised whenever a method gives other numbers for the same input: by the weights' data type.
_FUSED = {
    "gradient": {"float32": 2, "bfloat16": 2, "float16": 2},
    "fisher": {"float32": 2, "bfloat16": 3, "float16": 3},
    "kl_div": {"float32": 2, "bfloat16": 3, "float16": 3},
}
_MODELOPT = 2
CALIBRATION_VERSION = 2
_MEASURED_KL = {"float32": 1, "bfloat16": 2, "float16": 2}

_QWEN_VL = (("model.visual.*", "visual.*"), ("lm_head",))
_DECODER: tuple[tuple[str, ...], tuple[str, ...]] = ((), ("lm_head",))
# Patterns of the vision tower and of the head by `model_type`, as digests spell them: what the
# table of families said when results were first stored under them.
PATTERNS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "qwen3_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "qwen3_vl_moe": _QWEN_VL,
    "qwen3": _DECODER,
    "qwen3_moe": _DECODER,
    "llama": _DECODER,
    "gemma3": (
        (
            "model.vision_tower.*",
            "model.multi_modal_projector.*",
            "vision_tower.*",
            "multi_modal_projector.*",
        ),
        ("lm_head",),
    ),
    "gemma3_text": _DECODER,
}


class CheckpointIdentity(Frozen):
    """What a checkpoint is, read from its files without loading it."""

    path: Path
    """Local directory."""
    digest: str
    """SHA-256 over configuration and weight files, and code that runs, by path and content."""
    tokenizer_digest: str
    """SHA-256 over tokenizer files, by content."""
    architecture: str
    """Class name from ``config.json``."""
    weight_bytes: int
    """Bytes of all weight files."""
    tied_head: bool | None = None
    """Whether the head is loaded as the embedding's weight; none where an older plan does not
    say."""
    processor_digest: str | None = None
    """SHA-256 over the files of its image processor, by content; none where it has none."""
    quantization: str | None = None
    """How its weights are quantized already, in words; none where they are not."""
    notices: list[str] = []
    """What a reader should know about its files: what lies beside them, what does not run."""


class Skipped(Frozen):
    """A sample that is left out: its picture cannot be used, or its record is no conversation."""

    sample: int
    """Its number in the file, from 1."""
    image: str
    """Path of the picture, as the file has it; empty where it is the record that does not fit."""
    reason: str
    """What is wrong with it."""


class Skipping(Frozen):
    """What leaves out some of the samples that its size may use."""

    skipped: list[Skipped] = []
    """Those, in order."""

    def valid(self, count: int) -> int:
        """Return how many of the first ``count`` samples are not left out."""
        return count - sum(entry.sample <= count for entry in self.skipped)


class PicturesIdentity(Skipping):
    """What the pictures of a sample file are, as many as its size may use."""

    digest: str
    """SHA-256 over the contents of the pictures, in order, with what is wrong with the others."""


class SamplesIdentity(Skipping):
    """What a sample file is."""

    path: Path
    """The file; of several, the first."""
    more: tuple[Path, ...] = ()
    """Those that follow it."""
    digest: str
    """SHA-256 of its content; of several files, over those of all."""
    available: int
    """Samples (non-empty lines) in it."""
    kind: RecordKind = "caption"
    """What its records are."""
    counts: dict[Size, int] = {}
    """How many of its samples each size in tokens comes to; all of them where it has fewer."""
    tokens: dict[Size, int] = {}
    """Tokens of that many samples."""
    pictures: PicturesIdentity | None = None
    """Its pictures; none where no cell reads them."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its files, in order."""
        return (self.path, *self.more)

    def asked(self, dataset: DatasetConfig, size: Size) -> int:
        """Return how many samples ``size`` asks for, before any limit."""
        count = dataset.sizes[size]
        return count if isinstance(count, int) else self.counts[size]

    def missing_tokens(self, dataset: DatasetConfig, size: Size) -> int:
        """Return how many tokens the files lack of a size in tokens."""
        wanted = tokens_of(dataset.sizes[size])
        return 0 if wanted is None else max(0, wanted - self.tokens[size])

    def limit(self, dataset: DatasetConfig, size: Size) -> int:
        """Return how many samples of ``size`` may be used at most."""
        asked = self.asked(dataset, size)
        return min(asked, dataset.max_calib_samples or asked)


class PatternsIdentity(Frozen):
    """The patterns of a checkpoint's parts, as digests spell them."""

    vision: tuple[str, ...]
    """Module name patterns (fnmatch) of the vision tower."""
    head: tuple[str, ...]
    """The same of the head."""


def identify_patterns(
    given: ModelConfig, resolved: ModelConfig, model_type: str, weights: Collection[str]
) -> PatternsIdentity:
    """Return the patterns that enter digests.

    Those of a model file enter as they are. Those of the table of families enter as the table first
    had them, for as long as both match the same weights.

    Args:
        given: The model file.
        resolved: The same with the patterns of the table.
        model_type: Of the checkpoint's ``config.json``.
        weights: Names of the checkpoint's tensors.
    """
    first = PATTERNS.get(model_type, (resolved.vision_patterns, resolved.head_patterns))
    modules = [name.removesuffix(".weight") for name in weights]

    def spelled(
        own: tuple[str, ...], now: tuple[str, ...], before: tuple[str, ...]
    ) -> tuple[str, ...]:
        return own or (before if _matched(modules, before) == _matched(modules, now) else now)

    return PatternsIdentity(
        vision=spelled(given.vision_patterns, resolved.vision_patterns, first[0]),
        head=spelled(given.head_patterns, resolved.head_patterns, first[1]),
    )


def engine_version(autoquant: AutoquantConfig, dtype: str) -> int:
    """Return the version of what computes the scores, for weights of that data type."""
    return _MODELOPT if autoquant.engine == "modelopt" else _FUSED[autoquant.method][dtype]


def measured_kl_version(dtype: str) -> int:
    """Return the version of what measures the KL divergences of audits."""
    return _MEASURED_KL[dtype]


def cell_identity(
    config: SweepConfig,
    pair: PairConfig,
    coverage: Coverage,
    size: Size,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Return what the configuration adds to the digest of a cell's result: numbers and names.

    What its data set adds is :func:`inputs_identity` and :func:`set_identity`.

    Args:
        config: The sweep.
        pair: The pair, its granularity applied.
        coverage: Part of the model that may be quantized.
        size: Calibration size.
        versions: Installed versions, by distribution name.
    """
    autoquant, model = config.autoquant, config.model
    computing = ["torch", "transformers"]
    if autoquant.engine == "modelopt":
        computing.append("nvidia-modelopt")
    identity: dict[str, Any] = {
        "size": size,
        "pair": _pair(pair, coverage),
        "coverage": coverage,
        "method": autoquant.method,
        "draws": autoquant.draws if autoquant.method == "fisher" else None,
        "effective_bits": autoquant.effective_bits,
        "score_size": autoquant.score_size,
        "batch_size": autoquant.batch_size,
        "seed": autoquant.seed,
        "engine": [autoquant.engine, engine_version(autoquant, model.dtype)],
        "versions": {name: versions.get(name, "none") for name in computing},
    }
    # Such scales once were those of a part of a weight of more than 2^26 elements.
    if autoquant.engine == "fused" and _crosses_rows(pair.weight_quantizer):
        identity["scales"] = "of the whole weight"
    return identity


def set_identity(
    model: ModelConfig, dataset: DatasetConfig, modality: Modality, samples: SamplesIdentity
) -> dict[str, Any]:
    """Return what a data set adds to the digest of a cell's result, beside what a pass runs on."""
    identity: dict[str, Any] = {
        "names": [model.name, model.short_name, dataset.name],
        "max_calib_samples": dataset.max_calib_samples,
    }
    pictures = samples.pictures if modality == "image_text" else None
    if (pictures or samples).skipped:  # it says whether the result is PARTIAL
        identity["max_skipped"] = dataset.max_skipped
    return identity


def inputs_identity(
    config: SweepConfig,
    dataset: DatasetConfig,
    patterns: PatternsIdentity | None,
    modality: Modality,
    checkpoint: CheckpointIdentity,
    samples: SamplesIdentity,
) -> dict[str, Any]:
    """Return all that decides what a pass runs on: the model, its parts, and the samples."""
    model = config.model
    dequantized = checkpoint.quantization
    return {
        **({"dequantized": dequantized} if dequantized is not None else {}),
        "checkpoint": checkpoint.digest,
        "tokenizer": checkpoint.tokenizer_digest,
        "dtype": model.dtype,
        "trust_remote_code": model.trust_remote_code,
        "vision_patterns": patterns.vision if patterns else model.vision_patterns,
        "head_patterns": patterns.head if patterns else model.head_patterns,
        "sizes": dict(sorted(dataset.sizes.items())),
        "calib_seq_len": dataset.calib_seq_len,
        **_samples_identity(dataset, modality, checkpoint, samples),
    }


def _samples_identity(
    dataset: DatasetConfig,
    modality: Modality,
    checkpoint: CheckpointIdentity,
    samples: SamplesIdentity,
) -> dict[str, Any]:
    """Return all that decides what the samples are, as the model reads them."""
    identity: dict[str, Any] = {"modality": modality, "samples": samples.digest}
    if samples.kind != "caption":
        identity["kind"] = samples.kind
    if samples.kind in CONVERSATIONS:
        identity["loss"] = dataset.loss
        if dataset.turns == "each":
            identity["turns"] = "each"
    if modality == "image_text":
        identity |= {
            "pictures": samples.pictures.digest if samples.pictures else None,
            "processor": checkpoint.processor_digest,
            "max_pixels": dataset.max_pixels,
            "prompt": dataset.prompt,
        }
    return identity


def _pair(pair: PairConfig, coverage: Coverage) -> dict[str, Any]:
    names = (
        {"all_layers_scheme": pair.all_layers_scheme, "all_layers_run_dir": pair.all_layers_run_dir}
        if coverage == "all_layers"
        else {"scheme": pair.scheme, "run_dir": pair.run_dir}
    )
    return {
        "name": pair.name,
        "weight": pair.weight,
        "activation": pair.activation,
        "format": pair.format,
        "weight_quantizer": _quantizer(pair.weight_quantizer),
        "input_quantizer": None
        if pair.input_quantizer is None
        else _quantizer(pair.input_quantizer),
        "algorithm": pair.algorithm,
        "effective_bits": pair.effective_bits,
        "experimental": pair.experimental,
        **names,
    }


def _quantizer(quantizer: QuantizerConfig) -> dict[str, Any]:
    return {
        "axis": quantizer.axis,
        "block_sizes": quantizer.block_sizes,
        "type": quantizer.type,
        "num_bits": quantizer.num_bits,
        **({"reference": quantizer.reference} if quantizer.by_compressed_tensors else {}),
        **({} if quantizer.symmetric else {"symmetric": False}),
    }


def _crosses_rows(quantizer: QuantizerConfig) -> bool:
    """Return whether some scale of a weight is shared by parts of several rows."""
    return any(axis != 0 for axis in quantizer.axes()) or any(
        axis != -1 for axis in quantizer.sizes()
    )


def _matched(names: Collection[str], patterns: tuple[str, ...]) -> set[str]:
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
