"""The Airflow pool that GPU tasks take a slot of: does it exist, and how many slots has it?

A task cannot ask Airflow itself: the API of tasks knows no pools. Two things tell:

* the connection ``qsens_airflow`` (HTTP: host, login, password), if there is one: `plan` asks the
  REST API as that user, who needs to read pools only;
* ``QSENS_GPUS``, the number of slots that the pool was made with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from qsens.errors import UserError

CONNECTION = "qsens_airflow"
# Environment variable that gives the connection.
CONNECTION_VARIABLE = f"AIRFLOW_CONN_{CONNECTION.upper()}"
SLOTS_VARIABLE = "QSENS_GPUS"
# Airflow's own pool: its slots stand for no device.
DEFAULT_POOL = "default_pool"
MOST_LANES = 64


def connection_text(url: str, user: str, password: str) -> str:
    """Return the connection as its environment variable takes it."""
    return json.dumps({"conn_type": "http", "host": url, "login": user, "password": password})


def lanes_of(pool: str, gpus_per_task: int, log: Callable[[str], None]) -> int:
    """Return the lanes that the slots of ``pool`` serve; 1 where nothing says how many.

    Args:
        pool: Name of the pool.
        gpus_per_task: Slots that each task takes.
        log: Gets a line on what is known.

    Raises:
        UserError: The pool does not exist, or has fewer slots than a task takes.
    """
    stated = _stated()
    known = _asked(pool, log)
    slots = stated if known is None else known
    if slots is None:
        log(f"Pool {pool}: size unknown (neither connection {CONNECTION} nor {SLOTS_VARIABLE})")
        return 1
    log(f"Pool {pool}: {slots} slots")
    if slots == 0:
        raise UserError(
            "has no slot: tasks that need one would wait for ever",
            where=f"Airflow pool {pool}, size 0",
            remedy=f"Give it a slot for each GPU: `airflow pools set {pool} N GPUs`.",
        )
    if 0 < slots < gpus_per_task:
        raise UserError(
            f"has {slots} slots, and a task takes {gpus_per_task}: it would wait for ever",
            where=f"Airflow pool {pool}, dag.gpus_per_task",
            remedy=f"Give it a slot for each GPU: `airflow pools set {pool} N GPUs`.",
        )
    if slots < 0 or (pool == DEFAULT_POOL and stated is None):
        return 1
    return min(slots // gpus_per_task, MOST_LANES)


def _stated() -> int | None:
    text = os.environ.get(SLOTS_VARIABLE)
    if not text:
        return None
    if not text.isdecimal():
        raise UserError(
            f"'{text}' is no number of slots",
            where=f"environment variable {SLOTS_VARIABLE}",
            remedy="Set it to the number of slots of the GPU pool, or unset it.",
        )
    return int(text)


def _asked(pool: str, log: Callable[[str], None]) -> int | None:
    """Ask the REST API for the size of ``pool``; none where it cannot be asked."""
    # Not while a DAG file is parsed, nor before Airflow has its settings.
    import httpx
    from airflow.sdk import Connection

    from qsens_airflow.rest import Client

    try:
        connection = Connection.get(CONNECTION)
    except Exception as error:  # not found is said in different ways by different backends
        if CONNECTION_VARIABLE in os.environ:
            log(f"Connection {CONNECTION} cannot be read: {error}")
        return None
    client: Client | None = None
    try:
        client = Client(
            connection.host or "",
            "",
            user=connection.login or "",
            password=connection.password or "",
        )
        slots = client.pool_slots(pool)
    except (httpx.HTTPError, RuntimeError, ValueError) as error:
        log(f"Airflow's REST API cannot be asked for pool {pool}: {error}")
        return None
    finally:
        if client is not None:
            client.close()
    if slots is None:
        raise UserError(
            "does not exist: tasks that need a slot of it would wait for ever",
            where=f"Airflow pool {pool}",
            remedy=f"Make it with a slot for each GPU: `airflow pools set {pool} N GPUs`.",
        )
    return slots
