"""The operators around the grid: plan before it, publish and gate after it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator, Context
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowFailException

from qsens.config import Roots
from qsens.errors import UserError
from qsens_airflow.base import QsensOperator, one_line
from qsens_airflow.limits import load_run
from qsens_airflow.notices import partial_cells, read_summary
from qsens_airflow.params import SweepParams
from qsens_airflow.plans import plan_of_run, plans_to_publish
from qsens_airflow.pool import lanes_of

# Cells that the reason of a failure names.
_LISTED = 5


class PlanOperator(QsensOperator):
    """Make the plan of this run; return one dict a cell, in the plan's order.

    The path of the plan is pushed under the key ``plan`` as well, for what runs without cells.

    Args:
        gpu_pool: Pool that the cells' tasks take slots of.
        gpus_per_task: How many each of them takes.
        makes_traces: Whether a task before it makes the answers that a preset may ask for.
    """

    def __init__(
        self, *, gpu_pool: str, gpus_per_task: int = 1, makes_traces: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.gpu_pool = gpu_pool
        self.gpus_per_task = gpus_per_task
        self.makes_traces = makes_traces

    def execute(self, context: Context) -> list[dict[str, str]]:
        """Run ``qsens plan``, or find the plans that a report-only run publishes again."""
        try:
            params = SweepParams.read(context["params"])
            overrides = params.as_overrides()
            if self.gpus_per_task > 1:  # what a run says itself comes later, and counts
                overrides = [f"autoquant.devices={self.gpus_per_task}", *overrides]
            roots = Roots.from_environment()
            config = load_run(params.preset, overrides, roots)
            if params.mode == "report_only":
                plans = plans_to_publish(config, roots, params.sweep)
                self.log.info("Report only: %s", ", ".join(map(str, plans)))
                context["ti"].xcom_push(key="plan", value="\n".join(map(str, plans)))
                return []
            if config.dag.traces is not None and not self.makes_traces:
                raise UserError(
                    f"the preset {params.preset} asks for the model's answers, and the DAG's own "
                    "preset asks for none, so no task makes them",
                    where="dag.traces",
                    remedy=f"Set QSENS_PRESET={params.preset} for a DAG that makes them.",
                )
            lanes = config.dag.lanes or lanes_of(self.gpu_pool, self.gpus_per_task, self.log.info)
        except UserError as error:
            raise AirflowFailException(one_line(error.as_dict())) from None
        out = str(plan_of_run(roots, context["run_id"]))
        words = ["--out", out, "--lanes", str(lanes), "--", params.preset, *overrides]
        made = self.run_verb(context, "plan", *words)
        cells = [{"cell": str(cell["cell"]), "plan": out} for cell in made["cells"]]
        longest = conf.getint("core", "max_map_length")
        if len(cells) > longest:
            raise AirflowFailException(
                f"{len(cells)} cells, but [core] max_map_length is {longest}: "
                "raise it, or choose fewer pairs, granularities or sizes"
            )
        done = sum(bool(cell.get("done")) for cell in made["cells"])
        self.log.info("Sweep %s: %s cells, %s done already", made["sweep_id"], len(cells), done)
        context["ti"].xcom_push(key="plan", value=out)
        return cells


class PublishOperator(QsensOperator):
    """Copy what the plan's cells have given into the layout and write the reports.

    Args:
        plan: Path of the plan, or paths of several, a line each: all are published, and the last
            one's result is returned. Empty fails the task at once.
    """

    template_fields: Sequence[str] = ("plan",)

    def __init__(self, *, plan: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.plan = plan

    def execute(self, context: Context) -> dict[str, Any]:
        """Run ``qsens publish``."""
        if not self.plan:
            raise AirflowFailException("nothing to publish: the task `plan` left no plan")
        for plan in self.plan.splitlines():
            published = self.run_verb(context, "publish", "--report-only", "--plan", plan)
        kept = ("sweep_id", "index", "complete", "missing", "counts", "top")
        return {key: published[key] for key in kept}


class GateOperator(BaseOperator):
    """Fail when the grid is incomplete: the last leaf decides the colour of a run.

    Of a complete one, its outlets get an event each that carries the sweep's id, the index, the
    counts of cells and the five most sensitive groups.

    Args:
        published: What ``publish`` returned, or a template of it as JSON; nothing fails the task.
    """

    template_fields: Sequence[str] = ("published",)

    def __init__(self, *, published: dict[str, Any] | str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A template until Airflow has rendered it.
        self.published: Any = published

    def execute(self, context: Context) -> None:
        """Log every missing and every partial cell with its reason, and fail if there is one."""
        if isinstance(self.published, str):
            self.published = json.loads(self.published)
        if not self.published:
            raise AirflowFailException("nothing was published: see the tasks before")
        missing = self.published["missing"]
        for cell in missing:
            self.log.error("missing: %s: %s", cell["cell"], cell["reason"])
        if missing or not self.published["complete"]:
            partial = partial_cells(read_summary(Path(self.published["index"]).parent))
            for cell in partial:
                self.log.error("partial: %s: %s", cell["cell"], cell["reason"])
            lost = [f"{cell['cell']}: {cell['reason']}" for cell in (*missing, *partial)]
            why = "; ".join(lost[:_LISTED]) or f"see {self.published['index']}"
            more = f"; and {len(lost) - _LISTED} more" if len(lost) > _LISTED else ""
            raise AirflowFailException(
                f"sweep {self.published['sweep_id']} is PARTIAL: {why}{more}"
            )
        self.log.info("Complete: %s", self.published["index"])
        for asset in self.outlets:
            context["outlet_events"][asset].extra = {
                key: self.published[key] for key in ("sweep_id", "index", "counts", "top")
            }
