"""Rows of a sweep over the demo checkpoint's groups, with scores drawn at random."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from qsens.config import PairConfig, choices, load_sweep
from qsens.schema.summary import Row

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult

PAIRS: dict[str, PairConfig] = {
    pair.name: pair
    for pair in load_sweep(
        "demo-text", [f"quant_pair={','.join(choices('quant_pair'))}"]
    ).config.quant_pair
}


@pytest.fixture
def pairs() -> dict[str, PairConfig]:
    """The pairs that come with qsens, by name."""
    return PAIRS


@pytest.fixture
def demo_model(demo_checkpoint: DemoResult) -> Any:
    from qsens.checkpoint.loading import load_model, resolve_device
    from qsens.config import ModelConfig

    config = ModelConfig(path=demo_checkpoint.directory, dtype="float32")
    return load_model(config, resolve_device("cpu"))


@pytest.fixture
def demo_rows(demo_model: Any) -> dict[str, list[Row]]:
    """All 22 pairs: the score falls with bits, by another factor for every group."""
    from qsens.checkpoint.groups import find_groups

    draw = random.Random(0)
    groups = find_groups(demo_model, ["*visual*"])
    level = {group.name: 10 ** draw.uniform(-3, 0) for group in groups}
    found = {}
    for name, pair in PAIRS.items():
        bits = pair.effective_bits
        found[name] = [
            Row(
                layer=group.name,
                members=group.members,
                kind=group.kind,
                depth=group.depth,
                status="scored" if group.covered else "disabled",
                num_bits=bits if group.covered else 16.0,
                sensitivity=level[group.name] * 2**-bits * draw.uniform(0.2, 5)
                if group.covered
                else None,
                sensitivity_per_token=None,
                size_cost=group.weights * (bits if group.covered else 16.0) / 16,
                position=None,
                share=None,
            )
            for group in groups
        ]
    return found
