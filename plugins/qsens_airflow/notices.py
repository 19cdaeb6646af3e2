"""One message a run: who is told how it ended, and what the message says.

The DAG's ``gate`` runs whatever happened before it, and tells once, when it ends. ``remember`` is
for tasks before it: it keeps why they failed. Neither can change the state of a run.
"""

from __future__ import annotations

import json
import logging
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from airflow.sdk import Context
from airflow.sdk.configuration import conf
from markupsafe import escape

from qsens.config import Roots
from qsens.config.dag import NotifierConfig
from qsens.documents import peek
from qsens.store import SUMMARY
from qsens_airflow.settings import DagSettings

# Tasks whose failure leaves nothing to publish.
BEFORE_GATE = ("plan", "publish")
AUDIT = "audit"
_REASON = "reason"
_LISTED = 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Notice:
    """How a run ended.

    Attributes:
        state: ``complete``, ``PARTIAL`` or ``failed``.
        dag_id: The DAG.
        run_id: The run.
        run: Address of the run in Airflow's UI.
        sweep_id: The sweep; none when nothing was published.
        index: Address of the sweep's report; none when nothing was published.
        missing: ``{cell, reason}`` of every cell without a result.
        partial: ``{cell, reason}`` of every cell whose result is partial.
        moved: Groups that moved beyond noise since the sweep before, in words.
        audit_failed: Why the scores could not be audited; empty unless the task failed.
        distrusted: Cells whose scores an audit found not to be trusted, with the reason, in words.
        reasons: Why nothing was published, a line each.
    """

    state: str
    dag_id: str
    run_id: str
    run: str
    sweep_id: str | None = None
    index: str | None = None
    missing: Sequence[Mapping[str, str]] = ()
    partial: Sequence[Mapping[str, str]] = ()
    moved: Sequence[str] = ()
    audit_failed: str = ""
    distrusted: Sequence[str] = ()
    reasons: Sequence[str] = ()

    @property
    def remarkable(self) -> bool:
        """Return whether somebody should look."""
        return bool(self.state != "complete" or self.partial or self.moved or self.audit_failed)

    @property
    def subject(self) -> str:
        """Return the message in one line."""
        parts = [f"{self.dag_id}: {self.sweep_id or self.run_id} {self.state}"]
        for count, words in (
            (len(self.missing), "missing"),
            (len(self.partial), "partial"),
            (len(self.moved), "moved beyond noise"),
        ):
            if count:
                parts.append(f"{count} {words}")
        if self.audit_failed:
            parts.append("audit failed")
        return ", ".join(parts)

    @property
    def text(self) -> str:
        """Return the message as plain text."""
        lines = [self.subject, "", f"report: {self.index or 'none'}", f"run: {self.run}"]
        for title, items in self._lists():
            lines += ["", f"{title}:", *(f"- {item}" for item in items)]
        return "\n".join(lines) + "\n"

    @property
    def html(self) -> str:
        """Return the message as HTML; everything in it is escaped."""
        report = _link(self.index) if self.index else "none"
        parts = [f"<p><b>{escape(self.subject)}</b></p>"]
        parts.append(f"<p>Report: {report}<br>Run: {_link(self.run)}</p>")
        for title, items in self._lists():
            listed = "".join(f"<li>{escape(item)}</li>" for item in items)
            parts.append(f"<p>{escape(title)}:</p><ul>{listed}</ul>")
        return "\n".join(parts)

    @property
    def json(self) -> str:
        """Return the message as a JSON object with the attributes and ``subject``."""
        return json.dumps({"subject": self.subject, **vars(self)}, ensure_ascii=False)

    def _lists(self) -> list[tuple[str, list[str]]]:
        lists = [
            ("Why", list(self.reasons)),
            ("Missing", [f"{entry['cell']}: {entry['reason']}" for entry in self.missing]),
            ("Partial", [f"{entry['cell']}: {entry['reason']}" for entry in self.partial]),
            ("Moved beyond noise", list(self.moved)),
            ("Scores not audited", [self.audit_failed] if self.audit_failed else []),
            ("Scores not to be trusted", list(self.distrusted)),
        ]
        return [(title, _shortened(items)) for title, items in lists if items]


def remember(context: Context) -> None:
    """Keep why a task failed, for the message; the ``on_failure_callback`` of a task."""
    reason = " ".join(str(context.get("exception") or "").split())
    context["ti"].xcom_push(key=_REASON, value=reason[:500])


def tell(context: Context) -> None:
    """Tell the configured notifiers how the run ended; the callback of the task ``gate``.

    A notifier that fails is an error in the log and nothing else.
    """
    dag = DagSettings.from_environment().dag
    if not dag.notify:
        return
    try:
        notice = notice_of(context)
    except Exception:
        _log.exception("No message: the run cannot be described")
        return
    if dag.notify_when == "remarkable" and not notice.remarkable:
        _log.info("No message: nothing remarkable")
        return
    for notifier in dag.notify:
        _notify(notifier, notice, context)


def notice_of(context: Context) -> Notice:
    """Return what there is to say about the run of ``context``."""
    ti, run = context["ti"], context["dag_run"]
    address = f"{_base()}/dags/{run.dag_id}/runs/{quote(run.run_id, safe='')}"
    published = ti.xcom_pull(task_ids="publish")
    if not published:
        reasons = [
            f"{task_id}: {reason}"
            for task_id in BEFORE_GATE
            if (reason := ti.xcom_pull(task_ids=task_id, key=_REASON))
        ]
        return Notice("failed", run.dag_id, run.run_id, address, reasons=reasons)
    summary = read_summary(Path(published["index"]).parent)
    missing = published["missing"]
    return Notice(
        state="complete" if published["complete"] else "PARTIAL",
        dag_id=run.dag_id,
        run_id=run.run_id,
        run=address,
        sweep_id=published["sweep_id"],
        index=address_of(Path(published["index"])),
        missing=missing,
        partial=partial_cells(summary),
        moved=[_moved(entry) for entry in (summary.get("drift") or {}).get("moved", [])],
        audit_failed=ti.xcom_pull(task_ids=AUDIT, key=_REASON) or "",
        distrusted=[
            f"{audit['cell']}: {audit['judgement']['reason']}"
            for audit in summary.get("audit", [])
            if audit["judgement"]["verdict"] == "do not trust"
        ],
    )


def address_of(page: Path) -> str:
    """Return the address of a report: its page in Airflow, or its file where it has none."""
    from qsens_airflow.plugin import PREFIX

    results, base = Roots.from_environment().results, _base()
    if base and page.is_relative_to(results):
        return f"{base}{PREFIX}/files/{quote(page.relative_to(results).as_posix())}"
    return page.as_uri()


def _base() -> str:
    """Return the address that people reach Airflow at; empty where it is not set."""
    return str(conf.get("api", "base_url", fallback="")).rstrip("/")


def _notify(notifier: NotifierConfig, notice: Notice, context: Context) -> None:
    try:
        made = pkgutil.resolve_name(notifier.notifier)(**notifier.arguments)
        made({**context, "notice": notice})
    except Exception:
        _log.exception("%s could not tell how the run ended", notifier.notifier)
    else:
        _log.info("%s was told: %s", notifier.notifier, notice.subject)


def read_summary(directory: Path) -> dict[str, Any]:
    """Return ``summary.json``; nothing where it cannot be read."""
    return peek(directory / SUMMARY)


def partial_cells(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return ``{cell, reason}`` of every cell of a sweep whose result is partial."""
    return [
        {"cell": cell["cell"], "reason": "; ".join(cell["partial"])}
        for cell in summary.get("cells", [])
        if cell.get("partial")
    ]


def _moved(entry: Mapping[str, Any]) -> str:
    before, after = entry["before"], entry["after"]
    change = f" ({(after - before) / before:+.0%})" if before else ""
    return f"{entry['cell']}: {entry['layer']}: {before:.3g} -> {after:.3g} per token{change}"


def _link(address: str) -> str:
    return f'<a href="{escape(address)}">{escape(address)}</a>'


def _shortened(items: list[str]) -> list[str]:
    if len(items) <= _LISTED:
        return items
    return [*items[:_LISTED], f"and {len(items) - _LISTED} more"]
