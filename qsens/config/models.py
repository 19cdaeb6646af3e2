"""Pydantic models of everything a user can set; a field's docstring gives meaning and unit."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Field, PlainValidator, field_serializer, model_validator

from qsens.config.base import Frozen, Name
from qsens.config.dag import DagConfig
from qsens.config.pairs import GranularityConfig, PairConfig

Size = Literal["small", "medium", "large"]
SIZES: tuple[Size, ...] = ("small", "medium", "large")
Coverage = Literal["lm_only", "all_layers"]
COVERAGES: tuple[Coverage, ...] = ("lm_only", "all_layers")
Modality = Literal["text", "image_text"]
# What a record of a sample file is.
RecordKind = Literal["caption", "text", "messages", "sharegpt", "completion"]
CONVERSATIONS: tuple[RecordKind, ...] = ("messages", "sharegpt", "completion")
_TOKENS = re.compile(r"(\d{1,9}(?:\.\d{1,3})?) ?([kKmM]?) ?tokens")
_MOST_SAMPLES = 1_000_000


def _read_count(given: Any) -> int | str:
    """Return how many samples, or how many tokens, a size has."""
    text = str(given).strip()
    if isinstance(given, int | str) and not isinstance(given, bool):
        if re.fullmatch(r"\d{1,9}", text) and 1 <= int(text) <= _MOST_SAMPLES:
            return int(text)
        if (match := _TOKENS.fullmatch(text)) and float(match[1]) > 0:
            return text
    raise ValueError(
        f"neither a number of samples, 1 to {_MOST_SAMPLES}, nor of tokens, such as '64k tokens'"
    )


def _read_devices(given: Any) -> int | Literal["auto"]:
    """Return how many devices are used, or that all are."""
    text = str(given).strip()
    if text == "auto":
        return "auto"
    if re.fullmatch(r"\d{1,2}", text) and not isinstance(given, bool) and 1 <= int(text) <= 64:
        return int(text)
    raise ValueError("neither a number of devices, 1 to 64, nor auto")


def _read_files(given: Any) -> str | tuple[str, ...]:
    """Return the name of a file, or several."""
    names = (given,) if isinstance(given, str) else given
    if isinstance(names, list | tuple) and names and all(isinstance(n, str) and n for n in names):
        return names[0] if isinstance(given, str) else tuple(names)
    raise ValueError("neither a file's name or pattern, nor a list of them")


Count: TypeAlias = Annotated[int | str, PlainValidator(_read_count)]
"""Samples, or tokens: ``64k tokens``."""
Devices: TypeAlias = Annotated[int | Literal["auto"], PlainValidator(_read_devices)]
"""How many devices."""
Files: TypeAlias = Annotated[str | tuple[str, ...], PlainValidator(_read_files)]
"""A file's name or pattern, or several."""
# Suffixes of sample files, in any case: captions alone, and those of records.
TEXT = (".txt",)
JSONL = (".jsonl", ".ndjson")
JSON = (".json",)
SQLITE = (".sqlite", ".sqlite3", ".db")
PARQUET = (".parquet",)
# Records may be compressed.
GZIP = ".gz"


def has_suffix(file: PurePath | str, suffixes: tuple[str, ...]) -> bool:
    """Return whether a file's name ends in one of ``suffixes``, in any case."""
    return PurePath(file).suffix.lower() in suffixes


def uncompressed(file: PurePath | str) -> str:
    """Return a file's name in lower case, as it is once it is unpacked."""
    return PurePath(file).name.lower().removesuffix(GZIP)


def tokens_of(count: int | str) -> int | None:
    """Return how many tokens ``64k tokens`` are; none for a number of samples."""
    if isinstance(count, int):
        return None
    number, unit = _TOKENS.fullmatch(count).groups()  # type: ignore[union-attr]
    return round(float(number) * {"": 1, "k": 1 << 10, "m": 1 << 20}[unit.lower()])


def _words(value: Any) -> str:
    """Return a value as messages show it."""
    return ", ".join(value) if isinstance(value, tuple) else str(value)


class HubConfig(Frozen):
    """Where ``qsens fetch-model`` gets a checkpoint; no number depends on it."""

    repository: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")] | None = (
        None
    )
    """Its repository on the hub, ``owner/name``; null for a checkpoint that is no hub's."""
    revision: str = Field(default="main", min_length=1)
    """Branch, tag or, so that nobody can change it, commit."""


class ModelConfig(Frozen):
    """The checkpoint under study; files under ``configs/model/``."""

    name: Name = "qwen3_vl_4b_instruct"
    """Directory of the model's results under ``models/``."""
    short_name: Name = "qwen3_vl_4b"
    """Short name, used by run directories whose published names are older than qsens."""
    path: Path = Path("models/qwen3_vl_4b_instruct/checkpoints/Qwen3-VL-4B-Instruct")
    """Local directory of the checkpoint: ``config.json``, tokenizer files, ``*.safetensors``."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Data type that the weights are loaded in; never chosen by the device."""
    trust_remote_code: bool = False
    """Whether Python code that lies in the checkpoint may run. Leave it off unless you read it."""
    language_patterns: tuple[str, ...] = ()
    """Module name patterns (fnmatch) of the language model's layers; from the family when empty."""
    vision_patterns: tuple[str, ...] = ()
    """The same of the vision tower and what projects its output; left unquantized by
    ``lm_only``."""
    head_patterns: tuple[str, ...] = ()
    """The same of the head, one module."""
    hub: HubConfig = HubConfig()
    """Where the checkpoint comes from."""


class DatasetConfig(Frozen):
    """Calibration samples; files under ``configs/dataset/``."""

    name: Name = "coco2017_captions"
    """Name of the data set, as manifests and reports state it."""
    modality: Modality = "text"
    """What ``lm_only`` reads: ``text``, the captions alone; ``image_text``, pictures with their
    captions. ``all_layers`` reads pictures always."""
    directory: Path = Path("datasets/vlm-quantize-calib")
    """Directory of the sample files."""
    files: dict[Size, Files] = Field(
        default={size: f"coco2017_captions_{size}.txt" for size in SIZES}, min_length=1
    )
    """One file a size, relative to ``directory``; each is the head of the next. A name may be a
    pattern, ``chat/*.jsonl``, or a list of names and patterns: such files follow one another, those
    of a pattern in the order of their names. One caption a line
    (``.txt``), a record a line (``.jsonl``) or in a list (``.json``), both compressed or not
    (``.gz``), a table of them (``.parquet``), or a table of captions (``.sqlite``), where sizes may
    share a file that has a split of each. A record is ``{"image": path, "caption": text}``,
    ``{"text": text}``, or a conversation: ``messages``, ``conversations``, or ``prompt`` with
    ``completion``."""
    format: Literal["auto", "caption", "text", "messages", "sharegpt", "completion"] = "auto"
    """What the records are; by the first one's keys when ``auto``."""
    loss: Literal["assistant", "all"] = "assistant"
    """Which tokens of a conversation are labels: those of the assistant's turns, or all."""
    turns: Literal["together", "each"] = "together"
    """A conversation is one sample (``together``), or each answer is, behind what came before it
    (``each``): for templates that write earlier turns otherwise once others follow."""
    sizes: dict[Size, Count] = Field(
        default={"small": 16, "medium": 128, "large": 512}, min_length=1
    )
    """Samples (lines) of each size, strictly growing from small to large; or tokens, ``64k tokens``
    (65,536): the first samples that have as many together."""
    size: tuple[Size, ...] = Field(default=SIZES, min_length=1)
    """Sizes to sweep."""
    max_calib_samples: Annotated[int, Field(ge=1)] | None = None
    """Upper limit of samples at every size; what falls short of its size is PARTIAL."""
    calib_seq_len: int = Field(default=512, ge=2, le=1_048_576)
    """Longest sample, in tokens; what is longer is cut, but never within a picture."""
    images: Path | None = None
    """Directory that the paths of pictures start at and never leave; ``directory`` when null."""
    max_pixels: int = Field(default=512 * 512, ge=28 * 28, le=1 << 26)
    """Pixels of a picture at most, as the model sees it; a larger one is made smaller."""
    max_skipped: float = Field(default=0.02, ge=0, le=1)
    """Share of a size's pictures that may be skipped, 0 to 1; beyond it, the size is PARTIAL."""
    prompt: str = Field(default="Describe this image.", min_length=1)
    """What the user says beside the picture; the caption is the answer."""

    @model_validator(mode="after")
    def _sizes_are_ordered(self) -> Self:
        specs = [self.sizes[size] for size in SIZES if size in self.sizes]
        samples = [one for one in specs if isinstance(one, int)]
        tokens = [count for one in specs if (count := tokens_of(one)) is not None]
        if any(a >= b for of_unit in (samples, tokens) for a, b in itertools.pairwise(of_unit)):
            raise ValueError(
                f"sizes out of order: {self.sizes}; they must grow strictly "
                "from small over medium to large, since each is the head of the next"
            )
        if len(set(self.size)) != len(self.size):
            raise ValueError(f"size names one size twice: {', '.join(self.size)}")
        if list(self.size) != sorted(self.size, key=SIZES.index):
            raise ValueError(
                f"size out of order: {', '.join(self.size)}; give them as {', '.join(SIZES)}"
            )
        for size in self.size:
            if size not in self.sizes or size not in self.files:
                raise ValueError(f"size '{size}' has no entry in both 'sizes' and 'files'")
        return self

    def read_as(self, coverage: Coverage) -> Modality:
        """Return what a sample is at ``coverage``."""
        return "image_text" if coverage == "all_layers" else self.modality

    def names(self, size: Size) -> tuple[str, ...]:
        """Return the names and patterns of the files of ``size``."""
        names = self.files[size]
        return (names,) if isinstance(names, str) else names

    def paths(self, size: Size) -> tuple[Path, ...]:
        """Return the sample files of ``size``, in order; a pattern stands for what is there now."""
        found: list[Path] = []
        for name in self.names(size):
            path = self.directory / name
            if glob.has_magic(name) and not path.exists():
                found += [Path(each) for each in sorted(glob.glob(str(path)))]
            else:
                found.append(path)
        return tuple(found)

    def images_root(self) -> Path:
        """Return the directory that the paths of pictures start at."""
        return self.images or self.directory


class AutoquantConfig(Frozen):
    """How layers are scored."""

    method: Literal["gradient", "fisher", "kl_div"] = "gradient"
    """The score: ``gradient``, ModelOpt's proxy; ``fisher``, an estimate of the KL divergence in
    nats from drawn labels, at about twice its price; ``kl_div``, the true KL divergence of one
    group quantized at a time, far slower."""
    draws: int = Field(default=8, ge=2, le=256)
    """Draws of labels for ``fisher``, each a backward pass."""
    audit: Literal["none", "sample", "full"] = "none"
    """Whether the true KL divergence is measured beside the scores, and how far they can be
    trusted: of twelve groups a pair (``sample``), or of all."""
    engine: Literal["fused", "modelopt"] = "fused"
    """What computes it: ``fused``, all cells in one pass; ``modelopt``, the reference: one
    ``mtq.auto_quantize`` a cell."""
    effective_bits: float = Field(default=8.0, gt=0, le=16)
    """Target of the search, in bits a weight, over what may be quantized."""
    score_size: int = Field(default=128, ge=1)
    """Samples that are scored at most; calibration uses all of a size."""
    batch_size: int = Field(default=8, ge=1, le=4096)
    """Samples of a nominal batch, which the score is normalised by."""
    memory_gb: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """GiB of the device that a pass may take, weights included; from what is free when null, on a
    CPU what the host has available within the container's limit. Where the weights do not fit,
    they stay in host memory, and the device holds two layers at a time."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """``auto`` (the first GPU, else the CPU), ``cpu``, ``cuda``, ``cuda:N``."""
    devices: Devices = 1
    """Devices of this host that share the samples of a pass, a process each; ``auto``, all GPUs
    that are visible. No number depends on it."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of all that is drawn at random."""

    @model_validator(mode="after")
    def _several_devices_are_none_by_name(self) -> Self:
        if self.devices != 1 and ":" in self.device:
            raise ValueError(f"device={self.device} is one: leave it out, or set devices=1")
        if self.devices != 1 and self.engine == "modelopt":
            raise ValueError("engine=modelopt runs on one device: set devices=1")
        return self

    @model_validator(mode="after")
    def _the_engine_knows_the_method(self) -> Self:
        if self.engine == "modelopt" and self.method == "fisher":
            raise ValueError("engine=modelopt has no method 'fisher': use engine=fused")
        if self.method == "kl_div" and self.audit != "none":
            raise ValueError("method=kl_div is the truth itself: audit=none")
        return self


class RunnerConfig(Frozen):
    """How a run behaves."""

    report_only: bool = False
    """Publish from the results that exist; compute nothing."""
    output_dir: Path | None = None
    """Directory of the results, before any layout; one directory a cell below it if several."""
    force: bool = False
    """Compute again what is there already, as new results."""


def _listed(given: Any) -> Any:
    """Return sections as a list where they are one alone, as files and older plans have it."""
    return given if isinstance(given, list | tuple) else (given,)


class SweepConfig(Frozen):
    """A sweep: presets under ``configs/sweep/``, overridden by dotted keys."""

    preset: Name = "single"
    """Name of the sweep file that this started from."""
    model: ModelConfig = ModelConfig()
    """The checkpoint."""
    dataset: Annotated[tuple[DatasetConfig, ...], BeforeValidator(_listed)] = Field(
        default=(DatasetConfig(),), min_length=1
    )
    """The calibration samples: one data set, or several, each scored apart and all together. A key
    below it, ``dataset.size``, is that of all of them."""
    quant_pair: tuple[PairConfig, ...] = Field(default=(), min_length=1)
    """Precision pairs to sweep."""
    quant_granularity: tuple[GranularityConfig, ...] = Field(
        default=(GranularityConfig(),), min_length=1
    )
    """Granularities to sweep."""
    pairings: dict[Name, tuple[Name, ...]] = {}
    """Granularities of each pair, where some pair was named with its own:
    ``quant_pair=wint8_aint8-ct_token``. Empty, every pair gets every granularity."""
    coverage: tuple[Coverage, ...] = Field(default=("lm_only",), min_length=1)
    """Which part of the model may be quantized: ``lm_only``, the language model and its head;
    ``all_layers``, the vision tower as well, scored on pictures with captions."""
    autoquant: AutoquantConfig = AutoquantConfig()
    """How layers are scored."""
    runner: RunnerConfig = RunnerConfig()
    """How the run behaves."""
    dag: DagConfig = DagConfig()
    """What the Airflow DAG takes from here."""
    output_layout: Literal["tmp", "publish"] = "publish"
    """Where results go: ``tmp/<sweep id>/`` or the model's ``layer-analysis/``."""

    @field_serializer("dataset", mode="wrap")
    def _one_stands_alone(self, datasets: tuple[DatasetConfig, ...], dump: Any) -> Any:
        dumped = dump(datasets)
        return dumped[0] if len(datasets) == 1 else dumped

    @model_validator(mode="after")
    def _axes_name_each_value_once(self) -> Self:
        axes: dict[str, list[str]] = {
            "quant_pair": [pair.name for pair in self.quant_pair],
            "quant_granularity": [granularity.name for granularity in self.quant_granularity],
            "coverage": list(self.coverage),
            "dataset": [dataset.name for dataset in self.dataset],
        }
        for pair, granularities in self.pairings.items():
            axes[f"quant_pair {pair}"] = list(granularities)
        for axis, names in axes.items():
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{axis} names {', '.join(twice)} twice")
        return self

    @model_validator(mode="after")
    def _pairings_are_of_what_it_names(self) -> Self:
        known = {granularity.name for granularity in self.quant_granularity}
        named = {name for own in self.pairings.values() for name in own}
        pairs = {pair.name for pair in self.quant_pair}
        if self.pairings and (self.pairings.keys() != pairs or named - known):
            raise ValueError(
                "names other pairs or granularities than the sweep has: leave it to the names in "
                "quant_pair, such as wint8_aint8-ct_token"
            )
        return self

    @model_validator(mode="after")
    def _pictures_have_a_file(self) -> Self:
        for coverage, dataset in itertools.product(self.coverage, self.dataset):
            if dataset.read_as(coverage) == "text":
                continue
            named = [(size, file) for size in dataset.size for file in dataset.names(size)]
            for size, file in named:
                if not has_suffix(uncompressed(file), (*JSONL, *JSON, *PARQUET, *SQLITE)):
                    raise ValueError(
                        f"coverage {coverage} reads pictures, and dataset.files.{size} = {file} "
                        "names none; choose a data set of .jsonl or .sqlite files"
                    )
                if tokens_of(dataset.sizes[size]) is not None:
                    raise ValueError(
                        f"coverage {coverage} reads pictures, and dataset.sizes.{size} counts "
                        "tokens, which are known of text alone; give a number of samples"
                    )
        return self

    @model_validator(mode="after")
    def _the_engine_knows_the_formats(self) -> Self:
        for pair, granularity in self.formats if self.autoquant.engine == "modelopt" else ():
            made = pair.with_granularity(granularity)
            if not made.by_modelopt:
                raise ValueError(
                    f"engine=modelopt does not compute {made.format} of {pair.name}, whose "
                    "reference is compressed-tensors: use engine=fused"
                )
        return self

    @model_validator(mode="after")
    def _datasets_go_together(self) -> Self:
        first = self.dataset[0]
        for other in self.dataset[1:]:
            for key in ("size", "modality"):
                one, another = getattr(first, key), getattr(other, key)
                if one != another:
                    raise ValueError(
                        f"dataset.{key} is {_words(one)} of {first.name}, and {_words(another)} of "
                        f"{other.name}: data sets of one sweep share it"
                    )
        if len(self.dataset) > 1 and self.autoquant.engine == "modelopt":
            raise ValueError(
                "engine=modelopt calibrates on the samples that it scores, one data set: leave "
                "one, or use engine=fused"
            )
        return self

    def pairs_with(self, granularity: GranularityConfig) -> list[PairConfig]:
        """Return the pairs that are to have a granularity, those that it makes no sense for too."""
        return [pair for pair in self.quant_pair if self._pairs(pair, granularity)]

    def _pairs(self, pair: PairConfig, granularity: GranularityConfig) -> bool:
        return not self.pairings or granularity.name in self.pairings[pair.name]

    @property
    def formats(self) -> Iterator[tuple[PairConfig, GranularityConfig]]:
        """The pairs with the granularities of the sweep, one after the other."""
        for pair, granularity in itertools.product(self.quant_pair, self.quant_granularity):
            if self._pairs(pair, granularity) and pair.refusal(granularity) is None:
                yield pair, granularity

    def modality(self, coverage: Coverage) -> Modality:
        """Return what a sample is at ``coverage``, in all data sets."""
        return self.dataset[0].read_as(coverage)

    @property
    def domains(self) -> tuple[str | None, ...]:
        """Data sets that are scored apart; none stands for all of them, of one or several."""
        names = [dataset.name for dataset in self.dataset]
        return (*names, None) if len(names) > 1 else (None,)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Sizes to sweep, those of all data sets."""
        return self.dataset[0].size
