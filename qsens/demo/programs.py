"""Small programs in Python, for the demo checkpoint: a data set of code beside its captions.

Each defines a function, calls it, and says in a comment what comes of it, which is true. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Final

from qsens.demo.sentences import Draw

COUNT: Final = 512
"""Programs in the shipped file."""

_SEED: Final = 2
_LISTS: Final = "numbers values items scores prices ages lengths weights"
_EACH: Final = "n value item x each one"
_TOTALS: Final = "total result found answer best"
_WORDS: Final = "apple river stone cloud garden window paper lantern bridge market"


def programs(count: int, *, seed: int = _SEED) -> list[str]:
    """Return programs, no two alike, the same on any machine.

    The first `count` do not depend on `count`.
    """
    made: dict[str, None] = {}
    stream = _stream(seed)
    while len(made) < count:
        made.setdefault(next(stream))
    return list(made)


def shipped() -> str:
    """Return the content of the shipped file: a program a line, as JSON."""
    return "".join(json.dumps({"text": one}) + "\n" for one in programs(COUNT))


def _stream(seed: int) -> Iterator[str]:
    draw = Draw(seed)
    while True:
        yield draw.one(_KINDS)(draw)


def _sum(draw: Draw) -> str:
    values, each, total = draw.word(_LISTS), draw.word(_EACH), draw.word(_TOTALS)
    what, term, factor, power = draw.one(
        [
            ("sum_of", each, 1, 1),
            ("squares_of", f"{each} * {each}", 1, 2),
            ("doubled", f"2 * {each}", 2, 1),
        ]
    )
    given = _numbers(draw)
    return _program(
        f"{what}_{values}({values})",
        [
            f"{total} = 0",
            f"for {each} in {values}:",
            f"    {total} += {term}",
            f"return {total}",
        ],
        f"{what}_{values}({given})",
        sum(factor * n**power for n in given),
    )


def _largest(draw: Draw) -> str:
    values, each, best = draw.word(_LISTS), draw.word(_EACH), draw.word(_TOTALS)
    name, sign, pick = draw.one([("largest", ">", max), ("smallest", "<", min)])
    given = _numbers(draw)
    return _program(
        f"{name}({values})",
        [
            f"{best} = {values}[0]",
            f"for {each} in {values}:",
            f"    if {each} {sign} {best}:",
            f"        {best} = {each}",
            f"return {best}",
        ],
        f"{name}({given})",
        pick(given),
    )


def _count(draw: Draw) -> str:
    letter, word = draw.word("a e i o r n t"), draw.word(_WORDS)
    each, total = draw.one(["letter", "c", "char"]), draw.word(_TOTALS)
    return _program(
        f"count_{letter}(word)",
        [
            f"{total} = 0",
            f"for {each} in word:",
            f'    if {each} == "{letter}":',
            f"        {total} += 1",
            f"return {total}",
        ],
        f'count_{letter}("{word}")',
        word.count(letter),
    )


def _power(draw: Draw) -> str:
    base, times = 2 + int(draw.chance(0.5)), draw.one(range(2, 9))
    result = draw.word(_TOTALS)
    return _program(
        "power(base, times)",
        [
            f"{result} = 1",
            "while times > 0:",
            f"    {result} *= base",
            "    times -= 1",
            f"return {result}",
        ],
        f"power({base}, {times})",
        base**times,
    )


def _kept(draw: Draw) -> str:
    values, each = draw.word(_LISTS), draw.word(_EACH)
    limit, given = draw.one(range(2, 9)), _numbers(draw)
    return _program(
        f"above_{limit}({values})",
        [f"return [{each} for {each} in {values} if {each} > {limit}]"],
        f"above_{limit}({given})",
        [n for n in given if n > limit],
    )


_KINDS: Final[list[Callable[[Draw], str]]] = [_sum, _largest, _count, _power, _kept]


def _numbers(draw: Draw) -> list[int]:
    return [draw.one(range(1, 20)) for _ in range(draw.one(range(3, 7)))]


def _program(head: str, body: list[str], call: str, answer: object) -> str:
    lines = "".join(f"    {line}\n" for line in body)
    return f"def {head}:\n{lines}\n\nprint({call})  # {answer}\n"
