"""vLLM for CPUs in its own environment, as ``make test-serve`` makes it."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from qsens_airflow.parent import end_with_parent
from qsens_airflow.processes import end, free_port

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".cache" / "serve-venv" / "bin" / "python"
MODEL = "served"
# Log-probabilities a position at most; vLLM allows 20 unless told otherwise.
MOST = 1000
_SECONDS = 300
# vLLM would take half of the memory for keys and values.
_CACHE_GIB = "1"


@dataclass
class Vllm:
    """One server; use it as a context manager.

    Attributes:
        checkpoint: What it serves.
        dtype: The data type that it computes in.
        log: Where its output goes.
    """

    checkpoint: Path
    dtype: str
    log: Path

    def __post_init__(self) -> None:
        """Choose a port."""
        self.url = f"http://127.0.0.1:{free_port()}"

    def __enter__(self) -> Self:
        """Start it, and wait until it has loaded the checkpoint."""
        host, port = self.url.removeprefix("http://").split(":")
        # `vllm serve` looks for a distribution named vllm.
        words = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", self.checkpoint]
        words += ["--served-model-name", MODEL, "--dtype", self.dtype, "--host", host]
        words += ["--port", port, "--max-model-len", "256", "--max-logprobs", str(MOST)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": _CACHE_GIB,
            # Otherwise activations of INT4 weights are rounded to INT8.
            "VLLM_CPU_INT4_W4A8": "0",
            "OMP_NUM_THREADS": str(os.cpu_count()),
        }
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*map(str, words), "--enforce-eager"],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=end_with_parent(),
            )
        try:
            self._wait()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it, and all that it has started."""
        self._end()

    def _wait(self) -> None:
        last = time.monotonic() + _SECONDS
        while time.monotonic() < last:
            if self._process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise RuntimeError(f"vLLM did not start: {self.log.read_text(errors='replace')[-4000:]}")

    def _end(self) -> None:
        end([self._process], grace=30)
