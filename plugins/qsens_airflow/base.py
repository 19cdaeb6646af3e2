"""What the operators share: run a verb, and turn how it ends into Airflow's terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

from airflow.sdk import BaseOperator, Context
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowRescheduleException,
)

from qsens.errors import AnswerIsNo, DiskFull, OutOfMemory, TryAgain, UserError
from qsens.visible import visible
from qsens_airflow.child import Child, Ended

_FINAL = (UserError.exit_code, AnswerIsNo.exit_code)
# The executor reports a rescheduled task as ended some seconds later. If the task is queued again
# by then, the scheduler takes it for lost, kills it and counts a try; so the pause is not short.
PAUSE = timedelta(seconds=30)
_WAIT_AT_MOST = timedelta(hours=6)
# As `qsens.engine.memory` reads it; that module imports torch.
MEMORY_SHARE = "QSENS_MEMORY_SHARE"
HALF = "0.5"


class QsensOperator(BaseOperator):
    """Base of the operators that run a verb of the command line.

    What happens depends on the child's exit code:

    * 0: its JSON is returned;
    * 2, 3: the user must mend it: final;
    * 74, out of memory: it is run once more in the same try with half the memory budget, and a
      second 74 is final;
    * 75, it may pass by itself: the slot is given back and the task comes again, for as long as it
      may run, before that counts as a try. A full disk counts at once: somebody has to know;
    * all else, death by a signal included, counts as a try.
    """

    answers: ClassVar[tuple[int, ...]] = (0,)
    """Exit codes that come with an answer: its JSON is returned."""
    _child: Child | None = None
    _killed = False

    def run_verb(
        self,
        context: Context,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        inherited: Sequence[int] = (),
    ) -> dict[str, Any]:
        """Run ``qsens`` with ``arguments`` and return the JSON that it prints.

        Args:
            context: Airflow's context.
            arguments: The verb and its arguments.
            environment: Variables for the child alone.
            inherited: Descriptors that the child inherits.
        """
        verb, *rest = arguments
        own = dict(environment or {})
        ended = self._run_child([verb, "--json", *rest], own, inherited)
        if ended.code == OutOfMemory.exit_code and not ended.killed and not self._killed:
            self.log.warning(
                "%s | Once more with %s of the memory budget.", self._line(ended, verb), HALF
            )
            ended = self._run_child([verb, "--json", *rest], own | {MEMORY_SHARE: HALF}, inherited)
        answer = ended.answer
        answered = ended.code in self.answers and not ended.killed
        if answered and answer is not None and "error" not in answer:
            return answer
        raise self._failure(ended, verb, context)

    def on_kill(self) -> None:
        """End the child and all that it started."""
        self._killed = True
        if self._child is not None:
            self._child.kill()

    def give_back(self, context: Context, line: str) -> Exception:
        """Return the exception that gives the slot back, or the failure when it waited too long."""
        waited = int(context.get("task_reschedule_count") or 0) * PAUSE
        if waited < (self.execution_timeout or _WAIT_AT_MOST):
            self.log.info("%s | Slot given back for %s s.", line, PAUSE.seconds)
            return AirflowRescheduleException(  # type: ignore[no-untyped-call]
                datetime.now(UTC) + PAUSE
            )
        return AirflowException(f"{line} (still so after {waited})")

    def _run_child(
        self, arguments: Sequence[str], environment: Mapping[str, str], inherited: Sequence[int]
    ) -> Ended:
        self._child = Child(arguments, environment=environment, inherited=inherited)
        return self._child.run(self.log.info)

    def _failure(self, ended: Ended, verb: str, context: Context) -> Exception:
        """Return the exception that says how the child failed."""
        if ended.signal:
            return AirflowException(f"qsens {verb} was ended by {ended.signal}")
        if ended.code == 0:
            return AirflowException(f"qsens {verb} printed no JSON object")
        line = self._line(ended, verb)
        if ended.code in _FINAL:
            return AirflowFailException(line)
        if ended.code == OutOfMemory.exit_code:
            return AirflowFailException(f"{line} | With half the memory budget too.")
        full = (ended.answer or {}).get("error") == DiskFull.__name__
        if ended.code == TryAgain.exit_code and not full:
            return self.give_back(context, line)
        return AirflowException(f"{line} (exit code {ended.code})")

    @staticmethod
    def _line(ended: Ended, verb: str) -> str:
        return one_line(ended.answer) if ended.answer else f"qsens {verb}: see the log above"


def one_line(error: dict[str, str]) -> str:
    """Return an error, as the command line prints it, in one line: where, what, remedy."""
    where = f"{error['where']}: " if error.get("where") else ""
    remedy = f" | {error['remedy']}" if error.get("remedy") else ""
    return visible(" ".join(f"{where}{error.get('what', '')}{remedy}".split()))
