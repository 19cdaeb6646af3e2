"""The GPU steps of one cell: calibrate, score. Idempotent: *make sure that its result is there*."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qsens.errors import OutOfMemory, QsensError
from qsens.grid import Cell, Plan
from qsens.manifest import Dataset, dump_json
from qsens.store import MANIFEST, STATE, Store, write_directory, write_text

if TYPE_CHECKING:
    from qsens.engine.samples import Samples

Progress = Callable[[str, int, int], None]


def calibrate(plan: Plan, cell_id: str) -> dict[str, Any]:
    """Make sure that the calibration of a cell is there.

    ModelOpt calibrates inside ``mtq.auto_quantize``, so the reference engine has nothing to keep:
    its calibration is part of ``score``.
    """
    store, cell = Store(plan), plan.cell(cell_id)
    status = "done" if store.is_done(cell) else "with_score"
    return _outcome(store, cell, status, computed=False, seconds=0.0)


def score(
    plan: Plan, cell_id: str, *, progress: Progress | None = None, wait: bool = False
) -> dict[str, Any]:
    """Make sure that the result of a cell is there; a result that is costs no torch.

    Args:
        plan: The plan.
        cell_id: The cell.
        progress: Called with a phase, steps done, and steps in all.
        wait: Whether to wait for another process that computes the same result.

    Raises:
        TryAgain: Another process computes it, and ``wait`` is false; or the disk is full.
        UserError: It cannot be computed; the reason is kept for the reports.
        OutOfMemory: The device has not enough memory.
    """
    store, cell = Store(plan), plan.cell(cell_id)
    started = time.monotonic()
    if store.is_done(cell):
        return _outcome(store, cell, "done", computed=False, seconds=0.0)
    with store.lock(cell, wait=wait):
        if store.is_done(cell):
            return _outcome(store, cell, "done", computed=False, seconds=time.monotonic() - started)
        with _failure_is_kept(store, cell):
            _compute(store, cell, progress or (lambda phase, done, total: None))
    return _outcome(store, cell, "done", computed=True, seconds=time.monotonic() - started)


def failure_reason(store: Store, cell: Cell) -> str:
    """Return in words why ``cell`` has no result."""
    path = store.failure(cell)
    if not path.is_file():
        return "not computed"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["what"])
    except (ValueError, KeyError, OSError):
        return "failed; its reason cannot be read"


def _compute(store: Store, cell: Cell, progress: Progress) -> None:
    # The heavy imports: only a cell that has to be computed pays for them.
    from safetensors.torch import save_file

    from qsens.engine.captions import read_captions
    from qsens.engine.checkpoint import device_name, load_model, load_tokenizer, resolve_device
    from qsens.engine.reference import refuse_impossible, score_cell
    from qsens.engine.samples import tokenize
    from qsens.pipeline.result import build_manifest

    plan = store.plan
    config, pair = plan.config, plan.pair(cell)
    device = resolve_device(config.autoquant.device)
    refuse_impossible(pair, device)
    progress("load", 0, 1)
    started = time.monotonic()
    used, scored = plan.samples_used(cell), plan.samples_scored(cell)
    captions = read_captions(plan.samples[cell.size].path)[:used]
    samples = tokenize(captions, load_tokenizer(config.model), longest=config.dataset.calib_seq_len)
    model = load_model(config.model, device)
    loaded = time.monotonic() - started
    progress("load", 1, 1)
    scores = score_cell(
        model,
        samples,
        pair,
        disabled=config.model.vision_patterns,
        sizes=list(config.dataset.sizes.values()),
        scored=scored,
        batch_size=config.autoquant.batch_size,
        progress=progress,
    )
    manifest = build_manifest(
        plan,
        cell,
        scores,
        dataset=_dataset(plan, cell, samples, scores.padding_share),
        device=device_name(device),
        timings={"load": loaded, **scores.timings},
    )
    with write_directory(store.result_dir(cell), last=MANIFEST) as directory:
        save_file(dict(scores.tensors), directory / STATE, metadata={"cell": cell.cell})
        text = dump_json(manifest.model_dump(mode="json"))
        (directory / MANIFEST).write_text(text, encoding="utf-8")


def _dataset(plan: Plan, cell: Cell, samples: Samples, padding_share: float) -> Dataset:
    config = plan.config.dataset
    scored = plan.samples_scored(cell)
    return Dataset(
        name=config.name,
        path=str(plan.samples[cell.size].path),
        digest=plan.samples[cell.size].digest,
        modality=cell.modality,
        size=cell.size,
        samples_asked=config.asked(cell.size),
        samples_used=len(samples),
        samples_scored=scored,
        tokens=samples.tokens(),
        label_tokens=sum(samples.labels(scored)),
        padding_share=padding_share,
        truncated=sum(samples.truncated),
        calib_seq_len=config.calib_seq_len,
    )


@contextmanager
def _failure_is_kept(store: Store, cell: Cell) -> Iterator[None]:
    """Keep the reason of a failure for the reports; a later success takes it away."""
    try:
        yield
    except Exception as error:
        failure = _out_of_memory(error, cell) or error
        described = (
            failure.as_dict()
            if isinstance(failure, QsensError)
            else {"error": type(error).__name__, "what": f"{type(error).__name__}: {error}"}
        )
        write_text(store.failure(cell), dump_json(described))
        if failure is not error:
            raise failure from error
        raise
    store.failure(cell).unlink(missing_ok=True)


def _out_of_memory(error: Exception, cell: Cell) -> OutOfMemory | None:
    import torch

    if not isinstance(error, torch.OutOfMemoryError | MemoryError):
        return None
    return OutOfMemory(
        f"out of memory: {str(error).splitlines()[0] if str(error) else 'the host has none left'}",
        where=cell.cell,
        remedy="Set a smaller autoquant.batch_size, or use a device with more memory.",
    )


def _outcome(
    store: Store, cell: Cell, status: str, *, computed: bool, seconds: float
) -> dict[str, Any]:
    manifest = store.manifest(cell)
    return {
        "cell": cell.cell,
        "status": status,
        "manifest": str(manifest) if manifest.is_file() else None,
        "seconds": round(seconds, 3),
        "computed": computed,
    }
