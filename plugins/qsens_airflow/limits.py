"""What a run of the DAG may not do: read outside the roots, write where it likes, run foreign code.

A form is open to more people than the server's files are. What files below ``configs/`` say is
trusted; what a run adds to it is checked here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from airflow.sdk.configuration import conf

from qsens.config import Roots, SweepConfig, load_sweep
from qsens.errors import UserError

# Environment variable: more directories that a run may name, separated as in PATH.
DATA_ROOTS = "QSENS_DATA_ROOTS"
# Overrides that choose a file below configs/.
_CHOICES = ("model", "dataset", "quant_pair", "quant_granularity")
_WHERE = "a run of the DAG"


def load_run(preset: str, overrides: Sequence[str], roots: Roots) -> SweepConfig:
    """Return the configuration of a run, checked against what a run may set.

    Args:
        preset: The sweep preset.
        overrides: ``key=value`` strings from the run's params.
        roots: Where things lie.

    Raises:
        UserError: An override is wrong, or one that a run may not set.
    """
    config = load_sweep(preset, overrides, roots=roots).config
    chosen = [text for text in overrides if text.partition("=")[0].strip().lstrip("+") in _CHOICES]
    trusted = load_sweep(preset, chosen, roots=roots).config
    _refuse_changed("model.trust_remote_code", config.model.trust_remote_code, trusted.model)
    _refuse_changed("runner.output_dir", config.runner.output_dir, trusted.runner)
    for key in type(config.dag).model_fields:
        if key != "lanes":
            _refuse_changed(f"dag.{key}", getattr(config.dag, key), trusted.dag)
    known = set(_paths(trusted).values())
    allowed = allowed_roots(roots)
    for key, path in _paths(config).items():
        if path not in known:
            _refuse_foreign(key, path, allowed)
    return config


def allowed_roots(roots: Roots) -> list[Path]:
    """Return the directories that paths from a run must lie below, symbolic links resolved."""
    more = [Path(text) for text in os.environ.get(DATA_ROOTS, "").split(os.pathsep) if text]
    return list(dict.fromkeys(path.resolve() for path in (roots.root, roots.results, *more)))


def _paths(config: SweepConfig) -> dict[str, Path]:
    """Return every path that a sweep reads, by key, symbolic links resolved."""
    paths = {"model.path": config.model.path}
    for dataset in config.dataset:
        of = "dataset" if len(config.dataset) == 1 else f"dataset {dataset.name}"
        paths |= {f"{of}.directory": dataset.directory, f"{of}.images": dataset.images_root()}
        paths |= {
            f"{of}.files.{size}": path for size in dataset.files for path in dataset.paths(size)
        }
    return {key: path.resolve() for key, path in paths.items()}


def _refuse_foreign(key: str, path: Path, allowed: Sequence[Path]) -> None:
    """Refuse a path outside ``allowed``, and one within that is Airflow's or has a dotted name."""
    above = [root for root in allowed if path.is_relative_to(root)]
    if not above:
        raise UserError(
            f"'{path}' lies outside the directories that a run may read",
            where=f"{key} ({_WHERE})",
            remedy=f"Use a path below {', '.join(map(str, allowed))}; {DATA_ROOTS} adds others.",
        )
    within = [path.relative_to(root).parts for root in above]
    dotted = all(any(part.startswith(".") for part in parts) for parts in within)
    if dotted or _is_airflows(path, above):
        raise UserError(
            f"'{path}' lies where Airflow or qsens keeps what no run may read",
            where=f"{key} ({_WHERE})",
            remedy="Use a path out of AIRFLOW_HOME, its logs and names that start with a dot; "
            f"{DATA_ROOTS} may name a directory below such a name.",
        )


def _is_airflows(path: Path, above: Sequence[Path]) -> bool:
    """Return whether a path is part of Airflow's own state: passwords, logs, its database."""
    home = Path(os.environ.get("AIRFLOW_HOME") or "~/airflow").expanduser().resolve()
    own = {
        home / "airflow.db",
        Path(os.environ.get("AIRFLOW_CONFIG") or home / "airflow.cfg"),
        Path(conf.get("logging", "base_log_folder", fallback=home / "logs")),
        Path(
            conf.get("core", "simple_auth_manager_passwords_file", fallback=None)
            or home / "simple_auth_manager_passwords.json.generated"
        ),
    }
    # Whoever puts a root below AIRFLOW_HOME says that it is not Airflow's.
    if not any(root.is_relative_to(home) for root in above):
        own.add(home)
    return any(path.is_relative_to(part.expanduser().resolve()) for part in own)


def _refuse_changed(key: str, value: object, trusted: object) -> None:
    if value != getattr(trusted, key.rpartition(".")[2]):
        raise UserError(
            "cannot be set from a run of the DAG",
            where=key,
            remedy="Set it in a file below configs/, which the server's owner keeps.",
        )
