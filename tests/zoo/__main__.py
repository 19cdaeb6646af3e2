"""Find what every type of transformers is made of, score all, and write it down: ``make zoo``.

Writes ``qsens/checkpoint/structures.json``, then, from plans that read it, ``docs/zoo.md``. Named
types alone are scored and printed, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import modelopt.torch.quantization  # noqa: F401  imported once, before the children are forked
import transformers

from tests.zoo import structures
from tests.zoo.children import run_all
from tests.zoo.scores import DRAWS, PAIRS, check

PAGE = Path(__file__).resolve().parents[2] / "docs" / "zoo.md"
_HEAD = f"""# Which models can be scored

Written by `make zoo`, with transformers {transformers.__version__}. Of each of its {{count}} types
of causal and image-text models a tiny checkpoint is made (its default configuration shrunk, random
weights, float32), planned, and scored by `gradient` and by `fisher`, on text, in the pairs
{", ".join(f"`{pair}`" for pair in PAIRS)}.
**{{right}} are right**, {{refused}} are refused when planned, {{wrong}} are wrong.

- *Groups*: how many are scored.
- *Gradient*: the largest relative difference of a group's score from plain autograd of the whole
  model, which shares no code with the engine.
- *Fisher*: by how many standard errors, at most, the estimate of {DRAWS} draws is away from the
  exact value; of a group that is more than 4 away, {8 * DRAWS} other draws decide.
- *ModelOpt*: the largest relative difference from `mtq.auto_quantize` on the same batch, where it
  runs and has the same groups.

| type | result | groups | gradient | fisher | ModelOpt |
| --- | --- | --- | --- | --- | --- |
"""


def main() -> int:
    """Run it; return the exit code: 1 where a type is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="types to score; all, and the files, without")
    parser.add_argument("--together", type=int, default=2, help="types at once")
    parser.add_argument("--seconds", type=float, default=240, help="what a type may take")
    given = parser.parse_args()
    started = time.monotonic()
    if not given.types:
        structures.write(_all(structures.TYPES, structures.find, given, "found"))
    results = _all(given.types or structures.TYPES, check, given, "scored")
    wrong = {name for name, each in results.items() if "wrong" in each}
    if given.types:
        print(json.dumps(results, indent=1))
    else:
        PAGE.write_text(_page(results), encoding="utf-8")
    print(f"{len(results)} types, {len(wrong)} wrong, {time.monotonic() - started:.0f} s")
    return 1 if wrong else 0


def _all(types: list[str], work: Any, given: argparse.Namespace, word: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, result in run_all(types, work, together=given.together, seconds=given.seconds):
        result.pop("seconds", None)
        if "error" in result:  # of a structure it is a refusal, of scores a defect
            result = {"refused" if work is structures.find else "wrong": result["error"]}
        results[name] = result
        print(f"\r{word} {len(results)}/{len(types)} {name:40}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return results


def _page(results: dict[str, Any]) -> str:
    counts = {
        "count": len(results),
        "refused": sum("refused" in each for each in results.values()),
        "wrong": sum("wrong" in each for each in results.values()),
    }
    counts["right"] = counts["count"] - counts["refused"] - counts["wrong"]
    lines = [_line(name, results[name]) for name in sorted(results)]
    return _HEAD.format(**counts) + "\n".join(lines) + "\n"


def _line(name: str, result: dict[str, Any]) -> str:
    if "refused" in result:
        reason = result["refused"].partition(" cannot be scored: ")[2] or result["refused"]
        return f"| `{name}` | refused: {_cell(reason)} | | | | |"
    said = f"wrong: {_cell(result['wrong'])}" if "wrong" in result else "right"
    beside = result.get("modelopt", "")
    shown = _cell(beside) if isinstance(beside, str) else f"{beside:.0e}"
    numbers = [result.get("groups", ""), *(result.get(key) for key in ("gradient", "fisher"))]
    groups, gradient, fisher = numbers
    if gradient is None or fisher is None:
        return f"| `{name}` | {said} | | | | {shown} |"
    return f"| `{name}` | {said} | {groups} | {gradient:.0e} | {fisher:.1f} | {shown} |"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("<", "").replace(">", "").strip()


if __name__ == "__main__":
    sys.exit(main())
