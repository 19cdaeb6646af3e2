"""Reports of cells, sweeps and models: Markdown, JSON and static HTML, equal input, equal bytes."""

from qsens.report.cell import CellReport, build_cell, write_cell
from qsens.report.model_index import write_model_index
from qsens.report.sweep import build_summary, write_sweep
from qsens.schema.summary import Summary, SummaryCell

__all__ = [
    "CellReport",
    "Summary",
    "SummaryCell",
    "build_cell",
    "build_summary",
    "write_cell",
    "write_model_index",
    "write_sweep",
]
