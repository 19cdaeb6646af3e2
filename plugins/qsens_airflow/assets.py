"""The asset that other DAGs can wait for."""

from __future__ import annotations

from airflow.sdk import Asset

# An event of it says that a sweep was published whole; see `GateOperator` for what it carries.
LAYER_ANALYSIS = Asset(name="qsens_layer_analysis", group="qsens")
