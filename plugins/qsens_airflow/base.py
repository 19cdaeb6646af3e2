"""What the operators share: run a verb, and turn how it ends into Airflow's terms."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk import BaseOperator, Context
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowRescheduleException,
)

from qsens.errors import AnswerIsNo, OutOfMemory, TryAgain, UserError
from qsens_airflow.child import Child, Ended

_FINAL = (UserError.exit_code, AnswerIsNo.exit_code)
# The executor reports a rescheduled task as ended some seconds later. If the task is queued again
# by then, the scheduler takes it for lost, kills it and counts a try; so the pause is not short.
PAUSE = timedelta(seconds=30)
_WAIT_AT_MOST = timedelta(hours=6)


class QsensOperator(BaseOperator):
    """Base of the operators that run a verb of the command line.

    A failure that the user must mend (exit codes 2 and 3) is final. One that may pass by itself
    (75) gives the slot back and comes again, for as long as the task may run, before it counts as
    a try. All else, death by a signal included, counts as a try.
    """

    _child: Child | None = None

    def run_verb(self, context: Context, *arguments: str) -> dict[str, Any]:
        """Run ``qsens`` with ``arguments`` and return the JSON that it prints."""
        self._child = Child([*arguments[:1], "--json", *arguments[1:]])
        ended = self._child.run(self.log.info)
        if ended.code == 0 and not ended.killed and ended.answer is not None:
            return ended.answer
        raise self._failure(ended, arguments[0], context)

    def on_kill(self) -> None:
        """End the child and all that it started."""
        if self._child is not None:
            self._child.kill()

    def _failure(self, ended: Ended, verb: str, context: Context) -> Exception:
        """Return the exception that says how the child failed."""
        if ended.signal:
            return AirflowException(f"qsens {verb} was ended by {ended.signal}")
        if ended.code == 0:
            return AirflowException(f"qsens {verb} printed no JSON object")
        line = one_line(ended.answer) if ended.answer else f"qsens {verb}: see the log above"
        if ended.code in _FINAL:
            return AirflowFailException(line)
        if ended.code == TryAgain.exit_code:
            waited = int(context.get("task_reschedule_count") or 0) * PAUSE
            if waited < (self.execution_timeout or _WAIT_AT_MOST):
                self.log.info("%s | Slot given back for %s s.", line, PAUSE.seconds)
                back = datetime.now(UTC) + PAUSE
                return AirflowRescheduleException(back)  # type: ignore[no-untyped-call]
        if ended.code == OutOfMemory.exit_code:
            return AirflowException(f"Out of memory. {line}")
        return AirflowException(f"{line} (exit code {ended.code})")


def one_line(error: dict[str, str]) -> str:
    """Return an error, as the command line prints it, in one line: where, what, remedy."""
    where = f"{error['where']}: " if error.get("where") else ""
    remedy = f" | {error['remedy']}" if error.get("remedy") else ""
    return " ".join(f"{where}{error.get('what', '')}{remedy}".split())
