"""One of several processes that share the samples of a pass; never the one that leads.

    python -m qsens.pipeline.worker PLAN RANK COUNT MEETING LEADER

It loads the checkpoint of a plan, then does what the leading process says until that one ends it,
or ends. It writes no result. That it is ready, and why it ended by itself, it leaves beside
``MEETING``. Imports torch.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from qsens.errors import QsensError
from qsens.grid import read_plan
from qsens.writing import write_text

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def main(words: list[str]) -> None:
    """Run it.

    Args:
        words: The plan, this process' rank, how many they are, the file that they meet by, and the
            process id of the one that leads.
    """
    plan, meeting = Path(words[0]), Path(words[3])
    rank, count, leader = int(words[1]), int(words[2]), int(words[4])
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != leader:  # it had ended before that
        return
    try:
        # After that: importing torch takes seconds.
        from qsens.engine.scores import silent
        from qsens.engine.team import ProcessTeam, join
        from qsens.pipeline.loading import load_checkpoint

        model = load_checkpoint(read_plan(plan), silent, rank=rank).model
        ready_of(meeting, rank).touch()
        team = ProcessTeam(rank, count, meeting)
        join(model, team)
        team.follow(model)
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        told = {"error": type(error).__name__, "what": first}
        if isinstance(error, QsensError):
            told = error.as_dict()
        write_text(reason_of(meeting, rank), json.dumps(told))
        raise


def ready_of(meeting: Path, rank: int) -> Path:
    """Return the file that says that a process is about to join."""
    return meeting.with_name(f"{rank}.ready")


def reason_of(meeting: Path, rank: int) -> Path:
    """Return the file that says why a process ended."""
    return meeting.with_name(f"{rank}.reason.json")


if __name__ == "__main__":
    main(sys.argv[1:])
