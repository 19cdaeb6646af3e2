"""What the demo model is trained and measured on, as batches: sentences, and drawings in a chat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from qsens.data.chat import chat_samples
from qsens.data.samples import Batch, Samples, make_batch
from qsens.demo.drawings import Drawing
from qsens.demo.recipe import PROMPT

_T = TypeVar("_T")
_BUCKET = 16


@dataclass(frozen=True)
class Lessons:
    """What a model is trained on.

    Attributes:
        sequences: Token ids of texts, at least two in each.
        drawings: Drawings, each with its caption as the answer.
        processor: The processor, its tokenizer with a chat template.
        settings: The model's configuration.
        batch_size: Samples of a batch.
    """

    sequences: Sequence[list[int]]
    drawings: Sequence[Drawing]
    processor: Any
    settings: Any
    batch_size: int

    def __len__(self) -> int:
        """Return the number of batches."""
        counts = len(self.sequences), len(self.drawings)
        return sum(-(-count // self.batch_size) for count in counts)

    def shuffled(self) -> Iterator[Batch]:
        """Return all batches, texts and drawings evenly mixed; torch's generator orders them."""
        texts = _alike(self.sequences, self.batch_size)
        order = torch.randperm(len(self.drawings)).tolist()
        drawn = _cut([self.drawings[index] for index in order], self.batch_size)
        places = [((at + 0.5) / len(texts), "text", at) for at in range(len(texts))]
        places += [((at + 0.5) / len(drawn), "drawn", at) for at in range(len(drawn))]
        for _, kind, at in sorted(places):
            if kind == "text":
                yield text_batch(texts[at])
            else:
                yield self._drawing_batch(drawn[at])

    def _drawing_batch(self, drawings: Sequence[Drawing]) -> Batch:
        # The model also learns where a caption ends.
        end = self.processor.tokenizer.eos_token
        captions = [f"{drawing.caption}{end}" for drawing in drawings]
        return drawing_batch(drawings, captions, self.processor, self.settings)


def text_batch(sequences: Sequence[list[int]]) -> Batch:
    """Return token ids of texts as a batch."""
    samples = Samples(tuple(map(tuple, sequences)), (False,) * len(sequences))
    return make_batch(samples, range(len(sequences)))


def drawing_batch(
    drawings: Sequence[Drawing], captions: Sequence[str], processor: Any, settings: Any
) -> Batch:
    """Return drawings as a batch, each with a caption as the answer of the chat."""
    samples = chat_samples(
        [np.asarray(drawing.image()) for drawing in drawings],
        captions,
        processor,
        settings,
        resize=False,
        prompt=PROMPT,
        longest=processor.tokenizer.model_max_length,
        dtype=torch.float32,
    )
    return make_batch(samples, range(len(samples)))


def text_batches(sequences: Sequence[list[int]], batch_size: int) -> Iterator[Batch]:
    """Return batches of texts in their order."""
    return map(text_batch, _cut(sequences, batch_size))


def drawing_batches(
    drawings: Sequence[Drawing],
    batch_size: int,
    processor: Any,
    settings: Any,
    *,
    shuffled: bool = False,
) -> Iterator[Batch]:
    """Return batches of drawings in their order.

    Args:
        drawings: The drawings.
        batch_size: Samples of a batch.
        processor: The processor.
        settings: The model's configuration.
        shuffled: Whether each caption stands beside the next one's drawing.
    """
    shown = [*drawings[1:], *drawings[:1]] if shuffled else drawings
    captions = [drawing.caption for drawing in drawings]
    for seen, said in zip(_cut(shown, batch_size), _cut(captions, batch_size), strict=True):
        yield drawing_batch(seen, said, processor, settings)


def _alike(sequences: Sequence[list[int]], size: int) -> list[Sequence[list[int]]]:
    """Return batches in random order, each of sequences of similar length."""
    order = torch.randperm(len(sequences)).tolist()
    batches: list[Sequence[list[int]]] = []
    for indices in _cut(order, _BUCKET * size):
        batches += _cut(sorted((sequences[index] for index in indices), key=len), size)
    return [batches[index] for index in torch.randperm(len(batches)).tolist()]


def _cut(items: Sequence[_T], size: int) -> list[Sequence[_T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
