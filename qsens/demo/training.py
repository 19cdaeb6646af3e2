"""Training of a small language model on batches, and what its loss is worth.

Losses are cross-entropies in nats over labels. In text, a label is every token but the first of its
sequence; beside a picture, every token of the caption. Padding is none, and predicts none.

All of it runs on one CPU thread: matrices this small gain little from a second one and lose tenfold
where cores are shared, and the weights do not depend on how many cores there are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsens.data.samples import Batch
from qsens.demo.recipe import Training

Progress = Callable[[int, int, float], None]
"""Called with the step, the number of steps and the loss in nats per token."""

_MAX_GRAD_NORM = 1.0


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
    parts: Sequence[tuple[Sequence[nn.Parameter], float]],
    batches: Iterable[Batch],
    total: int,
    settings: Training,
    *,
    progress: Progress | None = None,
) -> None:
    """Train parts of a model in place.

    Args:
        model: Takes what :meth:`Batch.inputs` gives and `attention_mask`, int64 of shape (batch,
            tokens), and returns an object with `logits` of shape (batch, tokens, vocabulary).
        parts: Parameters with their learning rate as a share of that of the settings. The gradient
            of each part is clipped by itself; a part that a batch does not reach is left alone.
        batches: A batch a step.
        total: Steps of the schedule; with fewer batches, training ends early.
        settings: How to train.
        progress: Told how it goes.
    """
    optimizer = torch.optim.AdamW(
        [
            {"params": list(parameters), "lr": share * settings.learning_rate}
            for parameters, share in parts
        ],
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate(step, total, settings.warmup_steps)
    )
    model.train()
    for step, batch in enumerate(batches, start=1):
        loss = _summed_loss(model, batch) / _labels(batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        for parameters, _ in parts:
            nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, total, loss.item())
    optimizer.zero_grad()


@_one_thread()
def mean_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the cross-entropy of a model on batches, nats per label."""
    nats, labels = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            nats += _summed_loss(model, batch).item()
            labels += _labels(batch)
    return nats / labels


def unigram_entropy(
    training: Iterable[Sequence[int]], held_out: Sequence[Sequence[int]], vocab_size: int
) -> float:
    """Return the cross-entropy, on held-out labels, of the frequencies of labels in training.

    Frequencies are smoothed by adding one to each count, so a token unseen in training is possible.
    """
    counts = Counter(token for ids in training for token in ids[1:])
    total = counts.total() + vocab_size
    nats = -sum(math.log((counts[token] + 1) / total) for ids in held_out for token in ids[1:])
    return nats / sum(len(ids) - 1 for ids in held_out)


def _rate(step: int, total: int, warmup: int) -> float:
    """Return the factor on the learning rate at a step counted from 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _labels(batch: Batch) -> int:
    return sum(batch.lengths("labels"))


def _summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy summed over the labels of a batch, in nats, shape ()."""
    given = {**batch.inputs(), "attention_mask": batch.attention_mask}
    logits = model(**given, use_cache=False).logits
    where = batch.label_mask()
    return F.cross_entropy(logits[:, :-1][where], batch.input_ids[:, 1:][where], reduction="sum")
