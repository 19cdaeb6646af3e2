"""Prompts of many kinds for a small instruct model, from a seeded grammar: no download."""

from __future__ import annotations

import itertools
import json
import random

_ASKED = """\
Explain {topic} to a child.
What are three facts about {topic}?
Write a short poem about {topic}.
Write two sentences of a story in which {topic} matters.
Why is {topic} important?
Give me a list of five words that go with {topic}.
What is the difference between {topic} and {other}?
How would you teach somebody about {topic} in a week?
Summarize what you know about {topic} in one paragraph.
Write a polite email that asks a colleague about {topic}.
Name one advantage and one drawback of {topic}.
Write a Python function whose name has to do with {topic}, and say what it does.
A shop sells {topic} for {number} dollars each. What do {count} of them cost? Think step by step.
Translate into French: I have always liked {topic}.
Correct the grammar: she have never see {topic} before.
Ask me three questions about {topic}.""".splitlines()
_TOPICS = """\
rainbows; bicycles; honey bees; the moon; bridges; bread; volcanoes; chess; libraries; gardens;
electric cars; the heart; whales; clocks; mountains; paper; music; rivers; windmills; friendship;
recipes; sleep; maps; football; glass; winter; languages; robots; trains; spices""".replace(
    "\n", " "
)


def prompts(count: int, *, seed: int = 0) -> list[str]:
    """Return prompts, no two alike, the same on any machine; the first do not depend on the count.

    Raises:
        ValueError: There are not so many.
    """
    rng = random.Random(seed)
    topics = [topic.strip() for topic in _TOPICS.replace("\n", " ").split(";")]
    pairs = list(itertools.product(_ASKED, topics))
    rng.shuffle(pairs)
    if count > len(pairs):
        raise ValueError(f"there are {len(pairs)} prompts, not {count}")
    return [
        asked.format(
            topic=topic,
            other=rng.choice([other for other in topics if other != topic]),
            number=rng.randint(2, 40),
            count=rng.randint(2, 12),
        )
        for asked, topic in pairs[:count]
    ]


def as_records(texts: list[str]) -> str:
    """Return prompts as a file of samples holds them, a line each."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)
