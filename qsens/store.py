"""Where results lie, atomic writes, locks, and what is done already.

A result lives once at ``<results>/.cells/<cell digest>/`` and is never overwritten; publishing
copies it into the layout. The manifest is written last: a directory without one is no result. What
cannot be read, or is not what was written, is none either: it is set aside and computed again.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from qsens.checksums import check_tensors, digest_file
from qsens.documents import dump_document
from qsens.errors import Damaged, DiskFull, TryAgain, UserError
from qsens.grid import Cell, Plan
from qsens.manifest import MANIFEST_SUFFIX, STATE_SUFFIX, Manifest
from qsens.results import MANIFEST as MANIFEST
from qsens.results import STATE as STATE
from qsens.results import read_result

# Errors of a directory that somebody must mend; others may be the disk's or the network's.
_REFUSALS = (
    errno.EACCES,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)
# Where damaged files are set aside, by who found them; `prune` takes them away in time.
ASIDE = ".damaged"
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
        return self.plan.results / ".cells" / cell.digest

    def manifest(self, cell: Cell) -> Path:
        """Return where the manifest of ``cell`` lives, whether it is there or not."""
        return self.result_dir(cell) / MANIFEST

    def state(self, cell: Cell) -> Path:
        """Return where the tensors of ``cell`` live, whether they are there or not."""
        return self.result_dir(cell) / STATE

    def calibration(self, digest: str) -> Path:
        """Return where the calibrated maxima of that digest live."""
        return self.plan.results / ".calibrations" / f"{digest}.safetensors"

    def failure(self, cell: Cell) -> Path:
        """Return where the reason is kept why ``cell`` could not be computed."""
        return self.plan.results / ".cells" / f"{cell.digest}{FAILED}"

    def audit(self, cell: Cell) -> Path:
        """Return where the audit of the scores of ``cell`` lives, whether it is there or not."""
        return self.plan.results / ".audits" / f"{cell.digest}.json"

    def result(self, cell: Cell) -> Manifest | None:
        """Return the manifest of the result of ``cell``, checked; none where there is none.

        Raises:
            Damaged: The result is not what was written, or that of another cell.
            UserError: A newer qsens wrote it.
        """
        directory = self.result_dir(cell)
        return read_result(directory) if (directory / MANIFEST).is_file() else None

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
        """Return whether the calibrated maxima of that digest are there, as they were written."""
        path = self.calibration(digest)
        return path.is_file() and check_tensors(path, digest) is None

    def write_result(
        self, cell: Cell, manifest: Manifest, save_state: Callable[[Path], None]
    ) -> None:
        """Write the result of ``cell``, whole or not at all; one that is there is kept.

        Args:
            cell: The cell.
            manifest: Its manifest; the digest of its state is filled in.
            save_state: Writes its tensors to the path that it is given.
        """
        path = self.result_dir(cell)
        with write_directory(
            path, last=MANIFEST, keep=lambda: not self.set_aside_result(cell)
        ) as directory:
            save_state(directory / STATE)
            digest = digest_file(directory / STATE)
            text = dump_document(manifest.model_copy(update={"state_digest": digest}))
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
        """Set calibrated maxima aside where they are damaged, their lock held."""
        path = self.calibration(digest)
        reason = check_tensors(path, digest) if path.is_file() else None
        if reason is not None:
            self.set_aside(path, "calibrated maxima", f"are damaged: {reason}")

    def set_aside(self, path: Path, what: str, reason: str) -> None:
        """Move a damaged file or directory away, so that it counts as not there, and say so."""
        kept = set_aside(path, self.plan.sweep_id)
        log.warning("%s: %s; set aside as %s", what, reason, kept)

    def damages(self) -> list[str]:
        """Return in words what this sweep has set aside."""
        cells = {cell.digest: f" of {cell.cell}" for cell in self.plan.cells}
        found: dict[str, None] = {}
        for path in sorted((self.plan.results / ASIDE / self.plan.sweep_id).glob("*")):
            kind, _, name = path.name.partition("-")
            of = cells.get(name.partition(".")[0], "") if kind != "calibrations" else ""
            what = "failure" if name.endswith(FAILED) else _STORED.get(kind, "file")
            words = f"the stored {what}{of} was damaged: it was set aside"
            found[words if what == "failure" else f"{words} and computed again"] = None
        return list(found)

    def model_dir(self) -> Path:
        """Return the directory of all that is published for the model."""
        config = self.plan.config
        if config.runner.output_dir is not None:
            return config.runner.output_dir
        if config.output_layout == "tmp":
            return self.plan.results / "tmp" / self.plan.sweep_id
        return self.plan.results / "models" / config.model.name / "layer-analysis"

    def sweep_dir(self) -> Path:
        """Return the directory of the sweep's own reports."""
        config = self.plan.config
        if config.runner.output_dir is not None or config.output_layout == "tmp":
            return self.model_dir()
        return self.model_dir() / "sweeps" / self.plan.sweep_id

    def cell_dir(self, cell: Cell) -> Path:
        """Return the directory that ``cell`` is published in."""
        config = self.plan.config
        if config.runner.output_dir is not None:
            alone = len(self.plan.cells) == 1
            return self.model_dir() if alone else self.model_dir() / cell.cell
        if config.output_layout == "tmp":
            return self.model_dir() / cell.cell
        pair = self.plan.pair(cell)
        directory = self.model_dir() / f"weight-{pair.weight}-act-{pair.activation}"
        if cell.granularity != "default":
            directory /= cell.granularity
        return directory / self.plan.run_dir(cell)

    def published(self, cell: Cell) -> dict[str, Path]:
        """Return where manifest and state of ``cell`` are published."""
        directory, scheme = self.cell_dir(cell), self.plan.scheme(cell)
        return {
            "manifest": directory / f"{scheme}{MANIFEST_SUFFIX}",
            "state": directory / f"{scheme}{STATE_SUFFIX}",
        }

    def lock(self, cell: Cell) -> FileLock:
        """Return the lock of the result of ``cell``; it dies with the process that holds it."""
        return _lock(self.plan.results / ".cells" / f"{cell.digest}.lock")

    def calibration_lock(self, digest: str) -> FileLock:
        """Return the lock of the calibrated maxima of that digest."""
        return _lock(self.plan.results / ".calibrations" / f"{digest}.lock")


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
    with _refusal_is_said(directory), contextlib.suppress(FileNotFoundError):
        path.rename(kept)
    return kept


@contextlib.contextmanager
def held(lock: FileLock, *, where: str, wait: bool) -> Iterator[None]:
    """Hold ``lock`` while the context lasts.

    Args:
        lock: The lock.
        where: What it protects, for the message.
        wait: Whether to wait for another process that holds it.

    Raises:
        TryAgain: Another process holds it, and ``wait`` is false.
    """
    try:
        with lock.acquire(timeout=-1 if wait else 0):
            yield
    except Timeout as error:
        raise TryAgain(
            "is being computed by another process",
            where=where,
            remedy="Run it again when that process has ended.",
        ) from error


def try_lock(lock: FileLock) -> bool:
    """Take ``lock`` if nobody else holds it; the caller releases it."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def make_directory(path: Path) -> None:
    """Make a directory with those above it, where it is not there.

    Raises:
        UserError: It cannot be made, such as below a file or on a read-only disk.
        DiskFull: The disk is full.
    """
    with _full_disk_is_said(path), _refusal_is_said(path):
        path.mkdir(parents=True, exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 with LF line ends, whole or not at all.

    Raises:
        DiskFull: The disk is full.
        UserError: The directory cannot be written to.
    """
    with write_file(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def copy_file(source: Path, target: Path) -> None:
    """Copy ``source`` to ``target``, whole or not at all; equal content is left alone."""
    if target.is_file() and target.read_bytes() == source.read_bytes():
        return
    with write_file(target) as temporary:
        shutil.copyfile(source, temporary)


@contextlib.contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is fsynced and renamed to ``path``.

    Raises:
        DiskFull: The disk is full; nothing is left behind.
        UserError: The directory cannot be written to.
    """
    with _full_disk_is_said(path):
        make_directory(path.parent)
        with _refusal_is_said(path.parent):
            handle, name = tempfile.mkstemp(
                dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp"
            )
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _fsync_directory(path.parent)


@contextlib.contextmanager
def write_directory(
    path: Path, *, last: str, keep: Callable[[], bool] = lambda: True
) -> Iterator[Path]:
    """Yield a temporary directory; on success it becomes ``path``, the file ``last`` renamed last.

    A ``path`` that holds ``last`` already is kept and the new content dropped: results are never
    overwritten.

    Args:
        path: The directory.
        last: Name of the file that makes it whole.
        keep: Asked of a ``path`` that holds ``last`` already; where it returns false, it has moved
            that away.

    Raises:
        DiskFull: The disk is full; nothing is left behind.
        UserError: The directory cannot be written to.
    """
    with _full_disk_is_said(path):
        make_directory(path.parent)
        with _refusal_is_said(path.parent):
            temporary = Path(
                tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
            )
        try:
            yield temporary
            if (path / last).is_file() and keep():
                return
            path.mkdir(exist_ok=True)
            files = sorted(temporary.iterdir(), key=lambda file: file.name == last)
            for file in files:
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
                file.chmod(0o666 & ~_umask())
                file.replace(path / file.name)
            _fsync_directory(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _fsync_directory(path.parent)


@contextlib.contextmanager
def _full_disk_is_said(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(
            "no space left on the disk; nothing was written",
            where=str(path.parent),
            remedy="Free some space, then run it again: what is done already is kept.",
        ) from error


@contextlib.contextmanager
def _refusal_is_said(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        raise UserError(
            f"cannot be written to: {error.strerror}",
            where=f"directory {directory}",
            remedy="Choose another one, or mend its rights; results go below QSENS_RESULTS.",
        ) from error


def _lock(path: Path) -> FileLock:
    make_directory(path.parent)
    return FileLock(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
