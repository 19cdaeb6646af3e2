"""The APIs of vLLM and SGLang in front of a model, as far as log-probabilities of prompts go."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


@dataclass
class Fake:
    """What is served, and how it misbehaves.

    Attributes:
        model: Gives the logits.
        tokenizer: Says what a token is in words.
        names: What the server lists.
        longest: Its context length, as it lists it; none to list none.
        most: Log-probabilities a position at most.
        api: ``vllm``, ``sglang``, or ``none``: completions without log-probabilities.
        drop: Positions that are left out of each prompt.
        shift: Added to the ids of the tokens that are given beside the prompt's own.
        value: Replaces every log-probability.
        body: Replaces every answer to a POST.
        asked: Every body that came.
    """

    model: Any
    tokenizer: Any
    names: tuple[str, ...] = ("tiny",)
    longest: int | None = 64
    most: int = 20
    api: str = "vllm"
    drop: int = 0
    shift: int = 0
    value: float | None = None
    body: bytes | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)

    @torch.no_grad()
    def positions(self, prompt: list[int], count: int) -> list[list[tuple[float, int, str]]]:
        """Return the prompt's own token and the likeliest ones at each position but the first."""
        logits = self.model(torch.tensor([prompt])).logits[0].float()
        rows = []
        for scores, own in zip(logits.log_softmax(-1)[:-1], prompt[1:], strict=True):
            best = scores.topk(min(count, len(scores)))
            tokens = [own, *(token for token in best.indices.tolist() if token != own)]
            rows.append(
                [
                    (
                        float(scores[token]) if self.value is None else self.value,
                        token + self.shift * (at > 0),
                        self.tokenizer.decode([token]),
                    )
                    for at, token in enumerate(tokens)
                ]
            )
        return rows[: len(rows) - self.drop]


@contextmanager
def serving(fake: Fake) -> Iterator[str]:
    """Serve it while the context lasts; return the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _handler(fake: Fake) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            extra = {} if fake.longest is None else {"max_model_len": fake.longest}
            self._say(200, {"data": [{"id": name, **extra} for name in fake.names]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.asked.append(body | {"path": self.path})
            if fake.body is not None:
                self._send(200, fake.body)
            elif self.path == "/v1/completions":
                self._complete(body)
            elif self.path == "/generate" and fake.api == "sglang":
                self._generate(body)
            else:
                self._say(404, {"detail": "Not Found"})

        def _complete(self, body: dict[str, Any]) -> None:
            count = body["prompt_logprobs"]
            if fake.api != "vllm":
                # Both take fields that they do not know.
                choices = [{"index": at, "text": ""} for at in range(len(body["prompt"]))]
                self._say(200, {"choices": choices})
                return
            if count > fake.most:
                self._say(400, {"error": f"prompt logprobs of {count}, max allowed: {fake.most}"})
                return
            choices = [
                {
                    "index": at,
                    "prompt_logprobs": [
                        None,
                        *(
                            {
                                str(token): {"logprob": logprob, "rank": 1, "decoded_token": text}
                                for logprob, token, text in position
                            }
                            for position in fake.positions(prompt, count)
                        ),
                    ],
                }
                for at, prompt in enumerate(body["prompt"])
            ]
            self._say(200, {"choices": choices[::-1]})

        def _generate(self, body: dict[str, Any]) -> None:
            assert body["return_logprob"]
            assert body["logprob_start_len"] == 0
            answers = []
            for prompt in body["input_ids"]:
                rows = fake.positions(prompt, body["top_logprobs_num"])
                answers.append(
                    {
                        "meta_info": {
                            "input_token_logprobs": [[None, prompt[0], "?"], *(r[0] for r in rows)],
                            "input_top_logprobs": [None, *(row[1:] for row in rows)],
                        }
                    }
                )
            self._say(200, answers)

        def _say(self, code: int, value: Any) -> None:
            self._send(code, json.dumps(value).encode())

        def _send(self, code: int, data: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler
