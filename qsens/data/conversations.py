"""Conversations of sample files, in one form: OpenAI's messages. Without torch.

Read are ``messages`` (OpenAI's: roles, tool calls and results, parts of text and pictures,
``reasoning_content``), ``conversations`` (ShareGPT's ``from`` and ``value``), and ``prompt`` with
``completion``, whose texts are a user's turn and the answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from qsens.reading import shown

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# What ShareGPT calls them.
_FROM = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# What a chat template may ask of a message, beside its role.
_KEPT = ("content", "name", "tool_calls", "tool_call_id", "reasoning_content")
ASSISTANT = "assistant"
# Addresses of pictures that are no files.
_ELSEWHERE = ("data:", "http://", "https://", "file://")


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates read them.

    Attributes:
        messages: Each with ``role`` and ``content``, a text, or parts where it shows pictures; of
            tool calls, arguments are objects.
        tools: Descriptions of the tools that the model may call; none where it has none.
        last: Whether only its last answer is a label.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Any, ...] | None = None
    last: bool = False

    @property
    def images(self) -> tuple[str, ...]:
        """Paths of its pictures, in order."""
        return tuple(path for message in self.messages for path in _images(message))

    def shows_after_an_answer(self) -> bool:
        """Return whether a picture follows an answer."""
        first = next(at for at, one in enumerate(self.messages) if one["role"] == ASSISTANT)
        return any(_images(message) for message in self.messages[first:])

    def turns(self) -> list[Conversation]:
        """Return a conversation for each answer: what came before it, and it."""
        return [
            Conversation(self.messages[: at + 1], self.tools, last=True)
            for at, message in enumerate(self.messages)
            if message["role"] == ASSISTANT
        ]

    def __str__(self) -> str:
        """Return it in one line: equal for equal conversations alone."""
        return json.dumps([self.messages, self.tools], sort_keys=True, ensure_ascii=False)


def kind_of(entry: Mapping[str, Any]) -> str | None:
    """Return what a record is, by its keys; none where it is nothing that is known."""
    if "messages" in entry:
        return "messages"
    if "conversations" in entry:
        return "sharegpt"
    if "prompt" in entry and "completion" in entry:
        return "completion"
    return next((key for key in ("caption", "text") if key in entry), None)


def read_conversation(entry: Mapping[str, Any], kind: str) -> Conversation:
    """Return a record as a conversation.

    Args:
        entry: The record.
        kind: ``messages``, ``sharegpt`` or ``completion``.

    Raises:
        ValueError: It is none; the message says what is wrong with it.
    """
    if kind == "messages":
        messages = [_message(each, at) for at, each in enumerate(_list(entry, "messages"), 1)]
    elif kind == "sharegpt":
        messages = [_shared(each, at) for at, each in enumerate(_list(entry, "conversations"), 1)]
        system = entry.get("system")
        if isinstance(system, str) and system.strip():
            messages.insert(0, {"role": "system", "content": system})
    else:
        messages = [*_turns(entry, "prompt", "user"), *_turns(entry, "completion", ASSISTANT)]
    if not any(message["role"] == ASSISTANT for message in messages):
        raise ValueError("it has no turn of the assistant")
    tools = entry.get("tools")
    if isinstance(tools, str):  # some sets keep them as JSON
        tools = _parsed(tools, "its tools")
    if tools is not None and not isinstance(tools, list):
        raise ValueError("its tools are no list")
    return Conversation(tuple(messages), tuple(tools) if tools else None)


def _turns(entry: Mapping[str, Any], key: str, role: str) -> Iterator[dict[str, Any]]:
    """Yield what a prompt or a completion holds: a text, or messages."""
    value = entry.get(key)
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"its {key} is empty")
        yield {"role": role, "content": value}
    else:
        for at, each in enumerate(_list(entry, key), 1):
            yield _message(each, at)


def _list(entry: Mapping[str, Any], key: str) -> Sequence[Any]:
    value = entry.get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"its {key} are no list of turns")
    return value


def _message(given: Any, at: int) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"its message {at} is no object")
    role = given.get("role")
    if role not in _ROLES:
        raise ValueError(f"the role of its message {at} is {shown(role)}")
    message = {"role": role} | {key: given[key] for key in _KEPT if given.get(key) is not None}
    message["content"] = _content(given.get("content"), at)
    if role == ASSISTANT and _images(message):
        raise ValueError(f"its message {at} is an answer with a picture")
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], at)
    reasoning = message.get("reasoning_content", "")
    if not isinstance(reasoning, str):
        raise ValueError(f"the reasoning_content of its message {at} is no text")
    content = message["content"]
    said = content.strip() if isinstance(content, str) else content
    if not (said or reasoning.strip() or message.get("tool_calls")):
        raise ValueError(f"its message {at} is empty")
    return message


def _content(content: Any, at: int) -> str | list[dict[str, str]]:
    """Return the text of a message, or its parts where some are pictures."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"the content of its message {at} is neither text nor parts")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else "text"
        if kind in ("image", "image_url"):
            parts.append({"type": "image", "image": _image(part, at)})
            continue
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", None) or not isinstance(text, str):
            raise ValueError(f"a part of its message {at} is neither text nor a picture")
        parts.append({"type": "text", "text": text})
    if any(part["type"] == "image" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _image(part: Mapping[str, Any], at: int) -> str:
    """Return the path of a picture: below the images' directory, as those of captions are."""
    given = part.get("image", part.get("image_url", part.get("path")))
    path = given.get("url") if isinstance(given, dict) else given
    if not isinstance(path, str) or not path:
        raise ValueError(f"a picture of its message {at} has no path")
    if path.startswith(_ELSEWHERE):
        raise ValueError(f"a picture of its message {at} is no file: save it as one")
    if leads_out(path):
        raise ValueError(f"a picture of its message {at} lies outside the images' directory")
    return path


def leads_out(path: str) -> bool:
    """Return whether the path of a picture may lead out of the images' directory."""
    pure = PurePosixPath(path)
    return pure.is_absolute() or ".." in pure.parts or "\0" in path or "\\" in path


def _images(message: Mapping[str, Any]) -> list[str]:
    """Return the paths of a message's pictures."""
    content = message["content"]
    if isinstance(content, str):
        return []
    return [part["image"] for part in content if part["type"] == "image"]


def _calls(calls: Any, at: int) -> list[Any]:
    """Return tool calls as templates read them: OpenAI's API has their arguments as JSON text."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"the tool_calls of its message {at} are no list of objects")
    read = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"a tool call of its message {at} names no function")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments or "{}", f"the arguments of message {at}")
        function = function | {"arguments": arguments}
        read.append(
            {**call, "type": "function", "function": function}
            if "function" in call
            else {"type": "function", "function": function}
        )
    return read


def _shared(given: Any, at: int) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"its turn {at} is no object")
    role, value = given.get("from", given.get("role")), given.get("value", given.get("content"))
    if not isinstance(role, str) or role not in _FROM:
        raise ValueError(f"its turn {at} is from {shown(role)}")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the value of its turn {at} is no text, or empty")
    return {"role": _FROM[role], "content": value}


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} are no JSON: {error}") from error
