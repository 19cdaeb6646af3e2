"""``index.html`` of a model: every sweep, newest first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from qsens.documents import read_document
from qsens.errors import UserError
from qsens.published import Place
from qsens.reading import entries_in, has_file
from qsens.report import format as look
from qsens.report.assets import linked, page_data
from qsens.report.render import render_html
from qsens.results import AGAIN
from qsens.schema.summary import SUMMARY_VERSION
from qsens.store import ASSETS, PAGE, SUMMARY, SWEEPS
from qsens.writing import write_text


class _CellHead(BaseModel):
    """What the index reads of a cell; its rows are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    pair: str
    size: str
    status: Literal["done", "missing"]
    partial: tuple[str, ...]


class _SweepHead(BaseModel):
    """What the index reads of a summary."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: int
    sweep_id: str
    created: str
    preset: str
    model: str
    complete: bool
    published: int = 0
    cells: tuple[_CellHead, ...]


@dataclass(frozen=True)
class Entry:
    """One line of the index.

    Attributes:
        place: Its place among the model's sweeps.
        created: When its plan was made.
        preset: The sweep file it started from.
        complete: Whether every cell has a result and none of them is partial.
        cells: Number of cells.
        done: Cells with a result.
        partial: Cells whose result is partial.
        pairs: Precision pairs, in the order of the sweep.
        sizes: Calibration sizes, in the order of the sweep.
        link: Where its page lies, relative to the index.
    """

    place: Place
    created: str
    preset: str
    complete: bool
    cells: int
    done: int
    partial: int
    pairs: tuple[str, ...]
    sizes: tuple[str, ...]
    link: str


def write_model_index(model_directory: Path) -> Path:
    """Write the page that lists every sweep under ``sweeps/``, the last published first.

    A directory that holds no summary that this version reads is named on the page and left out.

    Args:
        model_directory: The model's directory, the one that holds ``sweeps/``.

    Returns:
        The page.
    """
    entries: list[Entry] = []
    skipped: list[tuple[str, str]] = []
    models: dict[Place, str] = {}
    root = model_directory / SWEEPS
    for directory in entries_in(root, remedy=AGAIN):
        # Dotted names are those of writes in progress, here and elsewhere.
        if directory.name.startswith("."):
            continue
        head = _read(directory)
        if isinstance(head, str):
            skipped.append((directory.name, head))
            continue
        entries.append(_entry(head))
        models[entries[-1].place] = head.model
    entries.sort(key=lambda entry: entry.place, reverse=True)
    newest = max(models) if models else None
    page = render_html(
        PAGE,
        model=models[newest] if newest is not None else model_directory.parent.name,
        entries=entries,
        skipped=skipped,
        scripts=linked(model_directory, model_directory / ASSETS),
        data=page_data({}),
    )
    path = model_directory / PAGE
    write_text(path, page)
    return path


def _read(directory: Path) -> _SweepHead | str:
    """Return the head of a sweep's summary, or why there is none."""
    if not directory.is_dir():
        return "is not a directory"
    path = directory / SUMMARY
    try:
        if not has_file(path, remedy=AGAIN):
            return f"holds no {SUMMARY}"
        head = read_document(
            _SweepHead, path, what="summary of a sweep", version=SUMMARY_VERSION, name="", again=""
        )
    except UserError as error:
        return f"its {SUMMARY} {error.what}"
    if head.sweep_id != directory.name:
        return f"its {SUMMARY} is that of another sweep"
    return head


def _entry(head: _SweepHead) -> Entry:
    return Entry(
        place=Place(head.published, head.sweep_id),
        created=head.created,
        preset=head.preset,
        complete=head.complete,
        cells=len(head.cells),
        done=sum(cell.status == "done" for cell in head.cells),
        partial=sum(bool(cell.partial) for cell in head.cells),
        pairs=tuple(dict.fromkeys(cell.pair for cell in head.cells)),
        sizes=tuple(dict.fromkeys(cell.size for cell in head.cells)),
        link=look.link(SWEEPS, head.sweep_id, PAGE),
    )
