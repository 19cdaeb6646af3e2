from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult

ROOT = Path(__file__).resolve().parent.parent
# Directories that need more than the environment of `make test`: programs of Debian, another
# environment, minutes. Only who names them runs them, as `make test-stack` does.
APART = [ROOT / "tests" / "stack", ROOT / "tests" / "serve"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Pass over the directories that stand apart unless they, or files in them, are named."""
    named = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    for here in APART:
        if collection_path.is_relative_to(here):
            return None if any(path.is_relative_to(here) for path in named) else True
    return None


@pytest.fixture(scope="session")
def demo_checkpoint() -> DemoResult:
    """The trained demo checkpoint, built once for all workers and kept between runs."""
    from qsens.demo import checkpoint

    cache = ROOT / ".cache" / "demo-model"
    cache.mkdir(parents=True, exist_ok=True)
    digest = checkpoint.recipe_digest()[:12]
    with FileLock(cache / f"{digest}.lock"):
        return checkpoint.build(cache / digest)
