"""Where the plan of a run of the DAG lies."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from qsens.config import Roots, SweepConfig
from qsens.errors import UserError


def plan_of_run(roots: Roots, run_id: str) -> Path:
    """Return the file that the plan of an Airflow run is written to.

    Args:
        roots: Where results go.
        run_id: The run's id; anything that a directory's name should not hold is replaced.
    """
    name = re.sub(r"[^A-Za-z0-9-]+", "_", run_id)[:80]
    mark = hashlib.sha256(run_id.encode()).hexdigest()[:8]
    return roots.results / ".plans" / f"{name}-{mark}" / "plan.json"


def plan_of_sweep(config: SweepConfig, roots: Roots, sweep_id: str | None) -> Path:
    """Return the plan of a sweep that was published before.

    Args:
        config: Says which model, and which layout.
        roots: Where results lie.
        sweep_id: The sweep; the newest when not given.

    Raises:
        UserError: There is no such sweep.
    """
    if config.runner.output_dir is not None:
        found = [config.runner.output_dir / "plan.json"]
    else:
        layouts = {
            "tmp": roots.results / "tmp",
            "publish": roots.results / "models" / config.model.name / "layer-analysis" / "sweeps",
        }
        found = sorted(layouts[config.output_layout].glob("*/plan.json"))
    if sweep_id and config.runner.output_dir is None:
        found = [plan for plan in found if plan.parent.name == sweep_id]
    found = [plan for plan in found if plan.is_file()]
    if found:
        return found[-1]
    raise UserError(
        f"no sweep {sweep_id or 'at all'} has been published",
        where=f"model {config.model.name}, layout {config.output_layout}",
        remedy="Check model and sweep_id, or run once with mode=full.",
    )
