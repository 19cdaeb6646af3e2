"""Divergences of which some tokens are known, against figures worked out by hand and by numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qsens.engine.kl.lumped import lumped_divergences

# p = (0.5, 0.3, 0.2), q = (0.6, 0.2, 0.2). The first token alone: 0.5 ln(0.5/0.6) + 0.5 ln(0.5/0.4)
# = -0.0911607784 + 0.1115717757. The first two: 0.5 ln(0.5/0.6) + 0.3 ln(0.3/0.2) + 0.2 ln 1
# = -0.0911607784 + 0.1216395324; one token is left, so that is the divergence itself.
P, Q = (0.5, 0.3, 0.2), (0.6, 0.2, 0.2)
ONE, TWO = 0.0204109973, 0.0304787540


@pytest.mark.parametrize(
    ("given", "nats", "outside"),
    [
        ([0, -1, -1], ONE, (0.5, 0.4)),
        ([0, 1, -1], TWO, (0.2, 0.2)),
        ([1, 0, 2], TWO, (0.0, 0.0)),
    ],
)
def test_by_hand(given: list[int], nats: float, outside: tuple[float, float]) -> None:
    logits = torch.tensor([P], dtype=torch.float64).log() + 3.0
    ids = torch.tensor([given])
    log_q = [math.log(Q[token]) if token >= 0 else 0.0 for token in given]
    found = lumped_divergences(logits, ids, torch.tensor([log_q], dtype=torch.float64))
    assert float(found.nats) == pytest.approx(nats, rel=1e-8)
    assert float(found.outside_p) == pytest.approx(outside[0], abs=1e-12)
    assert float(found.outside_q) == pytest.approx(outside[1], abs=1e-12)


def test_more_tokens_never_bound_less_and_all_are_the_divergence() -> None:
    drawn = np.random.default_rng(0)
    scores = drawn.normal(0, 2, (40, 30))
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    other = np.exp(scores + drawn.normal(0, 0.3, scores.shape))
    q = other / other.sum(1, keepdims=True)
    truth = (p * np.log(p / q)).sum(1)
    order = np.argsort(-q, axis=1)
    before = np.zeros(len(p))
    for count in (1, 2, 5, 15, 29, 30):
        ids = order[:, :count]
        picked_p, picked_q = np.take_along_axis(p, ids, 1), np.take_along_axis(q, ids, 1)
        rest_p, rest_q = 1 - picked_p.sum(1), 1 - picked_q.sum(1)
        by_hand = (picked_p * np.log(picked_p / picked_q)).sum(1)
        if count < 30:
            by_hand += rest_p * np.log(rest_p / rest_q)
        found = lumped_divergences(
            torch.tensor(scores, dtype=torch.float32),
            torch.tensor(ids),
            torch.tensor(np.log(picked_q)),
        ).nats.numpy()
        # A rest below the rounding of log-probabilities says nothing, and costs less than that.
        np.testing.assert_allclose(found, by_hand, atol=5e-6)
        assert (found >= before - 5e-6).all()
        before = found
    np.testing.assert_allclose(before, truth, atol=1e-6)


def test_a_rest_below_rounding_is_left_out() -> None:
    """What is missing of 1, or above it, is the server's rounding: the bound stays finite."""
    logits = torch.tensor([[5.0, 4.0, -12.0]] * 2)
    log_p = logits.double().log_softmax(-1)
    ids = torch.tensor([[0, 1], [0, 1]])
    error = torch.tensor([[3e-7], [-3e-7]], dtype=torch.float64)
    found = lumped_divergences(logits, ids, log_p[:, :2] + error)
    assert (found.nats.abs() < 1e-12).all()
    assert (found.outside_q >= 0).all()
    assert float(found.outside_p[0]) == pytest.approx(float(log_p[0, 2].exp()), rel=1e-6)
