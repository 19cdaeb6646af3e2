"""The operator that lets the model answer prompts, for a data set that reads its answers."""

from __future__ import annotations

from typing import Any

from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from qsens.config import Roots, SweepConfig
from qsens.errors import UserError
from qsens_airflow.base import one_line
from qsens_airflow.gpu import GpuOperator
from qsens_airflow.limits import load_run
from qsens_airflow.params import SweepParams


class TracesOperator(GpuOperator):
    """Make sure that the answers of ``dag.traces`` are there; what is there stays as it is.

    Skipped by a run that computes nothing, and where its preset asks for none.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._device_of_run: str | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        """Run ``qsens traces``; one that was interrupted goes on where it ended."""
        try:
            params = SweepParams.read(context["params"])
            if params.mode == "report_only":
                raise AirflowSkipException("a run that computes nothing asks the model nothing")
            config = load_run(params.preset, params.as_overrides(), Roots.from_environment())
        except UserError as error:
            raise AirflowFailException(one_line(error.as_dict())) from None
        traces = config.dag.traces
        if traces is None:
            raise AirflowSkipException(f"the preset {params.preset} asks for no answers")
        if traces.out.is_file():
            self.log.info("%s is there already", traces.out)
            return {"file": str(traces.out)}
        if traces.server is None:
            self._device_of_run = config.autoquant.device
        return self.run_on_device(context, "traces", *_words(config))

    def device_wanted(self) -> str | None:
        """Return that of the run; none where a server answers."""
        return self._device_of_run


def _words(config: SweepConfig) -> list[str]:
    """Return the arguments of ``qsens traces``."""
    traces = config.dag.traces
    assert traces is not None
    given = {
        "out": traces.out,
        "max-new-tokens": traces.max_new_tokens,
        "temperature": traces.temperature,
        "top-p": traces.top_p,
        "seed": traces.seed,
        "batch-size": traces.batch_size,
        "server": traces.server,
        "served-name": traces.served_name,
        "dtype": config.model.dtype,
        "device": config.autoquant.device,
    }
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return [*options, "--", str(config.model.path), str(traces.prompts)]
