from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def demo_checkpoint() -> DemoResult:
    """The trained demo checkpoint, built once for all workers and kept between runs."""
    from qsens.demo import checkpoint

    cache = ROOT / ".cache" / "demo-model"
    cache.mkdir(parents=True, exist_ok=True)
    digest = checkpoint.recipe_digest()[:12]
    with FileLock(cache / f"{digest}.lock"):
        return checkpoint.build(cache / digest)
