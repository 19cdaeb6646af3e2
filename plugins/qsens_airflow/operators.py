"""The operators around the grid: plan before it, publish and gate after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from airflow.sdk import BaseOperator, Context, XComArg
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowFailException

from qsens.config import Roots, load_sweep
from qsens.errors import UserError
from qsens_airflow.base import QsensOperator, one_line
from qsens_airflow.params import SweepParams
from qsens_airflow.plans import plan_of_run, plan_of_sweep


class PlanOperator(QsensOperator):
    """Make the plan of this run; return one dict a cell, in the plan's order.

    The path of the plan is pushed under the key ``plan`` as well, for what runs without cells.
    """

    def execute(self, context: Context) -> list[dict[str, str]]:
        """Run ``qsens plan``, or find the plan that a report-only run publishes again."""
        try:
            params = SweepParams.read(context["params"])
            overrides = params.as_overrides()
            roots = Roots.from_environment()
            if params.mode == "report_only":
                config = load_sweep(params.preset, overrides, roots=roots).config
                path = str(plan_of_sweep(config, roots, params.sweep_id))
                self.log.info("Report only: %s", path)
                context["ti"].xcom_push(key="plan", value=path)
                return []
        except UserError as error:
            raise AirflowFailException(one_line(error.as_dict())) from None
        out = str(plan_of_run(roots, context["run_id"]))
        made = self.run_verb(context, "plan", "--out", out, "--", params.preset, *overrides)
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
        plan: Path of the plan; empty fails the task at once.
    """

    template_fields: Sequence[str] = ("plan",)

    def __init__(self, *, plan: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.plan = plan

    def execute(self, context: Context) -> dict[str, Any]:
        """Run ``qsens publish``."""
        if not self.plan:
            raise AirflowFailException("nothing to publish: the task `plan` left no plan")
        published = self.run_verb(context, "publish", "--report-only", "--plan", self.plan)
        return {key: published[key] for key in ("sweep_id", "index", "complete", "missing")}


class GateOperator(BaseOperator):
    """Fail when the grid is incomplete: the last leaf decides the colour of a run.

    Args:
        published: What ``publish`` returned.
    """

    template_fields: Sequence[str] = ("published",)

    def __init__(self, *, published: dict[str, Any] | XComArg, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A reference until Airflow has rendered it.
        self.published: Any = published

    def execute(self, context: Context) -> None:
        """Log every missing cell with its reason, and fail if there is one."""
        missing = self.published["missing"]
        for cell in missing:
            self.log.error("missing: %s: %s", cell["cell"], cell["reason"])
        if missing or not self.published["complete"]:
            names = ", ".join(cell["cell"] for cell in missing)
            raise AirflowFailException(f"sweep {self.published['sweep_id']} is PARTIAL: {names}")
        self.log.info("Complete: %s", self.published["index"])
