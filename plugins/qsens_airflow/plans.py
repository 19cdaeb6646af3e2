"""Where the plan of a run of the DAG lies."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from qsens.config import Roots, SweepConfig
from qsens.errors import UserError
from qsens.store import shown_sweeps


def plan_of_run(roots: Roots, run_id: str) -> Path:
    """Return the file that the plan of an Airflow run is written to.

    Args:
        roots: Where results go.
        run_id: The run's id; anything that a directory's name should not hold is replaced.
    """
    name = re.sub(r"[^A-Za-z0-9-]+", "_", run_id)[:80]
    mark = hashlib.sha256(run_id.encode()).hexdigest()[:8]
    return roots.results / ".plans" / f"{name}-{mark}" / "plan.json"


def plans_to_publish(config: SweepConfig, roots: Roots, sweep_id: str | None) -> list[Path]:
    """Return the plans of published sweeps whose reports a report-only run makes again.

    Args:
        config: Says which model, and which layout.
        roots: Where results lie.
        sweep_id: One sweep. When not given: every sweep that the directory of a published cell
            shows, and the newest one, oldest first; in the layout ``tmp``, the newest alone.

    Raises:
        UserError: There is no such sweep.
    """
    if config.runner.output_dir is not None:
        found = [config.runner.output_dir / "plan.json"]
        sweep_id = None
    elif config.output_layout == "tmp":
        found = sorted((roots.results / "tmp").glob("*/plan.json"))
        found = found if sweep_id else found[-1:]
    else:
        analysis = roots.results / "models" / config.model.name / "layer-analysis"
        found = sorted((analysis / "sweeps").glob("*/plan.json"))
        if not sweep_id:
            shown = shown_sweeps(analysis) | {plan.parent.name for plan in found[-1:]}
            found = [plan for plan in found if plan.parent.name in shown]
    if sweep_id:
        found = [plan for plan in found if plan.parent.name == sweep_id]
    found = [plan for plan in found if plan.is_file()]
    if found:
        return found
    raise UserError(
        f"no sweep {sweep_id or 'at all'} has been published",
        where=f"model {config.model.name}, layout {config.output_layout}",
        remedy="Check model and sweep, or run once with mode=full.",
    )
