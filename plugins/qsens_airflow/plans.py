"""Where the plan of a run of the DAG lies."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

from qsens.config import Roots, SweepConfig
from qsens.errors import UserError
from qsens.published import Published, published_sweeps, shown_sweeps
from qsens.store import ANALYSIS, MODELS, PLAN, PLANS, SWEEPS, TMP


def plan_of_run(roots: Roots, run_id: str) -> Path:
    """Return the file that the plan of an Airflow run is written to.

    Args:
        roots: Where results go.
        run_id: The run's id; anything that a directory's name should not hold is replaced.
    """
    name = re.sub(r"[^A-Za-z0-9-]+", "_", run_id)[:80]
    mark = hashlib.sha256(run_id.encode()).hexdigest()[:8]
    return roots.results / PLANS / f"{name}-{mark}" / PLAN


def plans_to_publish(config: SweepConfig, roots: Roots, sweep_id: str | None) -> list[Path]:
    """Return the plans of published sweeps whose reports a report-only run makes again.

    Only sweeps of the model that ``config`` names, in every layout.

    Args:
        config: Says which model, and which layout.
        roots: Where results lie.
        sweep_id: One sweep. When not given: every sweep that the directory of a published cell
            shows, and the newest one, in the order of their publication; in the layout ``tmp``, the
            newest alone.

    Raises:
        UserError: There is no such sweep of that model.
    """
    model = config.model.name
    shown: set[str] = set()
    if config.runner.output_dir is not None:
        where = f"{config.runner.output_dir}"
        sweeps = [Published.read(config.runner.output_dir)]
        sweep_id = None
    elif config.output_layout == "tmp":
        where = f"{roots.results / TMP}"
        sweeps = published_sweeps(roots.results / TMP)
    else:
        analysis = roots.results / MODELS / model / ANALYSIS
        where = f"{analysis / SWEEPS}"
        # All that lies below a model's directory is that model's, unless it says otherwise.
        sweeps = [
            replace(sweep, model=sweep.model or model)
            for sweep in published_sweeps(analysis / SWEEPS)
        ]
        shown = shown_sweeps(analysis)
    sweeps = [sweep for sweep in sweeps if sweep.model == model]
    if sweep_id:
        sweeps = [sweep for sweep in sweeps if sweep.directory.name == sweep_id]
    else:
        sweeps = [sweep for sweep in sweeps if sweep is sweeps[-1] or sweep.directory.name in shown]
    if sweeps:
        return [sweep.plan for sweep in sweeps]
    raise UserError(
        f"no sweep {sweep_id or 'at all'} of the model '{model}' has been published there",
        where=where,
        remedy="Check model, layout and sweep, or run once with mode=full.",
    )
