"""One running stack for all tests of this directory.

``make test-stack`` names this directory; ``make test`` passes it over, since it needs Debian's
packages of PostgreSQL, Redis and Chromium, and ten minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.stack.stack import Stack


@pytest.fixture(scope="session")
def stack(demo_checkpoint: Any) -> Iterator[Stack]:
    from tests.stack.stack import Stack, lacks

    missing = lacks()
    if missing:
        pytest.fail(f"the stack needs Debian's packages: apt-get install {' '.join(missing)}")
    with Stack(demo_checkpoint.directory) as stack:
        yield stack
    assert stack.processes() == []
