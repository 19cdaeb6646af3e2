"""Where things lie: the project root, the results root, the directories of configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from qsens.errors import UserError

# Packed beside this package in a wheel; at the top of the tree in a checkout.
_PACKAGED = Path(__file__).resolve().parent.parent / "configs"
_CHECKOUT = Path(__file__).resolve().parent.parent.parent / "configs"


@dataclass(frozen=True)
class Roots:
    """The directories that every relative path is resolved against.

    Attributes:
        root: ``QSENS_ROOT``, or the nearest parent of the working directory that has ``configs/``,
            or the working directory.
        results: ``QSENS_RESULTS``, or ``root``.
        configs: Directories of configuration files; an earlier one wins.
    """

    root: Path
    results: Path
    configs: tuple[Path, ...]

    @classmethod
    def from_environment(cls) -> Roots:
        """Read the roots from ``QSENS_ROOT``, ``QSENS_RESULTS`` and ``QSENS_CONFIG_DIR``.

        Raises:
            UserError: One of the variables names a directory that does not exist.
        """
        root = _directory("QSENS_ROOT") or _nearest_root(Path.cwd())
        results = os.environ.get("QSENS_RESULTS")
        own = _directory("QSENS_CONFIG_DIR")
        shipped = _CHECKOUT if _CHECKOUT.is_dir() else _PACKAGED
        configs = [own] if own else []
        if (root / "configs").is_dir():
            configs.append(root / "configs")
        configs.append(shipped)
        return cls(
            root=root,
            results=(root / results).resolve() if results else root,
            configs=tuple(dict.fromkeys(path.resolve() for path in configs)),
        )

    def resolve(self, path: str | Path) -> Path:
        """Return ``path`` as an absolute path; a relative one starts at ``root``."""
        return (self.root / Path(path).expanduser()).resolve()


def _directory(variable: str) -> Path | None:
    value = os.environ.get(variable)
    if not value:
        return None
    path = Path(value).expanduser().resolve()
    if not path.is_dir():
        raise UserError(
            f"'{path}' is no directory",
            where=f"environment variable {variable}",
            remedy=f"Create it, or unset {variable}.",
        )
    return path


def _nearest_root(start: Path) -> Path:
    for directory in (start, *start.parents):
        if (directory / "configs").is_dir():
            return directory
    return start
