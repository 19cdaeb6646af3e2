"""The operator that holds a sweep's scores against the true KL divergence of some groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowSkipException

from qsens.errors import AnswerIsNo, UserError
from qsens.grid import Plan, read_plan
from qsens_airflow.gpu import PlannedOperator


class AuditOperator(PlannedOperator):
    """Audit the scores of a plan, as its ``autoquant.audit`` says; else the task is skipped.

    Pairs that are not to be trusted are an answer, and fail nothing.

    Args:
        plan: Path of the plan; empty where there is none, which ``publish`` says.
    """

    answers = (0, AnswerIsNo.exit_code)

    def execute(self, context: Context) -> dict[str, Any]:
        """Run ``qsens audit``; return the verdict of each audited cell, and what is missing."""
        mode = self._mode(context)
        audited = self.run_planned(context, "audit", *(["--full"] if mode == "full" else []))
        verdicts = {}
        for audit in audited["audits"]:
            judged = audit["judgement"]
            verdicts[audit["cell"]] = judged["verdict"]
            distrusted = judged["verdict"] == "do not trust"
            say = self.log.warning if distrusted else self.log.info
            say("%s: %s: %s", audit["cell"], judged["verdict"], judged["reason"])
        for cell in audited["missing"]:
            self.log.warning("Not audited: %s: %s", cell["cell"], cell["reason"])
        return {"verdicts": verdicts, "missing": audited["missing"]}

    def nothing_to_compute(self, plan: Plan) -> bool:
        """Return whether the audits are there."""
        # It imports numpy and scipy, which only a task that runs should pay for.
        from qsens.pipeline.audit import is_audited

        return is_audited(plan)

    def _mode(self, context: Context) -> str:
        """Return what the plan says, without a child process; skip the task where it says none."""
        if not self.plan or context["params"].get("mode") == "report_only":
            raise AirflowSkipException("a run that computes nothing audits nothing")
        try:
            mode: str = read_plan(Path(self.plan)).config.autoquant.audit
        except UserError:  # the child says it
            return "sample"
        if mode == "none":
            raise AirflowSkipException("autoquant.audit is none")
        return mode
