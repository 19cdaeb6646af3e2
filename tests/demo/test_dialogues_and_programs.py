"""The data sets that ship beside captions: conversations that hold together, programs that run."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qsens.config import load_sweep
from qsens.data.captions import identify_samples, read_kind
from qsens.demo import dialogues, programs

SHIPPED = Path(__file__).parents[2] / "configs" / "dataset" / "demo"


@pytest.mark.parametrize(
    ("name", "content"),
    [("dialogues.jsonl", dialogues.shipped), ("programs.jsonl", programs.shipped)],
)
def test_the_shipped_files_are_what_is_made(name: str, content: Callable[[], str]) -> None:
    assert (SHIPPED / name).read_bytes().decode("utf-8") == content()


def test_dialogues_are_conversations_that_hold_together() -> None:
    made = dialogues.dialogues(200)
    assert len({json.dumps(one) for one in made}) == 200
    assert made[:50] == dialogues.dialogues(50)
    for messages in made:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert 4 <= len(messages) <= 8
        subject = messages[1]["content"].removesuffix(".")
        for question, answer in zip(messages[2::2], messages[3::2], strict=True):
            assert question["content"][-1] in "?."
            # What is said of somebody is said of who is there.
            assert answer["content"].startswith((subject, "They ", "It "))
    records, kind = read_kind(SHIPPED / "dialogues.jsonl")
    assert kind == "messages"
    assert not any(record.fault for record in records)


def test_programs_do_what_their_comments_say() -> None:
    made = programs.programs(200)
    assert len(set(made)) == 200
    for program in made:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(program, "program", "exec"), {})
        assert program.endswith(f"  # {printed.getvalue()}")


def test_the_preset_scores_three_data_sets() -> None:
    config = load_sweep("demo-domains").config
    assert [one.name for one in config.dataset] == [
        "demo_captions", "demo_dialogues", "demo_programs",
    ]  # fmt: skip
    for dataset in config.dataset:
        found, notices = identify_samples(dataset, ("small", "medium", "large"))
        assert [one.available >= dataset.sizes["small"] for one in found.values()] == [True] * 3
        assert not any("PARTIAL" in notice for notice in notices)
