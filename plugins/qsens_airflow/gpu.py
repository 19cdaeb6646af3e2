"""What the operators that take GPUs share: devices of its own for each task of a host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowFailException

from qsens.errors import UserError
from qsens.grid import Plan, read_plan
from qsens_airflow.base import QsensOperator
from qsens_airflow.lease import VISIBLE, devices_to_lease, take


class GpuOperator(QsensOperator):
    """Base of the operators that run a verb on GPUs.

    Args:
        gpus: How many it takes, all at once.
    """

    def __init__(self, *, gpus: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gpus = gpus

    def run_on_device(self, context: Context, *arguments: str) -> dict[str, Any]:
        """Run ``qsens`` with devices of its own where tasks share several."""
        with self._device(context) as (environment, inherited):
            return self.run_verb(context, *arguments, environment=environment, inherited=inherited)

    def device_wanted(self) -> str | None:
        """Return ``autoquant.device``; none where there is nothing to compute."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """What the task is called where it waits."""
        return str(self.task_id)

    @contextmanager
    def _device(self, context: Context) -> Iterator[tuple[dict[str, str], tuple[int, ...]]]:
        """Lease GPUs where tasks share several; what needs none goes without."""
        devices = devices_to_lease()
        wanted = _allowed(self.device_wanted(), devices) if devices else []
        if not wanted:
            yield {}, ()
            return
        if self.gpus > len(wanted):
            raise AirflowFailException(
                f"{self.title}: takes {self.gpus} devices (dag.gpus_per_task), and this host has "
                f"{len(wanted)}: {', '.join(wanted)}"
            )
        lease = take(wanted, self.gpus)
        if lease is None:
            free = "no device is" if self.gpus == 1 else f"fewer than {self.gpus} devices are"
            raise self.give_back(context, f"{self.title}: {free} free of {', '.join(wanted)}")
        self.log.info("Devices %s", lease.devices)
        try:
            # A device that the plan names by its number needs the others before it in sight.
            yield {VISIBLE: lease.devices} if wanted == devices else {}, lease.descriptors
        finally:
            lease.release()


class PlannedOperator(GpuOperator):
    """Base of the operators that run a verb of a plan on GPUs.

    Args:
        plan: Path of the plan.
    """

    template_fields: Sequence[str] = ("plan",)

    def __init__(self, *, plan: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.plan = plan

    def run_planned(self, context: Context, verb: str, *arguments: str) -> dict[str, Any]:
        """Run ``qsens VERB --plan ...`` with devices of its own where tasks share several."""
        return self.run_on_device(context, verb, "--plan", self.plan, *arguments)

    def nothing_to_compute(self, plan: Plan) -> bool:
        """Return whether the verb needs no device, since what it makes is there."""
        raise NotImplementedError

    def device_wanted(self) -> str | None:
        """Return what the plan says; none where there is nothing to compute."""
        try:
            plan = read_plan(Path(self.plan))
            return None if self.nothing_to_compute(plan) else plan.config.autoquant.device
        except UserError:  # the child says it
            return None


def _allowed(wanted: str | None, devices: list[str]) -> list[str]:
    """Return those of the devices that ``autoquant.device`` allows."""
    if wanted in ("auto", "cuda", "cuda:0"):
        return devices
    number = (wanted or "").removeprefix("cuda:")
    return devices[int(number) :][:1] if number.isdigit() else []
