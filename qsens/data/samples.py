"""Samples as token ids, nominal batches, and the batches that really run. Needs torch.

A label is a real token predicted from a real token, so a sample of ``L`` tokens of text has
``L - 1`` labels; of a sample with a picture, only the tokens of its caption are labels. Which
tokens are real is known from the sample's length, never from a token's id: a tokenizer without a
pad token, or whose pad token is its end token, works like any other.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F

from qsens.checkpoint.refusals import refusals
from qsens.errors import UserError

# Enough for matrix products to be efficient, few enough for their results to stay small.
BATCH_TOKENS = 8192

Unit: TypeAlias = Literal["tokens", "labels", "predictions", "shown"] | Fraction
"""What the rows of a tensor are, sample after sample: real tokens; positions whose next token is a
label; positions whose distribution counts; tokens that stand for a picture; or of pictures too, so
many rows a patch."""


@dataclass(frozen=True)
class Picture:
    """A picture as a model is given it.

    Attributes:
        tensors: What the checkpoint's processor makes of it, by the names that the model takes.
            Along the first dimension, one picture's follow the other's.
        tokens: What the processor says of each token of its sample, by the same names,
            ``(tokens,)``; what is missing at the end is 0.
        patches: Into how many patches the tower cuts it.
        shown: How many tokens of its sample stand for it.
    """

    tensors: Mapping[str, torch.Tensor]
    tokens: Mapping[str, torch.Tensor]
    patches: int
    shown: int

    @property
    def kind(self) -> tuple[tuple[str, torch.Size], ...]:
        """Return what is equal for pictures that can share a batch."""
        return tuple((name, tensor.shape[1:]) for name, tensor in self.tensors.items())


@dataclass(frozen=True)
class Samples:
    """Tokenized samples, in file order.

    Attributes:
        ids: Token ids of each sample, at most ``calib_seq_len`` long, without padding.
        truncated: Whether each sample was cut.
        spans: Where the labels of each sample begin and end, once or several times; empty for text,
            which has a label wherever a token stands before it.
        notices: What a reader should know about how they were made.
        pictures: The picture of each sample; empty for text.
    """

    ids: tuple[tuple[int, ...], ...]
    truncated: tuple[bool, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...] = ()
    pictures: tuple[Picture, ...] = ()
    notices: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.ids)

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """Return samples of several files as those of one, in that order.

        What has a label wherever a token stands before it, says so where others do not.
        """
        spans: tuple[tuple[tuple[int, int], ...], ...] = ()
        if any(part.spans for part in parts):
            spans = tuple(
                entry
                for part in parts
                for entry in (part.spans or [((1, len(ids)),) for ids in part.ids])
            )
        return cls(
            ids=tuple(ids for part in parts for ids in part.ids),
            truncated=tuple(cut for part in parts for cut in part.truncated),
            spans=spans,
            pictures=tuple(picture for part in parts for picture in part.pictures),
            notices=tuple(dict.fromkeys(notice for part in parts for notice in part.notices)),
        )

    def part(self, start: int, stop: int | None = None) -> Samples:
        """Return the samples from ``start`` up to ``stop``, which is left out."""
        return Samples(
            ids=self.ids[start:stop],
            truncated=self.truncated[start:stop],
            spans=self.spans[start:stop],
            pictures=self.pictures[start:stop],
            notices=self.notices,
        )

    def tokens(self, count: int | None = None) -> int:
        """Return the real tokens of the first ``count`` samples."""
        return sum(len(ids) for ids in self.ids[:count])

    def labels(self, count: int | None = None) -> list[int]:
        """Return the label tokens ``T_i`` of each of the first ``count`` samples."""
        if self.spans:
            return [sum(end - start for start, end in spans) for spans in self.spans[:count]]
        return [max(0, len(ids) - 1) for ids in self.ids[:count]]

    def predictions(self, count: int | None = None) -> int:
        """Return the positions whose distribution counts, of the first ``count`` samples.

        Of text that is every real token; else every position that predicts a label.
        """
        return sum(self.labels(count)) if self.spans else self.tokens(count)

    def patches(self, count: int | None = None) -> int:
        """Return the patches of the pictures of the first ``count`` samples."""
        return sum(picture.patches for picture in self.pictures[:count])

    def alike(self, indices: Iterable[int]) -> list[list[int]]:
        """Return samples apart from those that they cannot share a batch with, in order."""
        if not self.pictures:
            return [list(indices)]
        kinds: dict[Any, list[int]] = defaultdict(list)
        for index in indices:
            kinds[self.pictures[index].kind].append(index)
        return list(kinds.values())


@dataclass(frozen=True)
class Batch:
    """Samples that go through the model together.

    Attributes:
        samples: Indices of the samples, in file order.
        input_ids: Token ids, ``(samples, longest)``, int64, padded on the right with 0.
        attention_mask: 1 at real tokens, 0 at padding, same shape, int64.
        labels: Where a token is a label, same shape, bool; none for text, where every real token
            is one but the first.
        pictures: What the model is given of pictures, one after the other, by its names.
        tokens: What else it is given of each token, by its names, shape of ``input_ids``.
        patches: Patches of each sample's picture; empty for text.
        shown: Tokens that stand for each sample's picture; empty for text.
    """

    samples: tuple[int, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor | None = None
    pictures: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tokens: Mapping[str, torch.Tensor] = field(default_factory=dict)
    patches: tuple[int, ...] = ()
    shown: tuple[int, ...] = ()

    @property
    def first(self) -> int:
        """Return the smallest index of its samples."""
        return min(self.samples)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        return self._with(lambda tensor: tensor.to(device))

    def repeat(self, copies: int) -> Batch:
        """Return the batch with its samples again and again; their indices stay as they are."""
        if copies == 1:
            return self
        return self._with(lambda tensor: tensor.repeat(copies, *[1] * (tensor.ndim - 1)))

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(
            self.samples,
            change(self.input_ids),
            change(self.attention_mask),
            None if self.labels is None else change(self.labels),
            {name: change(tensor) for name, tensor in self.pictures.items()},
            {name: change(tensor) for name, tensor in self.tokens.items()},
            self.patches,
            self.shown,
        )

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return what the model is called with, but for a mask."""
        return {"input_ids": self.input_ids, **self.pictures, **self.tokens}

    def real_tokens(self) -> torch.Tensor | None:
        """Return the indices of its real tokens, padding counted; none if nothing is padded."""
        if bool(self.attention_mask.all()):
            return None
        return self.attention_mask.flatten().nonzero()[:, 0]

    def label_mask(self) -> torch.Tensor:
        """Return where the next token is a label, ``(samples, longest - 1)``, bool."""
        return self.attention_mask[:, 1:].bool() if self.labels is None else self.labels[:, 1:]

    def predicts(self) -> torch.Tensor:
        """Return the positions whose distribution counts, ``(samples, longest)``, bool."""
        if self.labels is None:
            return self.attention_mask.bool()
        return self.labels.roll(-1, dims=1)  # the first token is never a label

    def lengths(self, unit: Unit) -> list[int]:
        """Return how many rows each sample has in a tensor of ``unit``."""
        if isinstance(unit, Fraction):
            return [int(patches * unit) for patches in self.patches]
        if unit == "shown":
            return list(self.shown)
        where = {
            "tokens": self.attention_mask,
            "labels": self.label_mask(),
            "predictions": self.predicts(),
        }[unit]
        lengths: list[int] = where.sum(dim=1).tolist()
        return lengths


def tokenize(captions: Sequence[str], tokenizer: Any, *, longest: int) -> Samples:
    """Return the token ids of ``captions``, cut at ``longest`` tokens.

    Raises:
        UserError: A caption gives no token at all.
    """
    encoded = token_ids(tokenizer, captions)
    for index, ids in enumerate(encoded):
        if not ids:
            raise UserError(
                "the tokenizer gives it no token",
                where=f"caption {index + 1}: {captions[index][:60]!r}",
                remedy="Remove the caption.",
            )
    return Samples(
        ids=tuple(tuple(ids[:longest]) for ids in encoded),
        truncated=tuple(len(ids) > longest for ids in encoded),
    )


def token_ids(tokenizer: Any, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """Return the token ids of texts, none of them cut.

    Args:
        tokenizer: The checkpoint's tokenizer.
        texts: The texts.
        special: Whether it adds its special tokens.

    Raises:
        UserError: The tokenizer fails.
    """
    with refusals(
        "its tokenizer fails",
        where="the tokenizer of model.path",
        remedy="Get the tokenizer's files of the checkpoint again.",
    ):
        encoded = tokenizer(
            list(texts), padding=False, truncation=False, add_special_tokens=special
        )
        ids: list[list[int]] = encoded["input_ids"]
    return ids


def refuse_unknown_tokens(samples: Samples, rows: int) -> None:
    """Refuse samples with a token that the embedding has no row for; a GPU would only assert.

    Args:
        samples: The samples.
        rows: Rows of the embedding.

    Raises:
        UserError: There is one.
    """
    for index, ids in enumerate(samples.ids):
        strange = next((one for one in ids if not 0 <= one < rows), None)
        if strange is not None:
            raise UserError(
                f"token {strange} of sample {index + 1} is beyond the embedding, which has {rows} "
                "rows",
                where="the tokenizer of model.path",
                remedy="Get the tokenizer and the weights of one and the same checkpoint.",
            )


def nominal_labels(labels: Sequence[int], batch_size: int) -> list[int]:
    """Return ``T_b(i)`` of each scored sample: the label tokens of its nominal batch.

    Nominal batches are consecutive ``batch_size`` samples, in file order, of those scored.

    Args:
        labels: Label tokens of each of them.
        batch_size: Samples of a nominal batch.
    """
    starts = range(0, len(labels), batch_size)
    totals = [sum(labels[start : start + batch_size]) for start in starts]
    return [totals[index // batch_size] for index in range(len(labels))]


def equal_length_batches(
    samples: Samples, *, boundaries: Iterable[int], batch_size: int
) -> list[Batch]:
    """Return batches of samples of one length each: nothing is ever padded.

    A batch never crosses a boundary, so the batches of the first ``n`` samples come first for
    every boundary ``n``.

    Args:
        samples: The samples.
        boundaries: Sample counts that no batch crosses.
        batch_size: Samples of a batch at most.
    """
    batches = []
    for start, stop in segments(len(samples), boundaries):
        by_length = defaultdict(list)
        for index in range(start, stop):
            by_length[len(samples.ids[index])].append(index)
        for _, of_length in sorted(by_length.items()):
            for indices in samples.alike(of_length):
                for first in range(0, len(indices), batch_size):
                    batches.append(make_batch(samples, indices[first : first + batch_size]))
    return batches


def padded_batches(
    samples: Samples,
    upto: int,
    *,
    boundaries: Iterable[int],
    together: int = BATCH_TOKENS,
    max_tokens: int | None = None,
    pads: bool = True,
) -> list[Batch]:
    """Return batches of the first ``upto`` samples, of similar length, padded on the right.

    Which samples share a batch, and so how far each is padded, depends on the samples, the
    boundaries and ``together`` alone; a smaller ``max_tokens`` splits a batch into several of the
    same width.

    Args:
        samples: The samples.
        upto: Samples to take, from the first.
        boundaries: Sample counts that no batch crosses.
        together: Tokens that a batch is filled up to, padding included; see :func:`batch_tokens`.
        max_tokens: Tokens of a batch at most, padding included; one sample always goes through.
        pads: Whether samples of different lengths may share a batch.
    """
    batches = []
    for start, stop in segments(upto, boundaries):
        for kind in samples.alike(range(start, stop)):
            order = sorted(kind, key=lambda index: (len(samples.ids[index]), index))
            for alike in _fill(samples, order, together, pads=pads):
                longest = len(samples.ids[alike[-1]])
                rows = len(alike)
                if max_tokens is not None:
                    rows = min(rows, max(1, max_tokens // longest))
                for first in range(0, len(alike), rows):
                    batches.append(make_batch(samples, alike[first : first + rows], longest))
    return batches


def batch_tokens(device: torch.device) -> int:
    """Return how many tokens a batch is filled up to.

    A GPU wants few large batches, since launching their kernels is what costs; a CPU wants smaller
    ones, of samples that are closer in length: it is slow enough to pay for every padded token.
    """
    return BATCH_TOKENS if device.type == "cuda" else BATCH_TOKENS // 16


def _fill(samples: Samples, order: Sequence[int], together: int, *, pads: bool) -> list[list[int]]:
    """Cut samples in ascending length so that a padded batch stays near ``together`` tokens."""
    batches: list[list[int]] = [[]]
    for index in order:
        length, batch = len(samples.ids[index]), batches[-1]
        full = (len(batch) + 1) * length > together
        if batch and (full or not (pads or len(samples.ids[batch[0]]) == length)):
            batches.append([])
        batches[-1].append(index)
    return [batch for batch in batches if batch]


def padding_share(batches: Sequence[Batch]) -> float:
    """Return the padded tokens of ``batches`` over all their tokens, 0 to 1."""
    tokens = sum(batch.attention_mask.numel() for batch in batches)
    return 1 - sum(int(batch.attention_mask.sum()) for batch in batches) / tokens


def segments(count: int, boundaries: Iterable[int]) -> list[tuple[int, int]]:
    """Return the half-open ranges that ``boundaries`` cut ``range(count)`` into."""
    cuts = sorted({0, count, *(cut for cut in boundaries if 0 < cut < count)})
    return list(itertools.pairwise(cuts))


def make_batch(samples: Samples, indices: Sequence[int], width: int | None = None) -> Batch:
    """Return one batch, padded on the right to ``width``, its longest sample if not given."""
    longest = width or max(len(samples.ids[index]) for index in indices)
    ids = torch.zeros(len(indices), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, index in enumerate(indices):
        length = len(samples.ids[index])
        ids[row, :length] = torch.tensor(samples.ids[index])
        mask[row, :length] = 1
    if not samples.spans:
        return Batch(tuple(indices), ids, mask)
    labels = torch.zeros_like(ids, dtype=torch.bool)
    for row, index in enumerate(indices):
        for start, end in samples.spans[index]:
            labels[row, start:end] = True
    if not samples.pictures:
        return Batch(tuple(indices), ids, mask, labels)
    pictures = [samples.pictures[index] for index in indices]
    return Batch(
        tuple(indices),
        ids,
        mask,
        labels,
        pictures={
            name: torch.cat([picture.tensors[name] for picture in pictures])
            for name in pictures[0].tensors
        },
        tokens={
            name: torch.stack(
                [F.pad(picture.tokens[name], (0, longest))[:longest] for picture in pictures]
            )
            for name in pictures[0].tokens
        },
        patches=tuple(picture.patches for picture in pictures),
        shown=tuple(picture.shown for picture in pictures),
    )
