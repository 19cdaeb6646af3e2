"""Training of a small causal language model on short token sequences, and what its loss is worth.

Losses are cross-entropies in nats over labels. A label is every token but the first of its
sequence; padding is none, and predicts none.

All of it runs on one CPU thread: matrices this small gain little from a second one and lose tenfold
where cores are shared, and the weights do not depend on how many cores there are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from qsens.demo.recipe import Training

Progress = Callable[[int, int, float], None]
"""Called with the step, the number of steps and the loss in nats per token."""

_NO_LABEL: Final = -100
_BUCKET: Final = 16
_MAX_GRAD_NORM: Final = 1.0


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def fit(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    sequences: Sequence[list[int]],
    settings: Training,
    *,
    steps: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Train some parameters of a model in place; torch's global generator orders the sequences.

    Args:
        model: Takes `input_ids` and `attention_mask`, int64 of shape (batch, tokens), and returns
            an object with `logits` of shape (batch, tokens, vocabulary).
        parameters: What to train.
        sequences: Token ids, at least two in each.
        settings: How to train.
        steps: End after so many steps of the same schedule.
        progress: Told how it goes.
    """
    size = settings.batch_size
    total = settings.epochs * math.ceil(len(sequences) / size)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate(step, total, settings.warmup_steps)
    )
    batches = [batch for _ in range(settings.epochs) for batch in _epoch(sequences, size)]
    model.train()
    for step, batch in enumerate(batches[:steps], start=1):
        loss = _summed_loss(model, batch) / _labels(batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, total, loss.item())
    optimizer.zero_grad()


@_one_thread()
def mean_loss(model: nn.Module, sequences: Sequence[list[int]], batch_size: int) -> float:
    """Return the cross-entropy of a model on sequences of token ids, nats per label."""
    batches = [sequences[i : i + batch_size] for i in range(0, len(sequences), batch_size)]
    with torch.no_grad():
        return sum(_summed_loss(model, b).item() for b in batches) / _labels(sequences)


def unigram_entropy(
    training: Iterable[Sequence[int]], held_out: Sequence[Sequence[int]], vocab_size: int
) -> float:
    """Return the cross-entropy, on held-out labels, of the frequencies of labels in training.

    Frequencies are smoothed by adding one to each count, so a token unseen in training is possible.
    """
    counts = Counter(token for ids in training for token in ids[1:])
    total = counts.total() + vocab_size
    nats = -sum(math.log((counts[token] + 1) / total) for ids in held_out for token in ids[1:])
    return nats / _labels(held_out)


def _rate(step: int, total: int, warmup: int) -> float:
    """Return the factor on the learning rate at a step counted from 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _epoch(sequences: Sequence[list[int]], size: int) -> list[list[list[int]]]:
    """Return batches in random order, each of sequences of similar length."""
    order = torch.randperm(len(sequences)).tolist()
    batches = []
    for start in range(0, len(order), _BUCKET * size):
        bucket = sorted((sequences[i] for i in order[start : start + _BUCKET * size]), key=len)
        batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    return [batches[i] for i in torch.randperm(len(batches)).tolist()]


def _labels(sequences: Iterable[Sequence[int]]) -> int:
    return sum(len(ids) - 1 for ids in sequences)


def _summed_loss(model: nn.Module, batch: Sequence[list[int]]) -> Tensor:
    """Return the cross-entropy summed over the labels of a batch, in nats, shape ()."""
    rows = [torch.tensor(ids) for ids in batch]
    ids = pad_sequence(rows, batch_first=True)
    real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits
    # By the mask, not by the token: any token that pads can stand in a text as well.
    labels = ids.masked_fill(real == 0, _NO_LABEL)[:, 1:]
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=_NO_LABEL, reduction="sum"
    )
