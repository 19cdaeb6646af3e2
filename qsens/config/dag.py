"""What the Airflow DAG takes from configuration; no number depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from qsens.config.base import Frozen


class NotifierConfig(Frozen):
    """An Airflow notifier that is told how a run ended."""

    notifier: str = Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")
    """Import path of its class, ``airflow.providers.smtp.notifications.smtp.SmtpNotifier``."""
    arguments: dict[str, Any] = {}
    """Its arguments; in those that it renders, ``{{ notice.subject }}``, ``{{ notice.text }}``,
    ``{{ notice.html }}`` and ``{{ notice.json }}`` are the message."""


class TracesConfig(Frozen):
    """The model's own answers, which the DAG makes before a sweep where they are not there."""

    prompts: Path
    """File of what the model is asked, as ``qsens traces`` takes it."""
    out: Path
    """Where its answers go, ``.jsonl``: a file that the preset's data set reads."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Tokens of an answer at most."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token each time."""
    top_p: float = Field(default=1.0, ge=0, le=1)
    """The likeliest tokens that together have this probability are drawn from."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the draws."""
    batch_size: int = Field(default=8, ge=1)
    """Prompts that are answered together."""
    server: str | None = None
    """Address of a server of OpenAI's API that answers; the checkpoint itself does when null."""
    served_name: str | None = None
    """What the server calls the model; its first one when null."""


class DagConfig(Frozen):
    """What the Airflow DAG takes from configuration; no number depends on it."""

    schedule: str | None = "0 2 * * *"
    """Cron expression, UTC; none leaves the DAG to manual triggers."""
    max_active_runs: int = Field(default=4, ge=1, le=64)
    """Runs at once; the GPU pool and the result locks serialise the work itself."""
    pool: str = "default_pool"
    """Airflow pool that ``calibrate`` and ``score`` take a slot of."""
    retries: int = Field(default=2, ge=0, le=20)
    """Tries after the first for what may pass by itself."""
    retry_delay_seconds: int = Field(default=60, ge=0, le=86400)
    """Time before another try, in seconds."""
    gpus_per_task: int = Field(default=1, ge=1, le=64)
    """GPUs of one host that a task takes, all at once, and as many slots of the pool."""
    execution_timeout_minutes: int = Field(default=360, ge=1)
    """Time limit of one GPU task, in minutes: that of a whole lane."""
    lanes: Annotated[int, Field(ge=1, le=64)] | None = None
    """Shares that the grid is split into, one for each task at a time; null: as many tasks as the
    pool has slots for, where that is known."""
    traces: TracesConfig | None = None
    """The model's own answers, made first where they are not there; none makes none."""
    keep_sweeps: int = Field(default=30, ge=1)
    """Sweeps of a model that are kept, the newest, however old they are."""
    keep_days: int = Field(default=90, ge=1)
    """Days that every sweep is kept."""
    # Left out of plans, which are published: an argument may be somebody's address.
    notify: tuple[NotifierConfig, ...] = Field(default=(), exclude=True)
    """Airflow notifiers that are told how a run ended, each once a run."""
    notify_when: Literal["remarkable", "always"] = "remarkable"
    """``remarkable``: a run that failed, is PARTIAL, or moved beyond noise; ``always``: any."""
