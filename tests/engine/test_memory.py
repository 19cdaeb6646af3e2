"""The memory that a pass may take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from qsens.checkpoint.groups import find_groups
from qsens.checkpoint.loading import load_model
from qsens.config import ModelConfig
from qsens.data.samples import Samples
from qsens.engine.candidates import Request, distinct
from qsens.engine.memory import GIB, MEMORY_SHARE, memory_share, plan_budget, weight_bytes
from qsens.errors import UserError

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult


def test_a_share_of_the_budget_halves_it_and_lets_fewer_tokens_through(
    demo_checkpoint: DemoResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(path=demo_checkpoint.directory, dtype="float32")
    model = load_model(config, torch.device("cpu"))
    groups = find_groups(model, config.vision_patterns)
    candidates = distinct([Request("a", {"num_bits": 8, "axis": 0}, None, 16, 16)])
    given = 0.125 + weight_bytes(model) / GIB
    whole = plan_budget(model, groups, candidates, memory_gb=given)
    monkeypatch.setenv(MEMORY_SHARE, "0.5")
    half = plan_budget(model, groups, candidates, memory_gb=given)
    assert (whole.limit, half.limit) == (GIB // 8, GIB // 16)
    assert half.predicted <= half.limit
    assert half.max_tokens < whole.max_tokens


def test_few_samples_leave_room_for_more_formats_of_the_head(
    demo_checkpoint: DemoResult,
) -> None:
    config = ModelConfig(path=demo_checkpoint.directory, dtype="float32")
    model = load_model(config, torch.device("cpu"))
    groups = find_groups(model, config.vision_patterns)
    weights = [{"num_bits": bits, "axis": 0} for bits in (4, 5, 6, 8)]
    candidates = distinct([Request(str(w), w, None, 16, 16) for w in weights])
    given = 0.08 + weight_bytes(model) / GIB
    many, few = (
        plan_budget(
            model,
            groups,
            candidates,
            memory_gb=given,
            losses=8,
            samples=Samples(((1,) * length,) * 16, (False,) * 16),
        )
        for length in (4096, 4)
    )
    assert few.max_tokens == many.max_tokens
    assert few.predicted < many.predicted <= few.limit
    assert (many.head_formats, few.head_formats) == (1, 4)


@pytest.mark.parametrize("text", ["0", "2", "half", "nan"])
def test_a_share_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(MEMORY_SHARE, text)
    with pytest.raises(UserError, match=f"'{text}' is no share"):
        memory_share()
