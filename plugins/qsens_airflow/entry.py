"""How the commands of this package start and end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from qsens.errors import QsensError


def run(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` and leave with its exit code.

    SIGTERM and SIGHUP become an exit, so that context managers stop what they started; an error on
    purpose is one message.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, frame: sys.exit(128 + received))
    try:
        sys.exit(main())
    except QsensError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
