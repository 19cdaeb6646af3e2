"""The settings of a small Airflow on this machine."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def environment_of(
    home: Path, root: Path, *, url: str, user: str, password_file: Path, slots: int
) -> dict[str, str]:
    """Return the environment of Airflow's components: SQLite, LocalExecutor, one user.

    Settings of another Airflow that this process has in its environment are left out; secrets are
    drawn anew.

    Args:
        home: ``AIRFLOW_HOME``.
        root: The checkout: ``dags/``, ``plugins/`` and the package itself.
        url: Address that the api-server will have.
        user: Name of the one user, who may do everything.
        password_file: JSON file with the password of every user.
        slots: Tasks that run at once.
    """
    own = {key: value for key, value in os.environ.items() if not key.startswith("AIRFLOW__")}
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    settings = {
        "CORE__EXECUTOR": "LocalExecutor",
        "CORE__PARALLELISM": str(slots),
        "CORE__LOAD_EXAMPLES": "false",
        "CORE__DAGS_FOLDER": str(root / "dags"),
        "CORE__PLUGINS_FOLDER": str(root / "plugins"),
        "CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "CORE__SIMPLE_AUTH_MANAGER_USERS": f"{user}:admin",
        "CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(password_file),
        "DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}?timeout=60",
        "API__BASE_URL": url,
        "API__SECRET_KEY": secrets.token_urlsafe(32),
        "API__MAXIMUM_PAGE_LIMIT": "1000",
        "API_AUTH__JWT_SECRET": secrets.token_urlsafe(48),
        "LOGGING__BASE_LOG_FOLDER": str(home / "logs"),
        "SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.5",
        # A slot may stay taken for as long as this after its task has ended.
        "WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
        "DAG_PROCESSOR__PARSING_PROCESSES": "1",
    }
    airflow = {f"AIRFLOW__{key}": value for key, value in settings.items()}
    return own | airflow | {"AIRFLOW_HOME": str(home), "PYTHONPATH": path}
