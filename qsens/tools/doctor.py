"""What would fail here: devices, versions, disk, checkpoint."""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from qsens.checkpoint.components import resolve_components
from qsens.checkpoint.quantized import shapes
from qsens.config import Roots, choices, load_sweep
from qsens.data.captions import identify_samples
from qsens.errors import QsensError
from qsens.locks import try_lock
from qsens.pipeline.plan import installed_version, picture_reader, token_counter
from qsens.pipeline.preflight import existing
from qsens.reading import below
from qsens.store import CELLS, CHECKPOINTS, MODELS, TMP, publishing_lock
from qsens.writing import writing

_GIB = 1 << 30
_LOW_DISK = 5 * _GIB


def examine() -> dict[str, Any]:
    """Return what is installed and free here, and a line for everything that would fail."""
    roots = Roots.from_environment()
    problems: list[str] = []
    there = existing(roots.results)
    usage = shutil.disk_usage(there)
    problems += _unwritable(roots.results, there)
    if usage.free < _LOW_DISK:
        problems.append(f"{usage.free / _GIB:.1f} GiB are free below {roots.results}")
    if not (3, 11) <= sys.version_info[:2] < (3, 15):
        problems.append(f"Python {platform.python_version()} is not among those supported")
    versions = {
        name: installed_version(name)
        for name in ("qsens", "torch", "transformers", "nvidia-modelopt", "apache-airflow")
    }
    problems += [
        f"{name} is not installed"
        for name in ("torch", "transformers", "nvidia-modelopt")
        if versions[name] == "none"
    ]
    has_qwen3_vl = _has("transformers.models.qwen3_vl")
    if not has_qwen3_vl:
        problems.append("this transformers has no qwen3_vl: install 4.57 or newer")
    return {
        "python": platform.python_version(),
        "versions": versions,
        "transformers_has_qwen3_vl": has_qwen3_vl,
        "devices": _devices(problems),
        "root": str(roots.root),
        "results": str(roots.results),
        "configs": [str(path) for path in roots.configs],
        "disk_free_gib": round(usage.free / _GIB, 1),
        "results_used_gib": round(_used(roots.results) / _GIB, 3),
        "presets": {name: _preset(name, roots) for name in choices("sweep", roots)},
        "problems": problems,
    }


def _unwritable(results: Path, there: Path) -> list[str]:
    """Say why nothing can be written to the results root, or to what is there above it, if so."""
    try:
        if there == results:  # whoever writes there locks it
            lock = publishing_lock(results)
            if try_lock(lock):
                lock.release()
        else:
            with writing(there), tempfile.TemporaryFile(dir=there):
                pass
    except QsensError as error:
        return [f"{error.where}: {error.what}"]
    return []


def _preset(name: str, roots: Roots) -> str:
    """Say whether a preset could be planned; hashes nothing."""
    try:
        config = load_sweep(name, roots=roots).config
        shapes(config.model.path)
        resolve_components(config.model)
        for dataset in config.dataset:
            identify_samples(dataset, dataset.size, None, token_counter(config.model, dataset))
            picture_reader(config, dataset, roots)
    except QsensError as error:
        return f"{error.where}: {error.what}"
    return "ready"


def _devices(problems: list[str]) -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if not names:
        problems.append("no GPU is visible: work runs on the CPU, slowly for a large checkpoint")
    return [*names, "cpu"]


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _used(results: Path) -> int:
    """Return the bytes that qsens keeps below the results root."""
    total = 0
    for name in (CELLS, MODELS, TMP):
        for path in below(results / name):
            with contextlib.suppress(OSError):
                if path.is_file() and CHECKPOINTS not in path.parts:
                    total += path.stat().st_size
    return total
