"""Sweeps that were published, and their order: that of their publication, not of their clocks.

A sweep gets a number when it is first published, one more than any of its model's sweeps there has.
Its plan and its summary keep it, so that a sweep that is published again keeps its place. Sweeps
from before there were numbers come first, in the order of their ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsens.cells import CellSpec
from qsens.checksums import CHECKSUM, is_sealed
from qsens.documents import peek, read_document
from qsens.errors import Damaged, UserError
from qsens.grid import Plan, read_plan, refuse_another_sweep
from qsens.reading import below, has_file, read_bytes
from qsens.schema.summary import SUMMARY_VERSION, Summary
from qsens.store import PLAN, SUMMARY, SWEEPS, TMP, Store, analyses
from qsens.writing import write_text

# What a cell's directory shows: an older sweep, published again, must not replace it.
SHOWN = ".sweep"
_NAME = f"Name a sweep's directory, its {SUMMARY}, or a sweep id"
# Bytes of that file at most.
_MOST_SHOWN = 1024


@dataclass(frozen=True, order=True)
class Place:
    """The place of a sweep among its model's: of two, the later one is greater.

    Attributes:
        number: Which of its model's sweeps it is, from 1; 0 from before there were numbers.
        sweep_id: Its id.
    """

    number: int
    sweep_id: str


@dataclass(frozen=True)
class Published:
    """A sweep that was published.

    Attributes:
        directory: Holds its plan and its reports.
        place: Its place among its model's sweeps.
        model: Name of its model; none where its plan cannot be read.
    """

    directory: Path
    place: Place
    model: str | None

    @property
    def plan(self) -> Path:
        """Return the file of its plan."""
        return self.directory / PLAN

    @classmethod
    def read(cls, directory: Path) -> Published:
        """Read what there is to know without reading all of a sweep."""
        plan = _sealed(directory / PLAN)
        known = _number(plan) or _number(_sealed(directory / SUMMARY)) or 0
        place = Place(known, _text(plan, "sweep_id") or directory.name)
        return cls(directory, place, _text(plan, "config", "model", "name"))


@dataclass(frozen=True)
class Shown:
    """What the directory of a cell shows.

    Attributes:
        place: The place of the sweep that it was published by.
        digest: Digest of the cell; none from before it was kept.
    """

    place: Place
    digest: str | None

    @classmethod
    def read(cls, directory: Path) -> Shown | None:
        """Read what a directory shows; none where nothing was published there."""
        try:
            data = read_bytes(directory / SHOWN, most=_MOST_SHOWN, remedy="")
            words = data.decode("utf-8").split()
            number = int(words[1]) if len(words) > 1 else 0
            return cls(Place(number, words[0]), words[2] if len(words) > 2 else None)
        except (UserError, ValueError, IndexError):
            return None

    def write(self, directory: Path) -> None:
        """Write down that ``directory`` shows this."""
        words = (self.place.sweep_id, str(self.place.number), self.digest or "")
        write_text(directory / SHOWN, "\n".join(words) + "\n")


def published_sweeps(parent: Path) -> list[Published]:
    """Return the sweeps below a model's ``sweeps/`` or below ``tmp/``, as they were published."""
    sweeps = [Published.read(plan.parent) for plan in parent.glob(f"*/{PLAN}")]
    return sorted(sweeps, key=lambda sweep: sweep.place)


def place_of(store: Store) -> Place:
    """Return the place of a sweep: the one that it has, or the next where it has none."""
    plan, directory = store.plan, store.sweep_dir()
    there = Published.read(directory)
    own = there.place.sweep_id == plan.sweep_id and (
        there.model is not None or (directory / SUMMARY).is_file()
    )
    if plan.published or own:
        return Place(plan.published or there.place.number, plan.sweep_id)
    others = [there]
    if directory.name == plan.sweep_id:  # else all sweeps have one directory
        others = [
            sweep
            for sweep in published_sweeps(directory.parent)
            if sweep.model == plan.config.model.name
        ]
    return Place(1 + max((sweep.place.number for sweep in others), default=0), plan.sweep_id)


def sweep_before(store: Store, place: Place) -> str | None:
    """Return the id of the sweep that was published before the one at ``place``, if there is one.

    Only sweeps that are kept side by side have one: those of a model.
    """
    parent = store.sweep_dir().parent
    if parent != store.model_dir() / SWEEPS:
        return None
    earlier = [
        sweep.directory.name
        for sweep in published_sweeps(parent)
        if sweep.place < place and (sweep.directory / SUMMARY).is_file()
    ]
    return earlier[-1] if earlier else None


def may_show(store: Store, cell: CellSpec, place: Place) -> bool:
    """Return whether the directory of ``cell`` shows nothing that was published after ``place``."""
    shown = Shown.read(store.cell_dir(cell))
    return shown is None or shown.place.sweep_id == place.sweep_id or shown.place <= place


def shown_sweeps(model_dir: Path) -> set[str]:
    """Return the ids of the sweeps whose results the cells' directories of a model show."""
    marks = [Shown.read(directory) for directory in shown_cells(model_dir)]
    return {shown.place.sweep_id for shown in marks if shown is not None}


def shown_cells(model_dir: Path) -> Iterator[Path]:
    """Yield the directories of cells that a model's directory shows."""
    for pair in model_dir.glob("weight-*"):
        yield from (mark.parent for mark in below(pair) if mark.name == SHOWN)


def _number(data: dict[str, Any]) -> int | None:
    value = data.get("published")
    return value if type(value) is int and value > 0 else None


def _text(data: dict[str, Any], *keys: str) -> str | None:
    """Return the text under nested keys; none where there is something else."""
    value: Any = data
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) and value else None


def _sealed(path: Path) -> dict[str, Any]:
    """Return a document; nothing where it cannot be read, or is not what was written."""
    data = peek(path)
    return {} if data.get(CHECKSUM) is not None and not is_sealed(data) else data


def read_summary(path: Path) -> Summary:
    """Read ``summary.json``.

    Raises:
        Damaged: The file is no summary, or not as it was written.
        UserError: A newer qsens wrote it.
    """
    summary = read_document(
        Summary,
        path,
        what="summary of a sweep",
        version=SUMMARY_VERSION,
        name="Name the summary.json of a published sweep.",
        again="Publish the sweep again with `qsens publish`.",
    )
    refuse_another_sweep(path, summary.sweep_id)
    return summary


def read_sweep(directory: Path) -> tuple[Summary, Plan]:
    """Read what was published of a sweep: its summary and its plan.

    Raises:
        Damaged: One cannot be read, is not what was written, or they are of two sweeps.
        UserError: A newer qsens wrote it.
    """
    summary, plan = read_summary(directory / SUMMARY), read_plan(directory / PLAN)
    if summary.sweep_id != plan.sweep_id:
        raise Damaged(
            f"is damaged: it is that of another sweep than the plan beside it, {plan.sweep_id}",
            where=str(directory / SUMMARY),
            remedy="Publish the sweep again with `qsens publish`.",
        )
    return summary, plan


def find_sweep(name: str, results: Path, *, remedy: str | None = None) -> Path:
    """Return the directory of a published sweep.

    Args:
        name: That directory, the ``summary.json`` in it, or the sweep's id below the results root.
        results: The results root.
        remedy: What to name instead, where more than a sweep is taken.

    Raises:
        UserError: There is none, or the id names more than one.
    """
    path = Path(name)
    if path.name == SUMMARY and path.is_file():
        return path.parent.resolve()
    if has_file(path / SUMMARY, remedy=f"{_NAME}."):
        return path.resolve()
    directories = []
    if path.name == name and name not in ("", ".", ".."):
        parents = [results / TMP, *(analysis / SWEEPS for analysis in analyses(results))]
        directories = [parent / name for parent in parents if (parent / name / SUMMARY).is_file()]
    if len(directories) != 1:
        raise UserError(
            f"is the id of {len(directories)} sweeps" if directories else "is no published sweep",
            where=name,
            remedy=remedy or f"{_NAME} below {results}.",
        )
    return directories[0]
