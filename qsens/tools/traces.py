"""A model's own answers to prompts, as conversations that a sweep can read.

The unquantized model answers, here through transformers or behind a server that speaks OpenAI's
API. Answers are appended line by line beside the file that they become, so that whoever is
interrupted goes on where the last one stands.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from qsens.checksums import digest_file
from qsens.data.captions import read_kind
from qsens.data.conversations import ASSISTANT, Conversation
from qsens.errors import UserError
from qsens.locks import held, lock_at
from qsens.reading import has_file, parse_json, read_bytes
from qsens.tools.openai_api import OpenAiApi
from qsens.writing import make_directory, writing

PART = ".part"
_AGAIN = "Name another file with --out, or remove this one."


@dataclass(frozen=True)
class Sampling:
    """How answers are chosen.

    Attributes:
        max_new_tokens: Tokens of an answer at most.
        temperature: 0 takes the likeliest token each time.
        top_p: The likeliest tokens that together have this probability are drawn from.
        seed: Of the draws.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        message: As OpenAI's API gives it, with ``role`` and ``content``.
        finish_reason: ``stop``, or ``length`` where it was cut.
    """

    message: Mapping[str, Any]
    finish_reason: str


class Answerer(Protocol):
    """Answers prompts.

    Attributes:
        model: What answers, as each record says it.
    """

    model: str

    def __call__(
        self, prompts: Sequence[Conversation], sampling: Sampling, first: int
    ) -> list[Answer]:
        """Return an answer to each prompt.

        Args:
            prompts: Conversations that end before an answer.
            sampling: How answers are chosen.
            first: Number of the first one, from 0: draws hang on it alone.
        """


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        file: The file.
        answers: Answers in it.
        before: How many of them were there before.
        cut: How many were cut at ``max_new_tokens``.
    """

    file: Path
    answers: int
    before: int
    cut: int


class Progress(Protocol):
    """Called as answers come."""

    def __call__(self, done: int, total: int) -> None:
        """Take how many of how many there are."""


def write_traces(
    prompts: Path,
    out: Path,
    answerer: Answerer,
    sampling: Sampling,
    *,
    batch_size: int,
    limit: int | None = None,
    progress: Progress,
) -> Written:
    """Write the answers to the prompts of a file of samples; go on where an earlier run ended.

    A text is what a user says; a conversation is asked up to its last answer, without it.

    Args:
        prompts: The file.
        out: Where the conversations go, JSON lines; it appears once it is whole.
        answerer: What answers.
        sampling: How answers are chosen.
        batch_size: Prompts that are answered together.
        limit: Prompts to take, from the first; all when not given.
        progress: Called as answers come.

    Raises:
        UserError: The file is there already, holds answers of other settings, or prompts are none.
        TryAgain: Another process writes it, or the server does not answer.
    """
    if has_file(out, remedy=_AGAIN):
        raise UserError("is there already", where=str(out), remedy=_AGAIN)
    asked = _prompts(prompts, limit)
    settings = {
        "model": answerer.model,
        "prompts": digest_file(prompts, remedy=_AGAIN),
        **asdict(sampling),
    }
    make_directory(out.parent)
    part = out.with_name(out.name + PART)
    with held(lock_at(out.with_name(f".{out.name}.lock")), where=str(part), wait=False):
        answers = _kept(part, settings, len(asked), batch_size)
        before = len(answers)
        progress(before, len(asked))
        with writing(part), part.open("ab") as file:
            for first in range(before, len(asked), batch_size):
                given = asked[first : first + batch_size]
                found = answerer(given, sampling, first)
                for number, (prompt, answer) in enumerate(zip(given, found, strict=True), first):
                    record = _record(prompt, answer, settings, number)
                    answers.append(record)
                    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                progress(len(answers), len(asked))
        with writing(out):
            part.replace(out)
    cut = sum(record["trace"]["finish_reason"] == "length" for record in answers)
    return Written(out, len(answers), before, cut)


def _prompts(path: Path, limit: int | None) -> list[Conversation]:
    """Return what the model is asked."""
    records, _ = read_kind(path, "large")
    asked = []
    for record in records[:limit]:
        if record.fault:
            continue
        if record.conversation is None:
            asked.append(Conversation(({"role": "user", "content": record.caption},)))
            continue
        messages = record.conversation.messages
        last = max(at for at, one in enumerate(messages) if one["role"] == ASSISTANT)
        asked.append(Conversation(messages[:last], record.conversation.tools))
    asked = [prompt for prompt in asked if prompt.messages]
    if not asked:
        raise UserError("holds no prompt", where=str(path), remedy="Name a file of prompts.")
    return asked


def _kept(
    part: Path, settings: Mapping[str, Any], total: int, batch_size: int
) -> list[dict[str, Any]]:
    """Return the answers of an earlier run; what it left of a batch or a line is cut off."""
    if not has_file(part, remedy=_AGAIN):
        return []
    data = read_bytes(part, remedy=_AGAIN)
    lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
    kept = [_answer(part, line, number, settings) for number, line in enumerate(lines)]
    whole = len(kept) if len(kept) >= total else len(kept) // batch_size * batch_size
    with writing(part), part.open("r+b") as file:
        file.truncate(sum(map(len, lines[:whole])))
    return kept[:whole]


def _answer(part: Path, line: bytes, number: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer of an earlier run, if it is one under the same settings."""
    try:
        record = parse_json(line)
        trace = record["trace"]
        before = {key: trace.get(key) for key in settings}
        if trace["number"] != number:
            raise ValueError(f"it is number {trace['number']}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"line {number + 1} is no answer: {error}", where=str(part), remedy=_AGAIN
        ) from error
    other = next((key for key, value in settings.items() if before[key] != value), None)
    if other is not None:
        raise UserError(
            f"holds answers under {other} = {before[other]}, and now it is {settings[other]}",
            where=str(part),
            remedy="Ask with the same settings to go on, or name another file with --out.",
        )
    found: dict[str, Any] = record
    return found


def _record(
    prompt: Conversation, answer: Answer, settings: Mapping[str, Any], number: int
) -> dict[str, Any]:
    record: dict[str, Any] = {"messages": [*map(dict, prompt.messages), dict(answer.message)]}
    if prompt.tools:
        record["tools"] = list(prompt.tools)
    record["trace"] = {"number": number, "finish_reason": answer.finish_reason, **settings}
    return record


class Server:
    """Answers through a server that speaks OpenAI's API, such as vLLM's and SGLang's.

    Args:
        url: Its address, with or without ``/v1``.
        model: What it calls the model; its first one when not given.

    ``OPENAI_API_KEY`` is sent where it is set.

    Raises:
        TryAgain: It does not answer.
        UserError: It refuses.
    """

    def __init__(self, url: str, model: str | None) -> None:
        self._api = OpenAiApi(
            url,
            where=f"--server {url}",
            remedy="Mend the server or the prompt.",
            again="Run it again to go on.",
        )
        self.model = model or str(self._api.models()[0]["id"])

    def __call__(
        self, prompts: Sequence[Conversation], sampling: Sampling, first: int
    ) -> list[Answer]:
        """Return an answer to each prompt; all are asked at once."""
        with ThreadPoolExecutor(max_workers=len(prompts)) as pool:
            return list(pool.map(lambda prompt: self._ask(prompt, sampling), prompts))

    def _ask(self, prompt: Conversation, sampling: Sampling) -> Answer:
        body = {
            "model": self.model,
            "messages": list(map(dict, prompt.messages)),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        if prompt.tools:
            body["tools"] = list(prompt.tools)
        given = self._api.json("POST", "/v1/chat/completions", body)
        try:
            choice = given["choices"][0]
            message = {
                key: choice["message"][key]
                for key in ("role", "content", "reasoning_content", "tool_calls")
                if choice["message"].get(key)
            }
            return Answer({"content": "", **message}, str(choice["finish_reason"]))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise self._api.refusal(f"its answer lacks {error}") from error


class Local:
    """Answers through transformers.

    Args:
        path: Directory of the checkpoint.
        dtype: Data type that it is loaded in.
        device: Where it runs; ``auto`` takes the first GPU.
    """

    def __init__(self, path: Path, dtype: str, device: str) -> None:
        from qsens.checkpoint.loading import load_model, load_tokenizer, resolve_device
        from qsens.config import ModelConfig

        config = ModelConfig.model_validate({"path": path, "dtype": dtype})
        self.model = str(path)
        self._tokenizer = load_tokenizer(config)
        if not self._tokenizer.chat_template:
            raise UserError(
                "has no chat template", where=str(path), remedy="Save its chat_template.jinja."
            )
        self._device = resolve_device(device)
        self._model: Any = load_model(config, self._device)

    def __call__(
        self, prompts: Sequence[Conversation], sampling: Sampling, first: int
    ) -> list[Answer]:
        """Return an answer to each prompt."""
        import torch

        from qsens.data.rendering import ask

        tokenizer, model = self._tokenizer, self._model
        texts = [ask(prompt, tokenizer, number) for number, prompt in enumerate(prompts, first + 1)]
        stops = model.generation_config.eos_token_id
        ends = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id} - {None}
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        drawn: dict[str, Any] = {"do_sample": sampling.temperature > 0, "top_k": None}
        if drawn["do_sample"]:
            drawn |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        else:
            drawn |= {"temperature": None, "top_p": None}
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(sampling.seed + first)
            made = model.generate(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=min(ends) if ends else 0,
                eos_token_id=sorted(ends) or None,
                **drawn,
            )
        return [self._answer(row, ends) for row in made[:, longest:].tolist()]

    def _answer(self, ids: list[int], ends: set[int]) -> Answer:
        end = next((at for at, one in enumerate(ids) if one in ends), None)
        text = self._tokenizer.decode(ids[:end], skip_special_tokens=True)
        message = {"role": ASSISTANT, "content": text}
        return Answer(message, "length" if end is None else "stop")
