"""Who is told how a run ended: real servers for mail and webhook, real runs."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import Message
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from aiosmtpd.controller import Controller

from qsens_airflow.local import Components
from qsens_airflow.notices import Notice, notice_of
from qsens_airflow.processes import free_port
from tests.airflow.house import components
from tests.airflow.test_run import BROKEN

PRESET = """
defaults: {model: tiny_qwen3_vl, dataset: demo, quant_pair: wfp8_afp8}
dataset: {size: [small]}
output_layout: publish
dag:
  schedule: null
  notify_when: WHEN
  notify:
    # It fails every time, and that changes nothing.
    - notifier: qsens_airflow.nowhere.Notifier
    - notifier: airflow.providers.smtp.notifications.smtp.SmtpNotifier
      arguments:
        to: team@example.org
        from_email: qsens@example.org
        subject: "{{ notice.subject }}"
        html_content: "{{ notice.html }}"
    - notifier: airflow.providers.http.notifications.http.HttpNotifier
      arguments:
        endpoint: hook
        data: "{{ notice.json }}"
        headers: {Content-Type: application/json}
"""


@dataclass
class Servers:
    """A mail server and a webhook on loopback, and what they have got."""

    mails: list[Message] = field(default_factory=list)
    posts: list[dict[str, Any]] = field(default_factory=list)
    smtp_port: int = field(default_factory=free_port)
    http: ThreadingHTTPServer | None = None

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        self.mails.append(message_from_bytes(envelope.content, policy=default))
        return "250 OK"

    def handler(self) -> type[BaseHTTPRequestHandler]:
        posts = self.posts

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                posts.append({"path": self.path} | json.loads(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        return Handler


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    servers = Servers()
    mail = Controller(servers, hostname="127.0.0.1", port=servers.smtp_port)
    servers.http = ThreadingHTTPServer(("127.0.0.1", 0), servers.handler())
    thread = Thread(target=servers.http.serve_forever)
    mail.start()
    thread.start()
    yield servers
    mail.stop()
    servers.http.shutdown()
    servers.http.server_close()
    thread.join()


@dataclass(frozen=True)
class House:
    airflow: Components
    root: Path
    servers: Servers

    def run(self, when: str, told: int, **conf: Any) -> tuple[str, str]:
        """Run to the end and until ``told`` of each were sent; return the run's id and state."""
        preset = self.root / "configs" / "sweep" / "told.yaml"
        preset.write_text(PRESET.replace("WHEN", when), encoding="utf-8")
        self.servers.mails.clear()
        self.servers.posts.clear()
        run_id = self.airflow.client.trigger({"preset": "told"} | conf)
        state = self.airflow.wait(run_id, seconds=900)
        self._wait_until_told(told)
        return run_id, state

    def _wait_until_told(self, told: int) -> None:
        """Callbacks run when the task has its state already; who is told twice is told soon."""
        last = time.monotonic() + 120
        while min(len(self.servers.mails), len(self.servers.posts)) < told:
            assert time.monotonic() < last, "waited in vain"
            time.sleep(0.1)
        time.sleep(3)

    def gate_log(self, run_id: str) -> str:
        (gate,) = [task for task in self.airflow.client.tasks(run_id) if task.task_id == "gate"]
        return "\n".join(self.airflow.task_log(run_id, gate))


@pytest.fixture(scope="module")
def house(
    demo_checkpoint: Any, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[House]:
    root = tmp_path_factory.mktemp("told")
    checkpoint = root / "models" / "tiny_qwen3_vl" / "checkpoints" / "tiny-qwen3-vl"
    shutil.copytree(demo_checkpoint.directory, checkpoint)
    for name, text in (("quant_pair/wbroken_afp16", BROKEN), ("sweep/told", PRESET)):
        path = root / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text.replace("WHEN", "always"), encoding="utf-8")
    assert servers.http is not None
    plain = {"disable_tls": True, "disable_ssl": True}
    smtp = {"conn_type": "smtp", "host": "127.0.0.1", "port": servers.smtp_port, "extra": plain}
    http = {"conn_type": "http", "host": "http://127.0.0.1", "port": servers.http.server_port}
    environment = {
        "QSENS_ROOT": str(root),
        "QSENS_RESULTS": str(root),
        "QSENS_PRESET": "told",
        "QSENS_SCHEDULE": "none",
        "AIRFLOW_CONN_SMTP_DEFAULT": json.dumps(smtp),
        "AIRFLOW_CONN_HTTP_DEFAULT": json.dumps(http),
        "OMP_NUM_THREADS": "1",
    }
    with components(root / ".airflow", environment=environment) as airflow:
        yield House(airflow, root, servers)


def test_nobody_is_told_of_a_quiet_night(house: House) -> None:
    run_id, state = house.run("remarkable", told=0)
    assert state == "success"
    assert house.servers.mails == house.servers.posts == []
    assert "nothing remarkable" in house.gate_log(run_id)


def test_who_asks_is_told_of_every_night_though_one_notifier_fails(house: House) -> None:
    run_id, state = house.run("always", told=1)
    assert state == "success"
    assert [mail["subject"].split()[-1] for mail in house.servers.mails] == ["complete"]
    (post,) = house.servers.posts
    assert (post["path"], post["state"], post["missing"]) == ("/hook", "complete", [])
    assert "qsens_airflow.nowhere.Notifier could not tell" in house.gate_log(run_id)


def test_a_partial_night_is_one_mail_and_one_webhook(house: House) -> None:
    # Two cells fail, so that two tasks do.
    run_id, state = house.run(
        "remarkable", told=1, quant_pair=["wbroken_afp16", "wfp8_afp8"], size=["small", "medium"]
    )
    assert state == "failed"
    (mail,), (post,) = house.servers.mails, house.servers.posts
    published = house.airflow.client.returned(run_id, "publish")
    reasons = {cell["cell"]: cell["reason"] for cell in published["missing"]}
    assert sorted(reasons) == ["wbroken_afp16-medium", "wbroken_afp16-small"]
    assert post["missing"] == published["missing"]
    index = Path(published["index"]).relative_to(house.root).as_posix()
    address = f"{house.airflow.url}/qsens/files/{index}"
    assert post["index"] == address
    assert post["run"].startswith(f"{house.airflow.url}/dags/qsens_sweep/runs/manual__")
    assert mail["to"] == "team@example.org"
    assert "PARTIAL, 2 missing" in mail["subject"]
    assert isinstance(mail, Message)
    text = "".join(
        part.get_content() for part in mail.walk() if part.get_content_type() == "text/html"
    )
    assert f'<a href="{address}">' in text
    assert all(cell in text for cell in reasons)


def test_a_plan_that_fails_is_one_message_with_its_reason(house: House) -> None:
    _, state = house.run("remarkable", told=1, quant_pairs=["wfp8_afp8"])
    assert state == "failed"
    assert len(house.servers.mails) == 1
    (post,) = house.servers.posts
    assert (post["state"], post["index"]) == ("failed", None)
    assert post["reasons"][0].startswith("plan: ")
    assert "param quant_pairs" in post["reasons"][0]


def test_what_moved_and_what_is_partial_is_read_from_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QSENS_RESULTS", str(tmp_path))
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "")
    moved = {"cell": "wfp8_afp8-large", "layer": "layers.3.mlp", "before": 0.02, "after": 0.05}
    summary = {
        "cells": [
            {"cell": "a-small", "partial": ["8 of 16 samples", "1 of 9 groups got no score"]},
            {"cell": "b-small", "partial": []},
        ],
        "drift": {"moved": [moved, moved | {"layer": "layers.4.mlp", "before": 0.0}]},
        "audit": [
            {"cell": "a-small", "judgement": {"verdict": "do not trust", "reason": "rho 0.5"}},
            {"cell": "b-small", "judgement": {"verdict": "trust", "reason": "all agree"}},
        ],
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    index = tmp_path / "index.html"
    published = {"sweep_id": "S", "index": str(index), "complete": True, "missing": []}
    context: Any = {
        "ti": SimpleNamespace(xcom_pull=lambda task_ids, key=None: None if key else published),
        "dag_run": SimpleNamespace(dag_id="qsens_sweep", run_id="manual__1+00:00"),
    }
    notice = notice_of(context)
    assert notice.remarkable
    assert notice.subject == "qsens_sweep: S complete, 1 partial, 2 moved beyond noise"
    assert notice.index == index.as_uri()
    assert notice.run.endswith("/dags/qsens_sweep/runs/manual__1%2B00%3A00")
    lines = notice.text.splitlines()
    assert "- a-small: 8 of 16 samples; 1 of 9 groups got no score" in lines
    assert "- wfp8_afp8-large: layers.3.mlp: 0.02 -> 0.05 per token (+150%)" in lines
    assert "- wfp8_afp8-large: layers.4.mlp: 0 -> 0.05 per token" in lines
    assert lines[lines.index("Scores not to be trusted:") + 1 :] == ["- a-small: rho 0.5"]


def test_a_failed_audit_of_a_complete_run_is_told(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"cells": []}')
    index = str(tmp_path / "index.html")
    values = {
        ("publish", None): {"sweep_id": "S", "index": index, "complete": True, "missing": []},
        ("audit", "reason"): "no device",
    }
    context: Any = {
        "ti": SimpleNamespace(xcom_pull=lambda task_ids, key=None: values.get((task_ids, key))),
        "dag_run": SimpleNamespace(dag_id="qsens_sweep", run_id="r"),
    }
    notice = notice_of(context)
    assert notice.remarkable
    assert notice.subject == "qsens_sweep: S complete, audit failed"
    assert "Scores not audited:\n- no device" in notice.text


def test_a_message_escapes_what_it_quotes_and_stays_short() -> None:
    missing = [{"cell": f"c{i}", "reason": "<script>alert(1)</script>"} for i in range(25)]
    notice = Notice("PARTIAL", "d", "r", "http://x/?a=1&b=2", "S", "http://y/", missing)
    assert "<script>" not in notice.html
    assert notice.html.count("<li>") == 21
    assert "and 5 more" in notice.text
    assert json.loads(notice.json)["missing"] == missing
