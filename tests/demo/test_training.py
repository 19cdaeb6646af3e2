from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from qsens.demo.batches import Lessons, text_batch, text_batches
from qsens.demo.training import Training, fit, mean_loss, unigram_entropy


class Bigram(nn.Module):
    """Logits of the next token are a row of a table; another table is never read."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
        self.idle = nn.Embedding(vocab_size, vocab_size)
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool
    ) -> SimpleNamespace:
        self.calls.append((input_ids, attention_mask))
        return SimpleNamespace(logits=self.table(input_ids))


def test_unigram_entropy_is_that_of_smoothed_labels() -> None:
    # Labels in training: 0 twice, 1 once; with one added to each of 3 tokens, 3/6, 2/6 and 1/6.
    entropy = unigram_entropy([[2, 0, 0, 1]], [[0, 0, 1], [1, 2]], 3)
    assert entropy == pytest.approx((math.log(6 / 3) + math.log(6 / 2) + math.log(6 / 1)) / 3)


def test_mean_loss_counts_real_labels_only() -> None:
    torch.manual_seed(0)
    model = Bigram(4)
    # Token 0 pads, and is a label in its own right too.
    sequences = [[1, 0, 0, 2], [3, 0], [2, 1, 3]]
    logs = torch.log_softmax(model.table.weight.detach().double(), dim=-1)
    pairs = [(a, b) for ids in sequences for a, b in pairwise(ids)]
    expected = -sum(logs[a, b].item() for a, b in pairs) / 6
    assert mean_loss(model, text_batches(sequences, 3)) == pytest.approx(expected, rel=1e-6)
    assert mean_loss(model, text_batches(sequences, 1)) == pytest.approx(expected, rel=1e-6)
    assert model.calls[0][1].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]


def test_fit_reaches_the_entropy_of_the_data() -> None:
    torch.manual_seed(0)
    model = Bigram(3)
    # After 0 comes 1 three times out of four, else 2: 0.5623 nats a label.
    batch = text_batch([[0, 1], [0, 1], [0, 1], [0, 2]] * 4)
    seen: list[tuple[int, int]] = []
    settings = Training(learning_rate=1.0, weight_decay=0.0, warmup_steps=3)
    fit(
        model,
        [([model.table.weight], 0.1)],
        [batch] * 320,
        320,
        settings,
        progress=lambda step, total, _: seen.append((step, total)),
    )
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert mean_loss(model, [batch]) == pytest.approx(expected, abs=0.01)
    assert seen == [(step, 320) for step in range(1, 321)]


def test_each_part_learns_at_its_own_rate_and_what_a_batch_does_not_reach_stays() -> None:
    def moved(share: float, settings: Training) -> tuple[float, float]:
        torch.manual_seed(0)
        model = Bigram(3)
        before = model.table.weight.detach().clone(), model.idle.weight.detach().clone()
        parts = [([model.table.weight], share), ([model.idle.weight], 1.0)]
        fit(model, parts, [text_batch([[0, 1]])], 1, settings)
        after = model.table.weight, model.idle.weight
        first, second = ((b - a).abs().max().item() for a, b in zip(before, after, strict=True))
        return first, second

    # Adam's first step is the rate itself, whatever the gradient; the idle table has none, so
    # not even its weights decay.
    settings = Training(learning_rate=0.2, weight_decay=0.0, warmup_steps=1)
    assert moved(1.0, settings) == pytest.approx((0.2, 0.0), rel=1e-4)
    assert moved(0.25, settings) == pytest.approx((0.05, 0.0), rel=1e-4)
    assert moved(1.0, replace(settings, weight_decay=0.5))[1] == 0.0


def test_lessons_show_every_sequence_once() -> None:
    torch.manual_seed(0)
    sequences = [[n, *range(n % 5)] for n in range(1, 50)]
    lessons = Lessons(sequences, [], None, None, 8)
    batches = list(lessons.shuffled())
    rows = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    assert sorted(rows) == sorted(sequences)
    assert rows != sequences
    assert len(lessons) == len(batches) == 7
