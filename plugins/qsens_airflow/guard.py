"""What keeps Airflow's secrets from the processes that its tasks start.

A checkpoint's code may run in those, as the same user: under another one they could not be ended.
Two doors are shut: a child's environment holds what a computation needs and nothing else, and the
kernel shows no environment or memory of a process that hides itself. ``docs/airflow.md`` says which
doors stay open.
"""

from __future__ import annotations

from collections.abc import Mapping

from qsens_airflow.prctl import SET_DUMPABLE, prctl

# Environment variable: names of more variables that a child gets, separated by commas.
MORE = "QSENS_CHILD_ENVIRONMENT"
# Not HF_*: there are tokens among them, and no step of a sweep fetches anything.
_NAMES = frozenset({
    "HOME", "HOSTNAME", "LANG", "LANGUAGE", "LOGNAME", "PATH", "SHELL", "TEMP", "TERM", "TMP",
    "TMPDIR", "TZ", "USER", "VIRTUAL_ENV", "NO_COLOR", "FORCE_COLOR", "COLUMNS",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_MODULES_CACHE",
})  # fmt: skip
_PREFIXES = (
    *("QSENS_", "PYTHON", "LC_", "LD_", "XDG_", "MALLOC_"),
    *("CUDA", "NVIDIA_", "NCCL_", "CUBLAS_", "CUDNN_", "HIP_", "ROCR_", "HSA_", "MIOPEN_"),
    *("TORCH", "PYTORCH_", "TRITON_", "TRANSFORMERS_", "TOKENIZERS_", "SAFETENSORS_", "MODELOPT_"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "BLIS_", "OPENBLAS_", "NUMEXPR_", "NPY_"),
)


def hide() -> None:
    """Hide this process's environment and memory from its user's other processes; Linux only.

    Processes that it forks are hidden as well, until they run another program. Root sees them all.
    It cannot be traced by its user, and leaves no core dump.
    """
    prctl(SET_DUMPABLE, 0)


def computing_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the part of an environment that a computation needs.

    Args:
        environment: That of a process of Airflow, which holds its secrets too.
    """
    more = {name.strip() for name in environment.get(MORE, "").split(",")}
    wanted = _NAMES | more
    return {
        name: text
        for name, text in environment.items()
        if name in wanted or name.startswith(_PREFIXES)
    }
