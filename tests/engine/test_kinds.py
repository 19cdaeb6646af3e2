"""Models of other kinds: padded batches, small budgets, and measured divergences of all groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qsens.checkpoint.experts import expert_weights, is_experts
from qsens.checkpoint.groups import Group, find_groups
from qsens.checkpoint.modules import weight_of
from qsens.checkpoint.structure import traits_of
from qsens.checkpoint.twin import build_twin, default_settings
from qsens.data.samples import Samples, make_batch
from qsens.engine.amax import calibrate
from qsens.engine.batching import plan_batches
from qsens.engine.candidates import Request, distinct
from qsens.engine.discovery import discover
from qsens.engine.gradient.scorer import score
from qsens.engine.kl.measure import diverge
from qsens.engine.memory import Budget
from qsens.numerics import fake_quantize

INT4 = {"num_bits": 4, "axis": 0}
TYPES = ("opt", "cohere", "gemma2", "gpt2", "gpt_oss", "nemotron_h", "gemma4_text", "roformer")
LENGTHS = (5, 9, 3, 7)
CANDIDATES = distinct([Request("w4", INT4, None, 4, 4)])


@pytest.fixture(scope="module", params=TYPES)
def model(request: pytest.FixtureRequest) -> Any:
    twin = build_twin(default_settings(request.param))
    discover(twin)
    return twin


@pytest.fixture(scope="module")
def samples() -> Samples:
    draw = torch.Generator().manual_seed(2)
    ids = (torch.randint(20, 220, (length,), generator=draw).tolist() for length in LENGTHS)
    return Samples(tuple(map(tuple, ids)), (False,) * len(LENGTHS))


def small(tokens: int) -> Budget:
    return Budget(limit=0, max_tokens=tokens, predicted=0)


def test_scores_depend_on_no_batch(model: Any, samples: Samples) -> None:
    """Padded together, one at a time in windows of their own, and each alone in one window."""
    groups = find_groups(model)
    alone = [make_batch(samples, [index]) for index in range(len(samples))]
    expected = score(model, samples, groups, CANDIDATES, {}, batches=alone).per_sample
    batches = plan_batches(model, samples, 4, CANDIDATES, (), None)
    assert len(batches) == (1 if traits_of(model).pads else 4)
    for budget in (small(1 << 14), small(1)):
        found = score(model, samples, groups, CANDIDATES, {}, budget=budget)
        assert not found.failures.refused
        assert not found.failures.broken
        assert torch.allclose(found.per_sample, expected, rtol=1e-3, atol=1e-9 * expected.max())
    assert (expected.sum(dim=2) > 0).sum() > 4


def test_amax_is_that_of_the_real_tokens(model: Any, samples: Samples) -> None:
    groups = find_groups(model)
    padded = calibrate(model, samples, groups, calibration_sizes=[2, 4])
    alone = [make_batch(samples, [index]) for index in range(len(samples))]
    expected = calibrate(model, samples, groups, calibration_sizes=[2, 4], batches=alone)
    for size in (2, 4):
        assert padded[size].keys() == expected[size].keys()
        for name, largest in expected[size].items():
            assert float(padded[size][name]) == pytest.approx(float(largest), rel=1e-5), name


def test_divergences_are_those_of_whole_models(model: Any, samples: Samples) -> None:
    groups = find_groups(model)
    found = diverge(model, samples, groups, CANDIDATES, {}, boundaries=(), budget=small(1 << 12))
    assert not found.failures.refused
    assert not found.failures.broken
    before = distributions(model, samples)
    measured = 0
    for group, nats in zip(found.groups, found.per_sample[:, 0], strict=True):
        kept = quantize(model, group)
        after = distributions(model, samples)
        restore(kept)
        for at, (log_p, log_q) in enumerate(zip(before, after, strict=True)):
            truth = float((log_p.exp() * (log_p - log_q)).sum())
            assert float(nats[at]) == pytest.approx(truth, rel=2e-3, abs=2e-7), group.name
        measured += float(nats.sum()) > 1e-5
    assert measured > 3


def distributions(model: Any, samples: Samples) -> list[torch.Tensor]:
    return [
        model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
        for ids in samples.ids
    ]


def quantize(model: Any, group: Group) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Quantize a group's weights in place; return them with what they were.

    A head that is tied to the embedding gets a weight of its own first.
    """
    kept = []
    for name in group.members:
        module = model.get_submodule(name)
        if is_experts(module):
            weights = [one for stack in expert_weights(module) for one in stack]
        else:
            if module is model.get_output_embeddings():
                module.weight = torch.nn.Parameter(module.weight.clone(), requires_grad=False)
            weights = [weight_of(module)]
        for weight in weights:
            kept.append((weight, weight.clone()))
            weight.copy_(fake_quantize(weight.contiguous(), INT4))
    return kept


def restore(kept: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for weight, before in kept:
        weight.copy_(before)
