"""What a pass runs on: the model, and the samples of one modality. Imports torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qsens.cells import CalibrationSet, CellSpec
from qsens.checkpoint.groups import Group, find_groups
from qsens.checkpoint.loading import has_tied_head, load_model, load_tokenizer, resolve_device
from qsens.checkpoint.quantized import shapes
from qsens.checkpoint.unused import left_alone_notices, unused_notices
from qsens.checksums import digest_of
from qsens.config import DatasetConfig
from qsens.config.models import CONVERSATIONS, Modality
from qsens.data.captions import samples_of
from qsens.data.chat import chat_samples, conversation_chat_samples, load_processor
from qsens.data.images import PictureReader, Pixels
from qsens.data.records import Record
from qsens.data.samples import Samples, refuse_unknown_tokens
from qsens.data.text import text_samples
from qsens.engine.candidates import Request
from qsens.engine.placement import require_room
from qsens.engine.scores import Progress
from qsens.engine.scoring_pass import place
from qsens.errors import UserError
from qsens.grid import Plan
from qsens.pipeline.plan import identify_checkpoint
from qsens.pipeline.stored_amax import size_of
from qsens.schema.manifest import Dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A model with its tokenizer.

    Attributes:
        model: The model, on its device.
        tokenizer: The tokenizer.
        device: The device.
        seconds: What loading took.
        notices: What a reader should know about the checkpoint.
    """

    model: nn.Module
    tokenizer: Any
    device: torch.device
    seconds: float
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Loaded:
    """A model with samples.

    Attributes:
        model: The model, on its device.
        samples: The samples, of one modality.
        device: The device.
        seconds: What loading took, the model included.
        notices: What a reader should know about the checkpoint.
    """

    model: nn.Module
    samples: Samples
    device: torch.device
    seconds: float
    notices: tuple[str, ...]


def load_checkpoint(
    plan: Plan, progress: Progress, *, whole: bool = False, rank: int | None = None
) -> Checkpoint:
    """Load the model of ``plan``.

    Args:
        plan: The plan.
        progress: Called as work goes on.
        whole: Whether all of it has to be on the device, as ModelOpt needs it.
        rank: Which of several devices it is for; none where one is all that is used.

    Raises:
        UserError: It cannot be loaded, or is not what it was when the sweep was planned.
    """
    config = plan.config
    device = resolve_device(config.autoquant.device)
    if rank is not None and device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    progress("load", 0, 1)
    started = time.monotonic()
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, device, plan.results, move=False)
    _check_identity(plan, model)
    if whole:
        require_room(model, device, config.autoquant.memory_gb)
        model.to(device)
    else:
        requests = [request_of(cell, one) for cell in plan.cells for one in cell.sets]
        groups = groups_of(plan, widest(plan.cells, plan.cells[0]), model)
        place(model, groups, requests, config.autoquant, device)
    unused = unused_notices(model, shapes(config.model.path))
    unused += left_alone_notices(model)
    progress("load", 1, 1)
    for notice in unused:
        log.warning(notice)
    if device.type == "cpu" and config.model.dtype == "bfloat16":
        log.warning("bfloat16 on a CPU is slow: set model.dtype=float32 for work on a CPU")
    seconds = time.monotonic() - started
    return Checkpoint(model, tokenizer, device, seconds, (*plan.checkpoint.notices, *unused))


def processes_of(plan: Plan) -> int:
    """Return how many processes share the samples of a pass: one a device.

    Raises:
        UserError: There are not as many devices as are asked for.
    """
    asked, name = plan.config.autoquant.devices, plan.config.autoquant.device
    on_a_gpu = resolve_device(name).type == "cuda"
    there = torch.cuda.device_count() if on_a_gpu else 1
    if asked == "auto":
        return there
    if on_a_gpu and asked > there:
        raise UserError(
            f"asks for {asked} devices, of which {there} can be seen",
            where="autoquant.devices",
            remedy="Set autoquant.devices=auto, or make more of them visible.",
        )
    return asked


def _check_identity(plan: Plan, model: nn.Module) -> None:
    """Refuse a model whose files are not those of the plan, or whose head the plan got wrong."""
    config, planned = plan.config.model, plan.checkpoint
    # A plan may outlive the results that it was made for.
    there = identify_checkpoint(config, plan.results if plan.results.is_dir() else None)
    if (there.digest, there.tokenizer_digest) != (planned.digest, planned.tokenizer_digest):
        raise UserError(
            "the checkpoint is not that of the plan: its files were changed, added or removed",
            where=f"model.path = {config.path}",
            remedy="Plan the sweep again.",
        )
    tied = has_tied_head(model)
    if planned.tied_head not in (None, tied):
        raise UserError(
            f"the head is {'' if tied else 'not '}tied to the embedding as it is loaded, and the "
            f"files with config.json say that it is {'not' if tied else 'so'}",
            where=f"model.path = {config.path}",
            remedy=f'Write "tie_word_embeddings": {str(tied).lower()} into its config.json.',
        )


def with_samples(plan: Plan, cell: CellSpec, checkpoint: Checkpoint) -> Loaded:
    """Return the model with the samples of ``cell``.

    Those of several data sets follow one another, the samples that are scored first.

    Raises:
        UserError: The samples cannot be read, or their pictures are not those of the plan.
    """
    read = [with_set(plan, one, checkpoint) for one in cell.sets]
    if len(read) == 1:
        return read[0]
    sets = list(zip(cell.sets, (loaded.samples for loaded in read), strict=True))
    parts = [samples.part(0, one.scored) for one, samples in sets]
    parts += [samples.part(one.scored) for one, samples in sets]
    return Loaded(
        checkpoint.model,
        Samples.joined(parts),
        checkpoint.device,
        sum(loaded.seconds for loaded in read) - (len(read) - 1) * checkpoint.seconds,
        tuple(dict.fromkeys(notice for loaded in read for notice in loaded.notices)),
    )


def with_set(plan: Plan, one: CalibrationSet, checkpoint: Checkpoint) -> Loaded:
    """Return the model with the samples of one data set.

    Raises:
        UserError: The samples cannot be read, or their pictures are not those of the plan.
    """
    started = time.monotonic()
    records = samples_of(one)
    if one.modality == "image_text":
        reader = PictureReader.of(plan, one.dataset)
        if reader.identify(records) != one.samples.pictures:
            raise UserError(
                "the pictures are not those of the plan: some were changed, added or removed",
                where=f"dataset.images = {reader.root}",
                remedy="Plan the sweep again.",
            )
    samples = read_as(one.modality, records, plan, one.dataset, checkpoint)
    seconds = checkpoint.seconds + time.monotonic() - started
    notices = (*checkpoint.notices, *samples.notices)
    return Loaded(checkpoint.model, samples, checkpoint.device, seconds, notices)


def load_whole(plan: Plan, cell: CellSpec, progress: Progress) -> Loaded:
    """Load the model, all of it on the device, and the samples of ``cell``."""
    return with_samples(plan, cell, load_checkpoint(plan, progress, whole=True))


def read_as(
    modality: Modality,
    records: Sequence[Record],
    plan: Plan,
    dataset: DatasetConfig,
    checkpoint: Checkpoint,
) -> Samples:
    """Return records as the model reads them; one whose picture cannot be used is left out.

    Args:
        modality: ``text``, the captions alone, or ``image_text``.
        records: The records.
        plan: The plan.
        dataset: Their data set, which says how long a sample is and where pictures lie.
        checkpoint: The model with its tokenizer.

    Raises:
        UserError: The checkpoint's tokenizer or processor cannot make samples of them, or makes
            tokens that its embedding does not have.
    """
    samples = _read_as(modality, records, plan, dataset, checkpoint)
    embedding = checkpoint.model.get_input_embeddings()  # type: ignore[operator]
    refuse_unknown_tokens(samples, embedding.weight.shape[0])
    return samples


def _read_as(
    modality: Modality,
    records: Sequence[Record],
    plan: Plan,
    dataset: DatasetConfig,
    checkpoint: Checkpoint,
) -> Samples:
    config = plan.config
    records = [record for record in records if not record.fault]
    if modality == "text":
        alone = [record for record in records if not record.needs_pictures]
        return text_samples(alone, checkpoint.tokenizer, dataset)
    reader = PictureReader.of(plan, dataset)
    pictures = [(record, [reader.read(image) for image in record.images]) for record in records]
    kept = [(record, shown) for record, read in pictures if (shown := _whole(read))]
    processor = load_processor(config.model, checkpoint.tokenizer)
    common: dict[str, Any] = {
        "resize": reader.resolution.unit == 1,
        "longest": dataset.calib_seq_len,
        "dtype": getattr(torch, config.model.dtype),
    }
    settings = checkpoint.model.config
    conversations = [one.conversation for one, _ in kept if one.conversation is not None]
    usable = [shown for _, shown in kept]
    if conversations:
        return conversation_chat_samples(conversations, usable, processor, settings, **common)
    return chat_samples(
        [pixels for (pixels,) in usable],
        [record.caption for record, _ in kept],
        processor,
        settings,
        prompt=dataset.prompt,
        **common,
    )


def _whole(read: Sequence[Pixels | None]) -> list[Pixels]:
    """Return pictures where all of them can be used; none otherwise."""
    usable = [pixels for pixels in read if pixels is not None]
    return usable if len(usable) == len(read) else []


def together(datasets: Sequence[Dataset]) -> Dataset:
    """Return what a manifest says of the samples of several data sets, scored together."""
    first = datasets[0]

    def total(key: str) -> int:
        return sum(getattr(one, key) or 0 for one in datasets)

    def common(key: str) -> Any:
        values = {getattr(one, key) for one in datasets}
        return values.pop() if len(values) == 1 else None

    return Dataset(
        name="+".join(one.name for one in datasets),
        path=", ".join(one.path for one in datasets),
        digest=digest_of([one.digest for one in datasets]),
        modality=first.modality,
        size=first.size,
        samples_asked=total("samples_asked"),
        samples_used=total("samples_used"),
        samples_scored=total("samples_scored"),
        tokens=total("tokens"),
        label_tokens=total("label_tokens"),
        padding_share=first.padding_share,
        truncated=total("truncated"),
        calib_seq_len=max(one.calib_seq_len or 0 for one in datasets),
        records=common("records"),
        loss=common("loss"),
        turns=common("turns"),
        pictures_digest=digest_of([one.pictures_digest for one in datasets])
        if first.pictures_digest
        else None,
        skipped=total("skipped"),
        patches=total("patches") if first.patches is not None else None,
        max_pixels=common("max_pixels"),
        prompt=common("prompt"),
        domains=list(datasets),
    )


def groups_of(plan: Plan, cell: CellSpec, model: nn.Module) -> list[Group]:
    """Return the groups of ``model``, covered as ``cell`` says."""
    return find_groups(
        model, plan.config.model.vision_patterns, all_layers=cell.coverage == "all_layers"
    )


def widest(cells: Sequence[CellSpec], like: CellSpec) -> CellSpec:
    """Return the cell that covers most of those with the modality of ``like``."""
    alike = [cell for cell in cells if cell.modality == like.modality]
    return next((cell for cell in alike if cell.coverage == "all_layers"), like)


def request_of(cell: CellSpec, one: CalibrationSet | None = None) -> Request:
    """Return what ``cell`` asks of a pass over one of its data sets; over all when not given."""
    pair = cell.precision
    return Request(
        cell=cell.cell,
        weight=pair.weight_quantizer.cfg(),
        input=pair.input_quantizer.cfg() if pair.input_quantizer else None,
        calibrated=size_of(cell),
        scored=(one or cell).scored,
    )


def dataset_of(one: CalibrationSet, samples: Samples, padding_share: float) -> Dataset:
    """Return what a manifest says of the samples of a data set."""
    config = one.dataset
    used, scored = one.used, one.scored
    pictures = one.pictures
    return Dataset(
        name=config.name,
        path=", ".join(map(str, one.samples.paths)),
        digest=one.samples.digest,
        modality=one.modality,
        size=one.size,
        samples_asked=one.asked,
        samples_used=used,
        samples_scored=scored,
        tokens=samples.tokens(used),
        label_tokens=sum(samples.labels(scored)),
        padding_share=padding_share,
        truncated=sum(samples.truncated[:used]),
        calib_seq_len=config.calib_seq_len,
        records=one.samples.kind,
        loss=("assistant" if pictures else config.loss)
        if one.samples.kind in CONVERSATIONS
        else None,
        turns="each" if one.samples.kind in CONVERSATIONS and config.turns == "each" else None,
        pictures_digest=pictures.digest if pictures else None,
        skipped=len(one.skipped),
        patches=samples.patches(used) if pictures else None,
        max_pixels=config.max_pixels if pictures else None,
        prompt=config.prompt if pictures else None,
    )
