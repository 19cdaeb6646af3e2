"""The DAG ``qsens_sweep``: plan, every cell's calibration and score, audit, publish, prune, gate.

What it can be given, and its settings, come from the configuration; see
:mod:`qsens_airflow.settings` for the environment variables that choose the preset and the schedule.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from airflow.sdk import TriggerRule, dag, task_group

from qsens_airflow.assets import LAYER_ANALYSIS
from qsens_airflow.audit import AuditOperator
from qsens_airflow.cells import CalibrateOperator, ScoreOperator
from qsens_airflow.notices import remember, tell
from qsens_airflow.operators import GateOperator, PlanOperator, PublishOperator
from qsens_airflow.params import dag_params
from qsens_airflow.prune import PruneOperator
from qsens_airflow.settings import DagSettings
from qsens_airflow.traces import TracesOperator

DOC = """
### Which layers break when they are quantized?

Sweeps precision pairs × calibration sizes over a checkpoint, and publishes manifests and reports.

`plan` → one `cell` a pair and size: `calibrate` → `score` → `audit` → `publish` → `prune` → `gate`

* **A run is green only if its grid is complete.** Cells fail alone; `publish` says PARTIAL for
  what is missing, and `gate` turns the run red and lists every missing or partial cell with its
  reason.
* **Scores are checked** where `autoquant.audit` says so: `audit` measures the true KL divergence of
  some groups, and gives each pair a verdict. Its failure keeps no report from being made.
* **Nothing is computed twice.** A cell whose result is there is done at once, unless `force`.
* **The model's own answers**, where the DAG's preset asks for them (`dag.traces`): `traces` makes
  the file of samples before `plan` reads it.
* **Reports again:** a new run with `mode=report_only`, or clear `publish` of an old run. Neither
  runs a GPU task.
* **Refused before any GPU time is spent:** a checkpoint or captions that are not there, a format
  that fits no weight, a full disk, a pool that does not exist or has no slot.
* **One message a run**, from `gate`, to the notifiers of the configuration (`dag.notify`): when
  it failed, is PARTIAL, or moved beyond noise.
* Other DAGs can wait for the asset `qsens_layer_analysis`: it has an event of every complete run.
* Results must lie on storage that all workers share (`QSENS_RESULTS`).
"""

settings = DagSettings.from_environment()


@dag(
    dag_id="qsens_sweep",
    description="Layer sensitivity to quantization: precision pairs × calibration sizes",
    doc_md=DOC,
    schedule=settings.schedule,
    start_date=datetime(2025, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=settings.dag.max_active_runs,
    params=dag_params(settings.preset),
    default_args={
        "retries": settings.dag.retries,
        "retry_delay": timedelta(seconds=settings.dag.retry_delay_seconds),
        "execution_timeout": settings.execution_timeout(),
    },
    tags=["qsens", "quantization"],
)
def qsens_sweep() -> None:
    """Lay out the DAG."""
    plan = PlanOperator(
        task_id="plan",
        gpu_pool=settings.pool,
        gpus_per_task=settings.dag.gpus_per_task,
        makes_traces=settings.dag.traces is not None,
        # The answers are not made again by a run that computes nothing.
        trigger_rule=TriggerRule.NONE_FAILED,
        on_failure_callback=remember,
        doc_md="Validates the params, writes `plan.json` and returns one entry a cell. "
        "With `mode=report_only` it finds the plans of published sweeps and returns no cell.",
    )

    @task_group(group_id="cell")
    def each_cell(cell: str, plan: str) -> None:
        calibrate = CalibrateOperator(
            task_id="calibrate",
            cell=cell,
            plan=plan,
            map_index_template="{{ task.title }}",
            doc_md="Makes sure that the cell's calibrated amax are there.",
            **settings.gpu_task(),
        )
        score = ScoreOperator(
            task_id="score",
            cell=cell,
            plan=plan,
            map_index_template="{{ task.title }}",
            doc_md="Makes sure that the cell's result is there: one score a layer.",
            **settings.gpu_task(),
        )
        calibrate >> score

    audit = AuditOperator(
        task_id="audit",
        plan="{{ ti.xcom_pull(task_ids='plan', key='plan') or '' }}",
        # Skipped with the group of cells, without a slot of the pool; a cell that failed is left
        # out.
        trigger_rule=TriggerRule.ALL_DONE_MIN_ONE_SUCCESS,
        on_failure_callback=remember,
        doc_md="Holds the scores of each pair against the true KL divergence of some groups; "
        "skipped where `autoquant.audit` is none.",
        **settings.gpu_task(),
    )
    publish = PublishOperator(
        task_id="publish",
        # Not the XComArg: that raises, and is tried again, when `plan` has failed.
        plan="{{ ti.xcom_pull(task_ids='plan', key='plan') or '' }}",
        trigger_rule=TriggerRule.ALL_DONE,
        on_failure_callback=remember,
        doc_md="Copies results into the layout and writes the reports; computes nothing. "
        "Clear this task alone to make the reports of an old run again.",
    )
    prune = PruneOperator(
        task_id="prune",
        keep_sweeps=settings.dag.keep_sweeps,
        keep_days=settings.dag.keep_days,
        retries=0,
        doc_md="Removes old sweeps and what only they refer to. Its failure changes nothing else.",
    )
    gate = GateOperator(
        task_id="gate",
        # Runs whatever happened, since it is what tells; the XComArg would raise then.
        published="{{ ti.xcom_pull(task_ids='publish') | tojson }}",
        trigger_rule=TriggerRule.ALL_DONE,
        outlets=[LAYER_ANALYSIS],
        retries=0,
        on_success_callback=tell,
        on_failure_callback=tell,
        doc_md="Fails when cells are missing or partial; its log lists each with its reason. "
        "Otherwise the asset `qsens_layer_analysis` gets an event: index, counts, the five "
        "first groups.",
    )
    each_cell.expand_kwargs(plan.output) >> audit >> publish >> prune >> gate
    plan >> publish
    if settings.dag.traces is not None:
        traces = TracesOperator(
            task_id="traces",
            on_failure_callback=remember,
            doc_md="Lets the unquantized model answer the prompts of `dag.traces`, for a data set "
            "that reads its answers; a file that is there stays as it is.",
            **settings.gpu_task(gpus=1),
        )
        traces >> plan


qsens_sweep()
