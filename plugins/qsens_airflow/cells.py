"""The operators of one cell, which take a GPU: calibrate, score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from airflow.sdk import Context

from qsens.errors import QsensError
from qsens.grid import Plan, read_plan
from qsens.pipeline.cell import Step, is_there, outcome_there
from qsens_airflow.gpu import PlannedOperator


class CellOperator(PlannedOperator):
    """Base of one cell's steps.

    Args:
        cell: The cell's id.
        plan: Path of the plan.
    """

    template_fields: Sequence[str] = ("cell", "plan")
    verb: ClassVar[Step]

    def __init__(self, *, cell: str, plan: str, **kwargs: Any) -> None:
        super().__init__(plan=plan, **kwargs)
        self.cell = cell

    @property
    def title(self) -> str:
        """What the UI shows for the mapped task: ``wfp8_afp8 · small``."""
        return " · ".join(self.cell.split("-"))

    def execute(self, context: Context) -> dict[str, Any]:
        """Make sure that the cell's result of this step is there; start nothing where it is."""
        there = self._there()
        if there is not None:
            self.log.info("%s: %s already", self.title, there["status"])
            return there
        return self.run_planned(context, self.verb, "--cell", self.cell)

    def nothing_to_compute(self, plan: Plan) -> bool:
        """Return whether the cell's result of this step is there."""
        return is_there(plan, self.cell, self.verb)

    def _there(self) -> dict[str, Any] | None:
        """Return what the verb would answer, if it has nothing to compute."""
        try:
            return outcome_there(read_plan(Path(self.plan)), self.cell, self.verb)
        except QsensError:  # the child says it
            return None


class CalibrateOperator(CellOperator):
    """Make sure that the calibrated amax of one cell are there."""

    verb = "calibrate"


class ScoreOperator(CellOperator):
    """Make sure that the result of one cell is there."""

    verb = "score"
