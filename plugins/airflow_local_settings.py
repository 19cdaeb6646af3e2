"""Airflow imports this in each of its processes as they start, before any task does.

An ``airflow_local_settings`` of one's own stands before this one: it must do the same.
"""

from __future__ import annotations

from qsens_airflow.guard import hide

# Airflow takes what is named here for settings of its own.
__all__: list[str] = []

hide()
