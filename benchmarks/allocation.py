"""How long the search for a recipe takes, and how close its answer is to the bound.

From the root of the repository:

    python -m benchmarks.allocation --groups 2000 --formats 20

Groups have the sizes of a large model's; the predicted KL falls by four a bit, with noise, over
several orders of magnitude between groups. The bound is that of the linear relaxation.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from qsens.recipes.allocation import allocate, pareto
from qsens.recipes.format_choices import UNQUANTIZED, DecisionGroup, FormatChoice

_SIZES = (6, 10, 25, 50, 380)  # in units of 2 ** 20 weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.allocation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--groups", type=int, default=2000)
    parser.add_argument("--formats", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args(arguments)
    table = Table("seed", "bits asked", "bits used", "predicted KL", "s", title="Search")
    slowest = 0.0
    for seed in range(given.seeds):
        groups = random_groups(given.groups, given.formats, seed)
        for target in (5.0, 6.0, 8.0):
            started = time.perf_counter()
            chosen = allocate(groups, target)
            seconds = time.perf_counter() - started
            slowest = max(slowest, seconds)
            row = (f"{target:g}", f"{chosen.bits:.6f}", f"{chosen.score:.6g}", f"{seconds:.2f}")
            table.add_row(str(seed), *row)
        started = time.perf_counter()
        points = len(pareto(groups))
        table.add_row(
            str(seed), "curve", f"{points} points", "", f"{time.perf_counter() - started:.2f}"
        )
    Console().print(table)
    print(f"{given.groups} groups, {given.formats} formats: slowest {slowest:.2f} s")
    return 0


def random_groups(count: int, formats: int, seed: int) -> list[DecisionGroup]:
    """Return decision groups that look like those of a large model."""
    draw = np.random.default_rng(seed)
    bits = np.sort(np.concatenate([[4.125], draw.uniform(4.125, 12, formats - 1)]))
    made = []
    for index in range(count):
        level = np.exp(draw.normal(0, 2))
        hurt = level * 4.0**-bits * np.exp(draw.normal(0, 0.5, formats))
        pairs = zip(bits.tolist(), hurt.tolist(), strict=True)
        options = [FormatChoice(f"f{place}", *pair) for place, pair in enumerate(pairs)]
        weights = int(draw.choice(_SIZES)) << 20
        made.append(DecisionGroup((f"group {index}",), weights, (UNQUANTIZED, *options)))
    return made


if __name__ == "__main__":
    sys.exit(main())
