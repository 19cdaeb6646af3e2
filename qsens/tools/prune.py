"""Old sweeps away, and what only they refer to.

A sweep goes when it is neither among the newest of its model nor young. A result goes when no sweep
that is still there refers to it and nobody has planned with it for as long; both are removed in an
order that leaves, wherever it stops, only what the next run removes as well.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from qsens.data.images import cache_of
from qsens.documents import peek
from qsens.errors import UserError
from qsens.grid import SWEEP_ID, read_plan
from qsens.locks import lock_at, try_lock
from qsens.published import Place, Published, Shown, shown_cells
from qsens.reading import below, entries_in, has_directory
from qsens.report.model_index import write_model_index
from qsens.results import MANIFEST
from qsens.store import (
    ASIDE,
    AUDITS,
    CALIBRATIONS,
    CELLS,
    PICTURES,
    PLAN,
    PLANS,
    SUMMARY,
    SWEEPS,
    TMP,
    VERIFIED,
    analyses,
    publishing_lock,
)
from qsens.writing import writing

_DIGEST = re.compile(r"[0-9a-f]{64}")
_REMOVED = ".removed"
_HALF_WRITTEN_SECONDS = 86_400
_RIGHTS = "Mend its rights, or prune as the user whose results they are."


@dataclass(frozen=True)
class Sweep:
    """A sweep that was published.

    Attributes:
        directory: Holds its plan and its reports.
        place: Its place among its model's sweeps.
        created: When its plan was made.
        model: Name of its model; none where it cannot be read.
        previous: Id of the sweep that its reports compare it with.
    """

    directory: Path
    place: Place
    created: datetime
    model: str | None
    previous: str | None

    @property
    def id(self) -> str:
        """Return the sweep's id."""
        return self.directory.name


@dataclass
class Pruned:
    """What was removed, or would be.

    Attributes:
        sweeps: Ids of sweeps.
        cells: Directories of published cells, which showed one of those sweeps.
        results: Digests of results.
        files: Other files: calibrations, decoded pictures, plans of runs, reasons of failures,
            half-written files, what was damaged.
        bytes: Size of all that.
        notes: What was left alone, and why.
    """

    sweeps: list[str] = field(default_factory=list)
    cells: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    bytes: int = 0
    notes: list[str] = field(default_factory=list)


def prune(
    results: Path,
    *,
    keep_sweeps: int,
    keep_days: float,
    dry_run: bool = False,
    now: datetime | None = None,
) -> Pruned:
    """Remove old sweeps and what only they refer to.

    Never removed: what a kept sweep refers to, the sweep before it included; what was computed or
    planned with in the last ``keep_days``; what another process has locked.

    Args:
        results: The results root.
        keep_sweeps: Sweeps of each model that are kept, the newest, however old they are.
        keep_days: Days that everything is kept, at least one.
        dry_run: Say what would be removed, and remove nothing.
        now: When it is; the current time when not given.

    Nothing is removed while somebody publishes, and nobody publishes meanwhile.

    Raises:
        UserError: ``keep_sweeps`` or ``keep_days`` is below 1, or the results cannot be read or
            written to.
    """
    for name, value in (("--keep-sweeps", keep_sweeps), ("--keep-days", keep_days)):
        if value < 1:
            raise UserError(f"is {value}", where=name, remedy="Give 1 or more.")
    before = (now or datetime.now(UTC)) - timedelta(days=keep_days)
    job = _Job(results, before.timestamp(), dry_run, Pruned())
    if not has_directory(results, remedy=_RIGHTS):
        return job.pruned
    with contextlib.ExitStack() as locks:
        if not dry_run:
            lock = publishing_lock(results)
            if not try_lock(lock):
                job.pruned.notes.append(
                    f"{results}: is being published to, or pruned; nothing is removed, run it again"
                )
                return job.pruned
            locks.callback(lock.release)
        sweeps = list(_sweeps(results))
        old = _old(sweeps, keep_sweeps, before)
        job.remove_sweeps(old)
        kept = [sweep for sweep in sweeps if sweep not in old]
        job.remove_results(_references(kept, job.pruned.notes))
        job.remove_plans({sweep.id for sweep in kept})
        job.remove_half_written()
        job.remove_set_aside()
    return job.pruned


@dataclass
class _Job:
    """One run over a results root."""

    results: Path
    before: float
    dry_run: bool
    pruned: Pruned

    def remove_sweeps(self, old: list[Sweep]) -> None:
        """Remove sweeps, then the cells that show one that is gone, then lines of the index."""
        for parent in _sweep_parents(self.results):
            sweeps = [sweep for sweep in old if sweep.directory.parent == parent]
            for sweep in sorted(sweeps, key=lambda sweep: sweep.id):
                self.pruned.sweeps.append(sweep.id)
                self._remove_directory(sweep.directory)
            if parent.name == SWEEPS:
                self._remove_cells(parent.parent, {sweep.id for sweep in sweeps})
                # A run that was broken off may have left it as it was.
                if not self.dry_run:
                    write_model_index(parent.parent)

    def remove_results(self, used: tuple[set[str], set[str]] | None) -> None:
        """Remove results and calibrations that nothing refers to; none if that is unknown."""
        if used is None:
            return
        cells, calibrations = used
        for path in _entries(self.results / CELLS):
            digest = path.name.partition(".")[0]
            if not _DIGEST.fullmatch(digest) or digest in cells:
                continue
            if path.name == f"{digest}.failed.json" and self._is_old(path):
                self._remove_file(path)
            elif path.name == digest and path.is_dir() and self._is_old(path / MANIFEST, path):
                self._remove_result(path)
        for path in _entries(self.results / CALIBRATIONS):
            if path.suffix == ".safetensors" and path.stem not in calibrations:
                self._remove_locked(path, path.with_suffix(".lock"))
        for path in _entries(cache_of(self.results)):
            if path.suffix == ".npy" and self._is_old(path):  # made again where it is needed
                self._remove_file(path)
        for name in (AUDITS, VERIFIED):
            for path in _entries(self.results / name):
                if path.suffix == ".json" and path.stem not in cells and self._is_old(path):
                    self._remove_file(path)

    def remove_plans(self, kept: set[str]) -> None:
        """Remove the plans of runs of the DAG whose sweep is gone."""
        for directory in _entries(self.results / PLANS):
            plan = directory / PLAN
            if self._is_old(plan, directory) and peek(plan).get("sweep_id") not in kept:
                self.pruned.files.append(str(plan))
                self._remove_directory(directory)

    def remove_half_written(self) -> None:
        """Remove what processes that were killed have left; nothing is written for a day."""
        limit = min(self.before, time.time() - _HALF_WRITTEN_SECONDS)
        roots = [AUDITS, CELLS, CALIBRATIONS, PICTURES, PLANS, VERIFIED, TMP]
        paths = [path for name in roots for path in _entries(self.results / name)]
        for directory in analyses(self.results):
            paths += below(directory)
        for path in paths:
            hidden = path.name.startswith(".") and path.name.endswith((".tmp", _REMOVED))
            with contextlib.suppress(OSError):
                if hidden and (path.suffix == _REMOVED or path.stat().st_mtime < limit):
                    self.pruned.files.append(str(path))
                    self._count(path)
                    if not self.dry_run:
                        _delete(path)

    def remove_set_aside(self) -> None:
        """Remove what was damaged, once nobody can want to look at it any more."""
        for directory in _entries(self.results / ASIDE):
            if self._is_old(directory):
                self._remove_file(directory)

    def _remove_cells(self, model: Path, removed: set[str]) -> None:
        """Remove the directories of cells that show an old sweep that is not there any more."""
        there = {path.name for path in _entries(model / SWEEPS)} - removed
        for cell in sorted(shown_cells(model)):
            shown = Shown.read(cell)
            sweep = shown.place.sweep_id if shown else ""
            created = _created(sweep)
            # A publish that was broken off may come back to a young one.
            if sweep in there or created is None or created.timestamp() >= self.before:
                continue
            self.pruned.cells.append(cell.relative_to(model).as_posix())
            self._remove_directory(cell)
            # The pair's directory, once it is empty.
            if not self.dry_run:
                with contextlib.suppress(OSError):
                    for parent in cell.parents:
                        if parent == model:
                            break
                        parent.rmdir()

    def _remove_result(self, directory: Path) -> None:
        lock = lock_at(directory.with_name(f"{directory.name}.lock"))
        if not self.dry_run and not try_lock(lock):
            return
        try:
            # Somebody may have planned with it before the lock was ours.
            if self._is_old(directory / MANIFEST, directory):
                self.pruned.results.append(directory.name)
                self._count(directory)
                if not self.dry_run:
                    # First, so that what is left of it is no result.
                    _delete(directory / MANIFEST)
                    _delete(directory)
        finally:
            lock.release()

    def _remove_locked(self, path: Path, lock_file: Path) -> None:
        lock = lock_at(lock_file)
        if not self._is_old(path) or (not self.dry_run and not try_lock(lock)):
            return
        try:
            if self._is_old(path):
                self._remove_file(path)
        finally:
            lock.release()

    def _remove_file(self, path: Path) -> None:
        self.pruned.files.append(str(path))
        self._count(path)
        if not self.dry_run:
            _delete(path)

    def _remove_directory(self, path: Path) -> None:
        """Remove a directory, which disappears at once or not at all."""
        self._count(path)
        if not self.dry_run:
            hidden = path.with_name(f".{path.name}{_REMOVED}")
            _delete(hidden)
            with writing(path.parent), contextlib.suppress(FileNotFoundError):
                path.rename(hidden)
            _delete(hidden)

    def _count(self, path: Path) -> None:
        for file in (path, *below(path)):
            with contextlib.suppress(OSError):
                if not file.is_dir():
                    self.pruned.bytes += file.lstat().st_size

    def _is_old(self, *paths: Path) -> bool:
        """Return whether the first of ``paths`` that is there is old; false where none is."""
        for path in paths:
            try:
                return path.stat().st_mtime < self.before
            except FileNotFoundError:
                continue
            except OSError:  # nobody can tell
                return False
        return False


def _old(sweeps: list[Sweep], keep_sweeps: int, before: datetime) -> list[Sweep]:
    """Return the sweeps to remove."""
    kinds: dict[tuple[Path, str | None], list[Sweep]] = defaultdict(list)
    for sweep in sweeps:
        kinds[sweep.directory.parent, sweep.model].append(sweep)
    old: list[Sweep] = []
    for members in kinds.values():
        members.sort(key=lambda sweep: sweep.place, reverse=True)
        kept = [
            sweep
            for position, sweep in enumerate(members)
            if position < keep_sweeps or sweep.created >= before
        ]
        # Its reports compare a kept sweep with this one.
        compared = {sweep.previous for sweep in kept}
        old += [sweep for sweep in members if sweep not in kept and sweep.id not in compared]
    return old


def _sweep_parents(results: Path) -> list[Path]:
    """Return every directory whose entries are sweeps."""
    parents = [*(analysis / SWEEPS for analysis in analyses(results)), results / TMP]
    return [parent for parent in parents if parent.is_dir()]


def _sweeps(results: Path) -> Iterator[Sweep]:
    for parent in _sweep_parents(results):
        for directory in _entries(parent):
            created = _created(directory.name)
            if created is None or not directory.is_dir():
                continue
            known = Published.read(directory)
            # All below one model's directory are that model's.
            model = None if parent.name == SWEEPS else known.model
            previous = peek(directory / SUMMARY).get("previous")
            yield Sweep(directory, known.place, created, model, previous)


def _references(kept: list[Sweep], notes: list[str]) -> tuple[set[str], set[str]] | None:
    """Return the digests of cells and calibrations that kept sweeps refer to; none if unknown."""
    cells: set[str] = set()
    calibrations: set[str] = set()
    for sweep in kept:
        try:
            plan = read_plan(sweep.directory / PLAN)
        except UserError as error:
            notes.append(f"{error.where}: {error.what}; so every result is kept")
            return None
        cells |= {cell.digest for cell in plan.cells}
        calibrations |= {cell.calibration for cell in plan.cells}
    return cells, calibrations


def _created(sweep_id: str) -> datetime | None:
    """Return when the plan of a sweep was made; none if that is no sweep's id."""
    match = SWEEP_ID.fullmatch(sweep_id)
    try:
        return match and datetime.strptime(match[1], "%Y%m%dT%H%M%S%f").replace(tzinfo=UTC)
    except ValueError:  # no day of any month
        return None


def _delete(path: Path) -> None:
    with writing(path.parent):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _entries(directory: Path) -> list[Path]:
    return entries_in(directory, remedy=_RIGHTS)
