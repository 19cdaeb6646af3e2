"""What Airflow shows of qsens: a menu entry, and the report of a run on the run's own page."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from airflow.plugins_manager import AirflowPlugin
from airflow.sdk.configuration import conf

from qsens_airflow.mount import LazyApp

PREFIX = "/qsens"
_BASE = urlsplit(conf.get("api", "base_url", fallback="")).path.rstrip("/") + PREFIX


class QsensPlugin(AirflowPlugin):
    """The reports, behind Airflow's login."""

    name = "qsens"
    fastapi_apps: list[Any] = [{"app": LazyApp(), "url_prefix": PREFIX, "name": "qsens reports"}]
    external_views: list[Any] = [
        {
            "name": "Layer sensitivity",
            "href": f"{_BASE}/",
            "destination": "nav",
            "category": "browse",
            "url_route": "layer-sensitivity",
        },
        {
            "name": "Sensitivity report",
            "href": f"{_BASE}/runs/{{DAG_ID}}/{{RUN_ID}}",
            "destination": "dag_run",
            "url_route": "sensitivity-report",
        },
    ]
