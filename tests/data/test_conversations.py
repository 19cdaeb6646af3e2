"""Records of conversations: what is read of each form, and one message for what is none."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qsens.config import DatasetConfig
from qsens.data.captions import identify_samples, read_kind
from qsens.data.conversations import read_conversation
from qsens.errors import UserError
from qsens.reading import MOST_BYTES

USER = {"role": "user", "content": "Hi."}
ANSWER = {"role": "assistant", "content": "Hello."}
MESSAGES = {"messages": [USER, ANSWER]}
SHARED = {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}
COMPLETION = {"prompt": "Hi.", "completion": "Hello."}


@pytest.mark.parametrize(
    ("entry", "kind"), [(MESSAGES, "messages"), (SHARED, "sharegpt"), (COMPLETION, "completion")]
)
@pytest.mark.parametrize("name", ["c.jsonl", "c.json", "c.jsonl.gz", "C.JSON.GZ", "c.ndjson"])
def test_every_form_is_the_same_conversation(
    entry: dict[str, Any], kind: str, name: str, tmp_path: Path
) -> None:
    lines = [entry, entry | {"extra": 1}]
    lower = name.lower().removesuffix(".gz")
    text = json.dumps(lines) if lower.endswith(".json") else "\r\n".join(map(json.dumps, lines))
    data = b"\xef\xbb\xbf" + text.encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
    records, found = read_kind(path)
    assert found == kind
    assert len(records) == 2
    for record in records:
        assert record.conversation is not None
        assert [dict(message) for message in record.conversation.messages] == [USER, ANSWER]
        assert record.conversation.tools is None


def test_texts_are_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": " Two\nlines. "}) + "\n" + json.dumps({"text": " "}) + "\n")
    records, found = read_kind(path)
    assert found == "text"
    assert [record.caption for record in records] == ["Two\nlines."]
    assert records[0].conversation is None


def test_a_format_can_be_fixed(tmp_path: Path) -> None:
    path = tmp_path / "both.jsonl"
    path.write_text(json.dumps(MESSAGES | {"text": "Something else."}) + "\n")
    assert read_kind(path)[1] == "messages"
    records, found = read_kind(path, kind="text")
    assert (found, records[0].caption) == ("text", "Something else.")
    with pytest.raises(UserError, match="is no conversation: its prompt are no list"):
        read_kind(path, kind="completion")


def test_a_plan_says_what_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(MESSAGES) + "\n" for _ in range(2)))
    dataset = DatasetConfig(
        directory=tmp_path, files={"small": "c.jsonl"}, sizes={"small": 2}, size=("small",)
    )
    found, notices = identify_samples(dataset, ("small",))
    assert found["small"].kind == "messages"
    assert notices == ["c.jsonl holds conversations (messages); labels are the assistant's turns"]
    every = dataset.model_copy(update={"loss": "all"})
    assert identify_samples(every, ("small",))[1] == [
        "c.jsonl holds conversations (messages); labels are all of them"
    ]


def test_shared_roles_and_a_system_prompt() -> None:
    turns = [
        {"from": "human", "value": "Hi."},
        {"from": "function_call", "value": "look()"},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "Rain."},
    ]
    found = read_conversation({"conversations": turns, "system": "Be kind."}, "sharegpt")
    assert [message["role"] for message in found.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]


def test_a_prompt_may_be_messages() -> None:
    found = read_conversation({"prompt": [USER], "completion": [ANSWER]}, "completion")
    assert [dict(message) for message in found.messages] == [USER, ANSWER]


def shows(part: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part]}, ANSWER]}


def test_pictures_are_parts_of_what_is_said() -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": "a/1.png"}},
        {"type": "text", "text": "What is this?"},
        {"type": "image", "image": "b.png"},
    ]
    entry = {"messages": [{"role": "user", "content": parts}, ANSWER]}
    found = read_conversation(entry, "messages")
    assert found.messages[0]["content"] == [
        {"type": "image", "image": "a/1.png"},
        {"type": "text", "text": "What is this?"},
        {"type": "image", "image": "b.png"},
    ]
    assert found.images == ("a/1.png", "b.png")
    assert not found.shows_after_an_answer()
    again = {"messages": [USER, ANSWER, entry["messages"][0], ANSWER]}
    assert read_conversation(again, "messages").shows_after_an_answer()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"messages": []}, "its messages are no list of turns"),
        ({"messages": "Hi."}, "its messages are no list of turns"),
        ({"messages": [USER]}, "it has no turn of the assistant"),
        ({"messages": ["Hi."]}, "its message 1 is no object"),
        ({"messages": [USER, {"role": "robot", "content": "x"}]}, "the role of its message 2 is"),
        ({"messages": [USER, {"role": ["a"], "content": "x"}]}, "the role of its message 2 is"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "its message 2 is empty"),
        ({"messages": [USER, {"role": "assistant"}]}, "its message 2 is empty"),
        ({"messages": [USER, {"role": "assistant", "content": 5}]}, "neither text nor parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
            "a picture of its message 1 has no path",
        ),
        (shows({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}), "no file"),
        (shows({"type": "image", "image": "../a.png"}), "outside the images' directory"),
        (shows({"type": "image", "image": "/a.png"}), "outside the images' directory"),
        (shows({"type": "video", "video": "a.mp4"}), "neither text nor a picture"),
        (shows({"type": "text"}), "neither text nor a picture"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]},
            "a picture of its message 2 has no path",
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]},
                ]
            },
            "its message 2 is an answer with a picture",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "a tool call of its message 2 names no function",
        ),
        (
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                    },
                ]
            },
            "the arguments of message 2 are no JSON",
        ),
        ({"messages": [USER, ANSWER], "tools": {"a": 1}}, "its tools are no list"),
        ({"conversations": [{"from": "nobody", "value": "x"}]}, "its turn 1 is from"),
        ({"conversations": [{"from": "gpt", "value": " "}]}, "its turn 1 is no text, or empty"),
        ({"prompt": " ", "completion": "x"}, "its prompt is empty"),
        ({"prompt": "x", "completion": 1}, "its completion are no list of turns"),
    ],
)
def test_what_is_no_conversation_is_named(entry: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    good = {"messages": MESSAGES, "conversations": SHARED, "prompt": COMPLETION}[next(iter(entry))]
    path.write_text(json.dumps(good) + "\n" + json.dumps(entry) + "\n")
    (first, second), _ = read_kind(path)
    assert (first.fault, second.conversation) == ("", None)
    assert second.fault.startswith("(line 2) is no conversation: ")
    assert said in second.fault
    path.write_text(json.dumps(entry) + "\n")
    with pytest.raises(UserError) as caught:
        read_kind(path)
    assert caught.value.what.startswith(
        "none of its 1 records fits; sample 1 (line 1) is no conversation: "
    )
    assert str(path) in caught.value.where


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.json", b"{", "is no JSON"),
        ("a.json", b'{"messages": []}', "is no list of records"),
        ("a.json", b'["Hi."]', "entry 1 is no object"),
        ("a.json", b'[{"caption": "a"}, 3]', "entry 2 is no object"),
        ("a.jsonl", b'{"question": "a"}', "line 1 has none of the keys"),
        ("a.jsonl", b'{"messages": "\x00"}', "line 1 is no JSON"),
        ("a.jsonl.gz", b"not compressed", "is no whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-6], "is no whole gzip file"),
        ("a.csv.gz", b"", "is no file of samples that qsens knows"),
        ("a.txt.gz", b"", "is no file of samples that qsens knows"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "assistant", "content": "\\ud83d"}]}',
            "it holds half of a surrogate pair",
        ),
    ],
)
def test_hostile_files_give_one_message(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_kind(path)
    assert said in caught.value.what


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as opened:
        for _ in range((MOST_BYTES >> 20) + 1):
            opened.write(bytes(1 << 20))
    with pytest.raises(UserError, match="unpacks to more than"):
        read_kind(path)


def test_parquet_with_nested_columns(tmp_path: Path) -> None:
    """A column that one row has and another has not is null in the other."""
    tool = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    call = {"role": "assistant", "content": None, "tool_calls": [tool]}
    rows = [MESSAGES, {"messages": [USER, call, {"role": "tool", "content": "1"}, ANSWER]}]
    path = tmp_path / "c.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    records, found = read_kind(path)
    assert found == "messages"
    first, second = (record.conversation for record in records)
    assert first is not None
    assert second is not None
    assert [dict(message) for message in first.messages] == [USER, ANSWER]
    assert [message["role"] for message in second.messages] == [
        *("user", "assistant", "tool", "assistant")
    ]
    (made,) = second.messages[1]["tool_calls"]
    assert made["function"] == {"name": "f", "arguments": {}}
    whole = path.read_bytes()
    for data in (b"", b"PAR1", whole[:-20], whole[:40] + bytes(40) + whole[80:]):
        path.write_bytes(data)
        with pytest.raises(UserError, match="is no whole Parquet file"):
            read_kind(path)


def test_parquet_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pyarrow is not installed") as caught:
        read_kind(tmp_path / "c.parquet")
    assert 'pip install "qsens[parquet]"' in caught.value.remedy
