"""The operator that keeps disks from filling."""

from __future__ import annotations

from typing import Any

from airflow.sdk import Context

from qsens_airflow.base import QsensOperator


class PruneOperator(QsensOperator):
    """Remove old sweeps and what only they refer to.

    Args:
        keep_sweeps: Sweeps of each model that are kept, the newest.
        keep_days: Days that everything is kept.
    """

    def __init__(self, *, keep_sweeps: int, keep_days: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keep_sweeps = keep_sweeps
        self.keep_days = keep_days

    def execute(self, context: Context) -> dict[str, Any]:
        """Run ``qsens prune``; return how much was removed."""
        words = ["--keep-sweeps", str(self.keep_sweeps), "--keep-days", str(self.keep_days)]
        pruned = self.run_verb(context, "prune", *words)
        self.log.info("Removed: %s", ", ".join(pruned["sweeps"]) or "no sweep")
        return {"sweeps": len(pruned["sweeps"]), "bytes": pruned["bytes"]}
