"""The operators of one cell, which take a GPU: calibrate, score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

from airflow.sdk import Context

from qsens.errors import UserError
from qsens.grid import read_plan
from qsens.pipeline.cell import is_there
from qsens_airflow.base import QsensOperator
from qsens_airflow.lease import VISIBLE, devices_to_lease, take


class CellOperator(QsensOperator):
    """Base of one cell's steps.

    Args:
        cell: The cell's id.
        plan: Path of the plan.
    """

    template_fields: Sequence[str] = ("cell", "plan")
    verb: ClassVar[Literal["calibrate", "score"]]

    def __init__(self, *, cell: str, plan: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cell = cell
        self.plan = plan

    @property
    def title(self) -> str:
        """What the UI shows for the mapped task: ``wfp8_afp8 · small``."""
        return " · ".join(self.cell.split("-"))

    def execute(self, context: Context) -> dict[str, Any]:
        """Make sure that the cell's result of this step is there."""
        with self._device(context) as (environment, inherited):
            return self.run_verb(
                context,
                *(self.verb, "--plan", self.plan, "--cell", self.cell),
                environment=environment,
                inherited=inherited,
            )

    @contextmanager
    def _device(self, context: Context) -> Iterator[tuple[dict[str, str], tuple[int, ...]]]:
        """Lease a GPU where tasks share several; what needs none goes without."""
        devices = devices_to_lease()
        wanted = self._wanted(devices) if devices else []
        if not wanted:
            yield {}, ()
            return
        lease = take(wanted)
        if lease is None:
            raise self.give_back(context, f"{self.cell}: no device is free of {', '.join(wanted)}")
        self.log.info("Device %s", lease.device)
        try:
            # A device that the plan names by its number needs the others before it in sight.
            yield {VISIBLE: lease.device} if wanted == devices else {}, (lease.descriptor,)
        finally:
            lease.release()

    def _wanted(self, devices: list[str]) -> list[str]:
        """Return the devices that would do; none where there is nothing to compute."""
        try:
            plan = read_plan(Path(self.plan))
            if is_there(plan, plan.cell(self.cell), self.verb):
                return []
        except UserError:  # the child says it
            return []
        device = plan.config.autoquant.device
        if device in ("auto", "cuda", "cuda:0"):
            return devices
        number = device.removeprefix("cuda:")
        return devices[int(number) :][:1] if number.isdigit() else []


class CalibrateOperator(CellOperator):
    """Make sure that the calibration maxima of one cell are there."""

    verb = "calibrate"


class ScoreOperator(CellOperator):
    """Make sure that the result of one cell is there."""

    verb = "score"
