"""Conversations as token ids: kinds of chat templates, worked out by hand word by word."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qsens.data.conversations import Conversation, read_conversation
from qsens.data.rendering import conversation_samples, render
from qsens.errors import UserError

_SPECIAL = "<unk> <end> <think> </think> <call> <msg> <start> <bos> : tools: probe"
_ROLES = "user assistant system tool final analysis"
_SAID = "hi hello there bye now why so because be kind weather Paris cold rain"
WORDS = f"{_SPECIAL} {_ROLES} {_SAID}".split()


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner)
    made.chat_template = template
    return made


def said(*turns: tuple[str, str], **more: Any) -> Conversation:
    return Conversation(tuple({"role": role, "content": text} for role, text in turns), **more)


TWO = said(("user", "hi"), ("assistant", "hello there"), ("user", "why"), ("assistant", "because"))
EACH = "{% for m in messages %}"
ASK = "{% if add_generation_prompt %}assistant : {% endif %}"
PLAIN = EACH + "{{ m.role }} : {{ m.content }} <end> {% endfor %}" + ASK


def words(template: str, conversation: Conversation) -> tuple[list[str], list[str], bool]:
    """Return a conversation in words, those that are labels, and whether it is rewritten."""
    made = tokenizer(template)
    found = render(conversation, made, 1)
    read = [WORDS[at] for at in found.ids]
    labels = [word for start, end in found.spans for word in read[start:end]]
    return read, labels, found.rewritten


def check(template: str, conversation: Conversation, whole: str, labels: str) -> None:
    assert words(template, conversation) == (whole.split(), labels.split(), False)


def test_plain_roles() -> None:
    check(
        PLAIN,
        TWO,
        "user : hi <end> assistant : hello there <end> user : why <end> assistant : because <end>",
        "hello there <end> because <end>",
    )


def test_a_template_without_an_end_token() -> None:
    check(
        EACH + "{{ m.role }} : {{ m.content }} {% endfor %}" + ASK,
        TWO,
        "user : hi assistant : hello there user : why assistant : because",
        "hello there because",
    )


def test_generation_tags_say_what_is_a_label() -> None:
    """Here the word that ends a turn is outside of them."""
    template = (
        EACH + "{{ m.role }} : {% if m.role == 'assistant' %}{% generation %}{{ m.content }} "
        "{% endgeneration %}{% else %}{{ m.content }} {% endif %}<end> {% endfor %}" + ASK
    )
    check(
        template,
        TWO,
        "user : hi <end> assistant : hello there <end> user : why <end> assistant : because <end>",
        "hello there because",
    )


def test_reasoning_that_is_left_out_of_earlier_turns() -> None:
    """What the model once answered is no longer what stands there: the last answer alone counts."""
    template = (
        EACH + "{{ m.role }} : {% if m.reasoning_content and loop.last %}<think> "
        "{{ m.reasoning_content }} </think> {% endif %}{{ m.content }} <end> {% endfor %}" + ASK
    )
    first, answer, second, last = TWO.messages
    thinking = Conversation(
        (
            first,
            {**answer, "reasoning_content": "be kind"},
            second,
            {**last, "reasoning_content": "so"},
        )
    )
    whole = "user : hi <end> assistant : hello there <end> user : why <end> assistant : "
    last_answer = "<think> so </think> because <end>"
    expected = (whole + last_answer).split(), last_answer.split(), True
    assert words(template, thinking) == expected
    samples = conversation_samples(
        [thinking, TWO], tokenizer(template), loss="assistant", longest=99
    )
    (notice,) = samples.notices
    assert notice.startswith("1 of 2 conversations are written otherwise")
    # Turn by turn, each answer stands as it was given.
    each = [words(template, turn) for turn in thinking.turns()]
    first_answer = "<think> be kind </think> hello there <end>"
    asked = "user : hi <end> assistant : "
    assert each == [
        ((asked + first_answer).split(), first_answer.split(), False),
        ((whole + last_answer).split(), last_answer.split(), False),
    ]
    # All tokens are labels, however they came to stand there.
    every = conversation_samples([thinking], tokenizer(template), loss="all", longest=99)
    assert every.notices == ()
    assert every.labels() == [len(every.ids[0]) - 1]


def test_a_prompt_that_opens_the_reasoning() -> None:
    """The template asks with more than an answer without reasoning begins with."""
    template = (
        EACH + "{{ m.role }} : {{ m.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}assistant : <think> {% endif %}"
    )
    check(
        template,
        said(("user", "hi"), ("assistant", "hello")),
        "user : hi <end> assistant : hello <end>",
        "hello <end>",
    )


def test_channels() -> None:
    """As in harmony: reasoning and answer are turns of their own."""
    template = (
        EACH
        + "{% if m.role == 'assistant' %}{% if m.reasoning_content %}<start> assistant analysis "
        "<msg> {{ m.reasoning_content }} <end> {% endif %}<start> assistant final <msg> "
        "{{ m.content }} <end> {% else %}<start> {{ m.role }} <msg> {{ m.content }} <end> "
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<start> assistant {% endif %}"
    )
    messages = (
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello", "reasoning_content": "be kind"},
    )
    check(
        template,
        Conversation(messages),
        "<start> user <msg> hi <end> <start> assistant analysis <msg> be kind <end> <start> "
        "assistant final <msg> hello <end>",
        "analysis <msg> be kind <end> <start> assistant final <msg> hello <end>",
    )


def test_tools() -> None:
    template = (
        "{% if tools %}tools: {% for t in tools %}{{ t.function.name }} {% endfor %}{% endif %}"
        + EACH
        + "{{ m.role }} : {% for c in m.tool_calls or [] %}<call> {{ c.function.name }} "
        "{{ c.function.arguments.city }} {% endfor %}{{ m.content }} <end> {% endfor %}" + ASK
    )
    call = {"id": "1", "type": "function"}
    conversation = read_conversation(
        {
            "messages": [
                {"role": "user", "content": "why so cold"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        call | {"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
                    ],
                },
                {"role": "tool", "tool_call_id": "1", "content": "rain"},
                {"role": "assistant", "content": [{"type": "text", "text": "because rain"}]},
            ],
            "tools": [{"type": "function", "function": {"name": "weather"}}],
        },
        "messages",
    )
    check(
        template,
        conversation,
        "tools: weather user : why so cold <end> assistant : <call> weather Paris <end> "
        "tool : rain <end> assistant : because rain <end>",
        "<call> weather Paris <end> because rain <end>",
    )


SYSTEM = said(("system", "be kind"), ("user", "hi"), ("assistant", "hello"))


def test_a_system_turn_that_is_left_out() -> None:
    template = (
        EACH + "{% if m.role != 'system' %}{{ m.role }} : {{ m.content }} <end> {% endif %}"
        "{% endfor %}" + ASK
    )
    check(template, SYSTEM, "user : hi <end> assistant : hello <end>", "hello <end>")


def test_a_system_turn_that_becomes_part_of_the_first() -> None:
    template = (
        "<bos> {% set ns = namespace(s='') %}" + EACH + "{% if m.role == 'system' %}"
        "{% set ns.s = m.content ~ ' ' %}{% else %}{{ m.role }} : "
        "{% if m.role == 'user' %}{{ ns.s }}{% set ns.s = '' %}{% endif %}{{ m.content }} <end> "
        "{% endif %}{% endfor %}" + ASK
    )
    check(
        template,
        SYSTEM,
        "<bos> user : be kind hi <end> assistant : hello <end>",
        "hello <end>",
    )


def test_a_template_that_trims() -> None:
    template = EACH + "{{ m.role }} : {{ m.content | trim }} <end> {% endfor %}" + ASK
    check(
        template,
        said(("user", "  hi "), ("assistant", "\n hello \n")),
        "user : hi <end> assistant : hello <end>",
        "hello <end>",
    )


def test_a_template_of_parts() -> None:
    template = (
        EACH + "{{ m.role }} : {% for part in m.content %}{{ part.text }} {% endfor %}<end> "
        "{% endfor %}" + ASK
    )
    check(
        template,
        said(("user", "hi"), ("assistant", "hello there")),
        "user : hi <end> assistant : hello there <end>",
        "hello there <end>",
    )


ALTERNATING = (
    EACH + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m.role }} : {{ m.content }} <end> {% endfor %}" + ASK
)


def test_a_template_that_raises_is_named_with_the_conversation() -> None:
    check(
        ALTERNATING,
        said(("user", "hi"), ("assistant", "hello")),
        *(
            "user : hi <end> assistant : hello <end>",
            "hello <end>",
        ),
    )
    twice = said(("user", "hi"), ("user", "why"), ("assistant", "because"))
    with pytest.raises(UserError) as caught:
        conversation_samples([TWO, twice], tokenizer(ALTERNATING), loss="assistant", longest=99)
    assert caught.value.what == ("its chat template refuses conversation 2: roles must alternate")


def test_a_template_that_shows_no_answer_is_refused() -> None:
    silent = EACH + "{% if m.role == 'user' %}{{ m.content }} {% endif %}{% endfor %}"
    with pytest.raises(UserError, match="shows no turn of the assistant"):
        render(TWO, tokenizer(silent), 1)
    with pytest.raises(UserError, match="has no chat template"):
        conversation_samples([TWO], tokenizer(""), loss="assistant", longest=99)


@pytest.mark.parametrize(
    ("longest", "whole", "labels"),
    [
        (17, 17, "hello there <end> because <end>"),
        (16, 9, "hello there <end>"),  # the second answer would lose its end
        (9, 9, "hello there <end>"),
        (8, 8, "hello there"),  # not even the first fits
    ],
)
def test_long_conversations_end_with_a_turn(longest: int, whole: int, labels: str) -> None:
    samples = conversation_samples([TWO], tokenizer(PLAIN), loss="assistant", longest=longest)
    (ids,), (spans,) = samples.ids, samples.spans
    assert len(ids) == whole
    assert samples.truncated == (whole < 17,)
    read = [WORDS[at] for at in ids]
    assert [word for start, end in spans for word in read[start:end]] == labels.split()
    assert samples.labels() == [len(labels.split())]


def test_an_answer_beyond_the_longest_sample_is_named() -> None:
    with pytest.raises(UserError) as caught:
        conversation_samples([TWO], tokenizer(PLAIN), loss="assistant", longest=6)
    assert caught.value.where == "conversation 1"
    assert "dataset.calib_seq_len" in caught.value.remedy
