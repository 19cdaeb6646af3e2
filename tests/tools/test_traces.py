"""Answers of a model to prompts: through transformers, through a server, and interrupted."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from qsens.cli import app
from qsens.data.captions import read_kind
from qsens.data.conversations import Conversation
from qsens.errors import TryAgain, UserError
from qsens.tools.traces import PART, Answer, Local, Sampling, Server, write_traces
from tests.checkpoint.tiny_families import CAPTIONS, configuration, save

TEMPLATE = (
    "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}a {% endif %}"
)
GREEDY = Sampling(max_new_tokens=6)


def silent(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save(configuration("Llama", tied=True), tmp_path_factory.mktemp("c") / "llama")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Texts of several lengths, so that some are padded."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*CAPTIONS, "a circle"]))
    return path


def by_hand(checkpoint: Path, text: str, count: int) -> str:
    """Return the likeliest words after a prompt, one at a time, none padded."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = tokenizer(f"{text} a", add_special_tokens=False)["input_ids"]
    said: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            said.append(int(model(torch.tensor([[*ids, *said]])).logits[0, -1].argmax()))
        if said[-1] == model.config.eos_token_id:
            said.pop()
            break
    return str(tokenizer.decode(said, skip_special_tokens=True))


def local(checkpoint: Path) -> Local:
    return Local(checkpoint, "float32", "cpu")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_are_the_likeliest_words(
    batch_size: int, checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "traces.jsonl"
    written = write_traces(
        prompts, out, local(checkpoint), GREEDY, batch_size=batch_size, progress=silent
    )
    assert (written.answers, written.before) == (5, 0)
    found = lines(out)
    for record, text in zip(found, [*CAPTIONS, "a circle"], strict=True):
        user, answer = record["messages"]
        assert user == {"role": "user", "content": text}
        assert answer == {"role": "assistant", "content": by_hand(checkpoint, text, 6)}
        assert record["trace"]["max_new_tokens"] == 6
        assert record["trace"]["temperature"] == 0
        assert record["trace"]["model"] == str(checkpoint)
    assert written.cut == sum(record["trace"]["finish_reason"] == "length" for record in found)
    assert not out.with_name(out.name + PART).exists()
    records, kind = read_kind(out)
    assert kind == "messages"
    assert all(record.conversation is not None for record in records if not record.fault)


def test_conversations_are_asked_up_to_their_last_answer(checkpoint: Path, tmp_path: Path) -> None:
    first, second, third, fourth = CAPTIONS
    turns = [("user", first), ("assistant", second), ("user", third), ("assistant", fourth)]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(chat) + "\n")
    out = tmp_path / "out.jsonl"
    write_traces(path, out, local(checkpoint), GREEDY, batch_size=4, progress=silent)
    (record,) = lines(out)
    assert record["messages"][:3] == chat["messages"][:3]
    expected = by_hand(checkpoint, f"{first} {second} {third}", 6)
    assert record["messages"][3]["content"] == expected


class Interrupted:
    """Answers so many batches, then fails."""

    def __init__(self, inner: Local, batches: int) -> None:
        self.model, self._inner, self._left = inner.model, inner, batches

    def __call__(
        self, prompts: Sequence[Conversation], sampling: Sampling, first: int
    ) -> list[Answer]:
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        return self._inner(prompts, sampling, first)


@pytest.mark.parametrize("torn", [0, 1, 30, 400])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_interrupted_run_goes_on(
    temperature: float, torn: int, checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    """Also where it ended within a line, or a line within a batch: drawn answers are the same."""
    sampling = Sampling(6, temperature, 0.9, 3)
    answerer = local(checkpoint)
    whole, again = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"
    write_traces(prompts, whole, answerer, sampling, batch_size=2, progress=silent)
    with pytest.raises(KeyboardInterrupt):
        write_traces(
            prompts, again, Interrupted(answerer, 2), sampling, batch_size=2, progress=silent
        )
    assert not again.exists()
    part = again.with_name(again.name + PART)
    data = part.read_bytes()
    assert data.count(b"\n") == 4
    part.write_bytes(data[: len(data) - torn])
    seen = []
    written = write_traces(
        prompts,
        again,
        answerer,
        sampling,
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert again.read_bytes() == whole.read_bytes()
    assert written.before == (4 if not torn else 2)
    assert seen[0] == (written.before, 5)
    assert seen[-1] == (5, 5)
    if temperature:
        greedy = tmp_path / "greedy.jsonl"
        write_traces(prompts, greedy, answerer, GREEDY, batch_size=2, progress=silent)
        assert [one["messages"] for one in lines(greedy)] != [
            one["messages"] for one in lines(whole)
        ]


def test_other_settings_do_not_go_on(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    out, answerer = tmp_path / "out.jsonl", local(checkpoint)
    with pytest.raises(KeyboardInterrupt):
        write_traces(prompts, out, Interrupted(answerer, 1), GREEDY, batch_size=2, progress=silent)
    part = out.with_name(out.name + PART)
    before = part.read_bytes()
    with pytest.raises(UserError, match="holds answers under max_new_tokens = 6, and now it is 7"):
        write_traces(prompts, out, answerer, Sampling(7), batch_size=2, progress=silent)
    prompts.write_text(prompts.read_text() + json.dumps({"text": "a"}) + "\n")
    with pytest.raises(UserError, match="holds answers under prompts = "):
        write_traces(prompts, out, answerer, GREEDY, batch_size=2, progress=silent)
    assert part.read_bytes() == before
    part.write_bytes(b"{}\n" + before)
    with pytest.raises(UserError, match="line 1 is no answer"):
        write_traces(prompts, out, answerer, GREEDY, batch_size=2, progress=silent)
    out.write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        write_traces(prompts, out, answerer, GREEDY, batch_size=2, progress=silent)
    assert out.read_text() == "mine"


class Api(BaseHTTPRequestHandler):
    """OpenAI's API in front of the model, as far as it is asked for."""

    answerer: Local
    asked: list[dict[str, Any]]
    failures: int

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body | {"key": self.headers.get("Authorization")})
        if type(self).failures:
            type(self).failures -= 1
            self._send(503, {"error": "busy"})
            return
        if body["model"] != "tiny":
            self._send(404, {"error": "no such model"})
            return
        sampling = Sampling(body["max_tokens"], body["temperature"], body["top_p"], body["seed"])
        (answer,) = self.answerer([Conversation(tuple(body["messages"]))], sampling, 0)
        choice = {"message": dict(answer.message), "finish_reason": answer.finish_reason}
        self._send(200, {"choices": [choice]})

    def _send(self, code: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def api(checkpoint: Path) -> Iterator[tuple[str, type[Api]]]:
    given = {"answerer": local(checkpoint), "asked": [], "failures": 0}
    handler = type("Handler", (Api,), given)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("suffix", ["", "/v1", "/v1/"])
def test_a_server_gives_the_same_answers(
    suffix: str,
    api: tuple[str, type[Api]],
    checkpoint: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    url, handler = api
    handler.failures = 2  # each request is tried three times
    answerer = Server(url + suffix, None)
    assert answerer.model == "tiny"
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    write_traces(prompts, ours, local(checkpoint), GREEDY, batch_size=3, progress=silent)
    write_traces(prompts, theirs, answerer, GREEDY, batch_size=1, progress=silent)
    assert [one["messages"] for one in lines(theirs)] == [one["messages"] for one in lines(ours)]
    assert lines(theirs)[0]["trace"]["model"] == "tiny"
    assert {body["key"] for body in handler.asked} == {"Bearer secret"}
    assert "secret" not in theirs.read_text()


def test_a_server_that_fails_or_refuses(
    api: tuple[str, type[Api]], prompts: Path, tmp_path: Path
) -> None:
    url, handler = api
    out = tmp_path / "out.jsonl"
    handler.failures = 99
    with pytest.raises(TryAgain, match="does not answer: 503"):
        write_traces(prompts, out, Server(url, None), GREEDY, batch_size=1, progress=silent)
    handler.failures = 0
    with pytest.raises(UserError, match="it refuses: 404"):
        write_traces(prompts, out, Server(url, "other"), GREEDY, batch_size=1, progress=silent)
    with pytest.raises(TryAgain, match="does not answer"):
        Server("http://127.0.0.1:9", None)
    assert not out.exists()


def test_the_command(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    words = ["traces", str(checkpoint), str(prompts), "--out", str(out), "--max-new-tokens", "6"]
    words += ["--dtype", "float32", "--device", "cpu", "--limit", "3", "--json"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert (said["answers"], said["before"], said["file"]) == (3, 0, str(out))
    assert len(lines(out)) == 3
