"""Where results lie, and what is done already.

A result lives once at ``<results>/.cells/<cell digest>/`` and is never overwritten; publishing
copies it into the layout. The manifest is written last: a directory without one is no result. What
cannot be read, or is not what was written, is none either: it is set aside and computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from qsens.cells import Cell, CellSpec
from qsens.checksums import check_tensors
from qsens.documents import dump_document
from qsens.errors import Damaged
from qsens.grid import Plan
from qsens.locks import held, lock_at
from qsens.reading import has_file
from qsens.results import AGAIN, MANIFEST, STATE, read_result
from qsens.schema.manifest import MANIFEST_SUFFIX, STATE_SUFFIX, Manifest
from qsens.writing import make_directory, write_directory, writing

# Below the results root, each by digest.
CELLS = ".cells"
CALIBRATIONS = ".calibrations"
AUDITS = ".audits"
VERIFIED = ".verified"
PICTURES = ".pictures"
INSPECTIONS = ".inspections"
# Below it by sweep or run: what is not published under a model, and plans of Airflow's runs.
TMP = "tmp"
PLANS = ".plans"
MODELS = "models"
CHECKPOINTS = "checkpoints"
# Below a model's directory, and below that.
ANALYSIS = "layer-analysis"
SWEEPS = "sweeps"
ASSETS = "assets"
# In a sweep's directory; a page of that name is also in a model's.
PLAN = "plan.json"
SUMMARY = "summary.json"
PAGE = "index.html"
# Where damaged files are set aside, by who found them; `prune` takes them away in time.
ASIDE = ".damaged"
_PUBLISHING = ".publish.lock"
FAILED = ".failed.json"
_STORED = {"cells": "result", "calibrations": "calibration", "audits": "audit"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Store:
    """The directories of one plan.

    Attributes:
        plan: The plan whose results these are.
    """

    plan: Plan

    def result_dir(self, cell: Cell) -> Path:
        """Return where the result of ``cell`` lives, whether it is there or not."""
        return self.plan.results / CELLS / cell.digest

    def manifest(self, cell: Cell) -> Path:
        """Return where the manifest of ``cell`` lives, whether it is there or not."""
        return self.result_dir(cell) / MANIFEST

    def state(self, cell: Cell) -> Path:
        """Return where the tensors of ``cell`` live, whether they are there or not."""
        return self.result_dir(cell) / STATE

    def calibration(self, digest: str) -> Path:
        """Return where the calibrated amax of that digest live."""
        return self.plan.results / CALIBRATIONS / f"{digest}.safetensors"

    def failure(self, cell: Cell) -> Path:
        """Return where the reason is kept why ``cell`` could not be computed."""
        return self.plan.results / CELLS / f"{cell.digest}{FAILED}"

    def audit(self, cell: Cell) -> Path:
        """Return where the audit of the scores of ``cell`` lives, whether it is there or not."""
        return self.plan.results / AUDITS / f"{cell.digest}.json"

    def result(self, cell: Cell) -> Manifest | None:
        """Return the manifest of the result of ``cell``, checked; none where there is none.

        Raises:
            Damaged: The result is not what was written, or that of another cell.
            UserError: A newer qsens wrote it.
        """
        directory = self.result_dir(cell)
        there = has_file(directory / MANIFEST, remedy=AGAIN, error=Damaged)
        return read_result(directory) if there else None

    def is_done(self, cell: Cell) -> bool:
        """Return whether the result of ``cell`` is there, as it was written.

        Raises:
            UserError: A newer qsens wrote it.
        """
        try:
            return self.result(cell) is not None
        except Damaged:
            return False

    def is_calibrated(self, digest: str) -> bool:
        """Return whether the calibrated amax of that digest are there, as they were written."""
        path = self.calibration(digest)
        return has_file(path, remedy=AGAIN) and check_tensors(path, digest) is None

    def write_result(self, cell: Cell, manifest: Manifest, state: bytes) -> None:
        """Write the result of ``cell``, whole or not at all; one that is there is kept.

        Args:
            cell: The cell.
            manifest: Its manifest; the digest of its state is filled in.
            state: Its tensors, a safetensors file.

        Raises:
            DiskFull: The disk is full; nothing is left behind.
            UserError: The results root cannot be written to.
        """
        digest = hashlib.sha256(state).hexdigest()
        text = dump_document(manifest.model_copy(update={"state_digest": digest}))
        path = self.result_dir(cell)
        with write_directory(
            path, last=MANIFEST, keep=lambda: not self.set_aside_result(cell)
        ) as directory:
            (directory / STATE).write_bytes(state)
            (directory / MANIFEST).write_text(text, encoding="utf-8")
        self.failure(cell).unlink(missing_ok=True)

    def set_aside_result(self, cell: Cell) -> bool:
        """Set the result of ``cell`` aside where it is damaged, its lock held; say whether it was.

        Raises:
            UserError: A newer qsens wrote it.
        """
        try:
            self.result(cell)
        except Damaged as error:
            self.set_aside(self.result_dir(cell), f"the result of {cell.cell}", error.what)
            return True
        return False

    def set_aside_calibration(self, digest: str) -> None:
        """Set calibrated amax aside where they are damaged, their lock held."""
        path = self.calibration(digest)
        reason = check_tensors(path, digest) if has_file(path, remedy=AGAIN) else None
        if reason is not None:
            self.set_aside(path, "calibrated amax", f"are damaged: {reason}")

    def set_aside(self, path: Path, what: str, reason: str) -> None:
        """Move a damaged file or directory away, so that it counts as not there, and say so."""
        kept = set_aside(path, self.plan.sweep_id)
        log.warning("%s: %s; set aside as %s", what, reason, kept)

    def damages(self) -> list[str]:
        """Return in words what this sweep has set aside."""
        cells = {cell.digest: f" of {cell.cell}" for cell in self.plan.cells}
        sentences: dict[str, None] = {}
        for path in sorted((self.plan.results / ASIDE / self.plan.sweep_id).glob("*")):
            kind, _, name = path.name.partition("-")
            of = cells.get(name.partition(".")[0], "") if kind != "calibrations" else ""
            what = "failure" if name.endswith(FAILED) else _STORED.get(kind, "file")
            words = f"the stored {what}{of} was damaged: it was set aside"
            sentences[words if what == "failure" else f"{words} and computed again"] = None
        return list(sentences)

    def model_dir(self) -> Path:
        """Return the directory of all that is published for the model."""
        config = self.plan.config
        if config.runner.output_dir is not None:
            return config.runner.output_dir
        if config.output_layout == "tmp":
            return self.plan.results / TMP / self.plan.sweep_id
        return self.plan.results / MODELS / config.model.name / ANALYSIS

    def sweep_dir(self) -> Path:
        """Return the directory of the sweep's own reports."""
        config = self.plan.config
        if config.runner.output_dir is not None or config.output_layout == "tmp":
            return self.model_dir()
        return self.model_dir() / SWEEPS / self.plan.sweep_id

    def cell_dir(self, cell: CellSpec) -> Path:
        """Return the directory that ``cell`` is published in."""
        config = self.plan.config
        if config.runner.output_dir is not None:
            alone = len(self.plan.cells) == 1
            return self.model_dir() if alone else self.model_dir() / cell.cell
        if config.output_layout == "tmp":
            return self.model_dir() / cell.cell
        pair = cell.precision
        directory = self.model_dir() / f"weight-{pair.weight}-act-{pair.activation}"
        if cell.granularity != "default":
            directory /= cell.granularity
        return directory / cell.run_dir

    def published(self, cell: CellSpec) -> dict[str, Path]:
        """Return where manifest and state of ``cell`` are published."""
        directory, scheme = self.cell_dir(cell), cell.scheme
        return {
            "manifest": directory / f"{scheme}{MANIFEST_SUFFIX}",
            "state": directory / f"{scheme}{STATE_SUFFIX}",
        }

    def lock(self, cell: Cell) -> FileLock:
        """Return the lock of the result of ``cell``; it dies with the process that holds it."""
        return lock_at(self.plan.results / CELLS / f"{cell.digest}.lock")

    def calibration_lock(self, digest: str) -> FileLock:
        """Return the lock of the calibrated amax of that digest."""
        return lock_at(self.plan.results / CALIBRATIONS / f"{digest}.lock")


def analyses(results: Path) -> Iterator[Path]:
    """Yield the directories of what is published of each model below a results root."""
    yield from sorted(results.glob(f"{MODELS}/*/{ANALYSIS}"))


@contextlib.contextmanager
def publishing(store: Store) -> Iterator[None]:
    """Wait until nobody publishes or prunes, and see that nobody begins to while this lasts.

    All that publish below one results root, or to one directory, wait for one another, and pruning
    for none of them: what is read here stays until it is published. Where the results root is
    read-only, nothing can be pruned there either.

    Raises:
        UserError: The directory cannot be published to, or its file system has no locks.
        DiskFull: The disk is full.
    """
    with contextlib.ExitStack() as locks:
        directories = [store.plan.results] if os.access(store.plan.results, os.W_OK) else []
        for directory in dict.fromkeys([*directories, store.model_dir()]):
            lock = publishing_lock(directory)
            locks.enter_context(held(lock, where=str(directory), wait=True))
        yield


def publishing_lock(directory: Path) -> FileLock:
    """Return the lock that whoever publishes from a results root, or to a directory, holds."""
    return lock_at(directory / _PUBLISHING)


def set_aside(path: Path, by: str) -> Path:
    """Move a damaged file or directory away, so that it counts as not there.

    Args:
        path: What is damaged, two levels below the results root.
        by: Who has found it.

    Returns:
        Where it is now.
    """
    directory = path.parent.parent / ASIDE / by
    make_directory(directory)
    stem = f"{path.parent.name.lstrip('.')}-{path.name}"
    names = (f"{stem}{f'.{count}' if count else ''}" for count in itertools.count())
    kept = next(one for one in map(directory.joinpath, names) if not one.exists())
    # Somebody else may have done it.
    with writing(directory), contextlib.suppress(FileNotFoundError):
        path.rename(kept)
    return kept
