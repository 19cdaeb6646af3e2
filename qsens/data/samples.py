"""Samples as token ids, nominal batches, and the batches that really run. Needs torch.

A label is a real token predicted from a real token, so a sample of ``L`` tokens of text has
``L - 1`` labels; of a sample with a picture, only the tokens of its caption are labels. Which
tokens are real is known from the sample's length, never from a token's id: a tokenizer without a
pad token, or whose pad token is its end token, works like any other.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from qsens.checkpoint.refusals import refusals
from qsens.errors import UserError

# Enough for matrix products to be efficient, few enough for their results to stay small.
BATCH_TOKENS = 8192

Unit = Literal["tokens", "labels", "predictions", "patches", "visual"]
"""What the rows of a tensor are, sample after sample: real tokens; positions whose next token is a
label; positions whose distribution counts; patches of pictures; patches as the language model
sees them."""


@dataclass(frozen=True)
class Picture:
    """A picture as the vision tower reads it.

    Attributes:
        patches: As the checkpoint's processor makes them, ``(frames * rows * columns, channels)``.
        grid: Frames, rows and columns of patches.
    """

    patches: torch.Tensor
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class Samples:
    """Tokenized samples, in file order.

    Attributes:
        ids: Token ids of each sample, at most ``calib_seq_len`` long, without padding.
        truncated: Whether each sample was cut.
        spans: Where the labels of each sample begin and end; empty for text, which has a label
            wherever a token stands before it.
        pictures: The picture of each sample; empty for text.
        image_token: Id of the token that stands for a patch of a picture.
    """

    ids: tuple[tuple[int, ...], ...]
    truncated: tuple[bool, ...]
    spans: tuple[tuple[int, int], ...] = ()
    pictures: tuple[Picture, ...] = ()
    image_token: int | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.ids)

    def tokens(self, count: int | None = None) -> int:
        """Return the real tokens of the first ``count`` samples."""
        return sum(len(ids) for ids in self.ids[:count])

    def labels(self, count: int | None = None) -> list[int]:
        """Return the label tokens ``T_i`` of each of the first ``count`` samples."""
        if self.spans:
            return [end - start for start, end in self.spans[:count]]
        return [max(0, len(ids) - 1) for ids in self.ids[:count]]

    def predictions(self, count: int | None = None) -> int:
        """Return the positions whose distribution counts, of the first ``count`` samples.

        Of text that is every real token; with a picture, every position that predicts a label.
        """
        return sum(self.labels(count)) if self.spans else self.tokens(count)

    def patches(self, count: int | None = None) -> int:
        """Return the patches of the pictures of the first ``count`` samples."""
        return sum(len(picture.patches) for picture in self.pictures[:count])


@dataclass(frozen=True)
class Batch:
    """Samples that go through the model together.

    Attributes:
        samples: Indices of the samples, in file order.
        input_ids: Token ids, ``(samples, longest)``, int64, padded on the right with 0.
        attention_mask: 1 at real tokens, 0 at padding, same shape, int64.
        labels: Where a token is a label, same shape, bool; none for text, where every real token
            is one but the first.
        patches: Patches of all pictures, one picture after the other, ``(patches, channels)``.
        grids: Frames, rows and columns of each picture, ``(samples, 3)``, int64.
        visual: 1 where a token stands for a patch, shape of ``input_ids``, int64.
    """

    samples: tuple[int, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor | None = None
    patches: torch.Tensor | None = None
    grids: torch.Tensor | None = None
    visual: torch.Tensor | None = None

    @property
    def first(self) -> int:
        """Return the smallest index of its samples."""
        return min(self.samples)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        moved = (
            None if tensor is None else tensor.to(device)
            for tensor in (self.labels, self.patches, self.grids, self.visual)
        )
        return Batch(
            self.samples, self.input_ids.to(device), self.attention_mask.to(device), *moved
        )

    def repeat(self, copies: int) -> Batch:
        """Return the batch with its samples again and again; their indices stay as they are."""
        if copies == 1:
            return self
        parts = (
            None if tensor is None else tensor.repeat(copies, 1)
            for tensor in (
                self.input_ids,
                self.attention_mask,
                self.labels,
                self.patches,
                self.grids,
                self.visual,
            )
        )
        return Batch(self.samples, *parts)  # type: ignore[arg-type]

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return what the model is called with, but for a mask."""
        given = {"input_ids": self.input_ids}
        if self.patches is not None and self.grids is not None and self.visual is not None:
            given["pixel_values"] = self.patches
            given["image_grid_thw"] = self.grids
            given["mm_token_type_ids"] = self.visual
        return given

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
        if unit == "patches":
            if self.grids is None:
                return [0] * len(self.samples)
            counts: list[int] = self.grids.prod(dim=1).tolist()
            return counts
        where = {
            "tokens": self.attention_mask,
            "labels": self.label_mask(),
            "predictions": self.predicts(),
            "visual": torch.zeros_like(self.input_ids) if self.visual is None else self.visual,
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


def nominal_labels(samples: Samples, *, scored: int, batch_size: int) -> list[int]:
    """Return ``T_b(i)`` of each scored sample: the label tokens of its nominal batch.

    Nominal batches are consecutive ``batch_size`` samples, in file order, of the first ``scored``.
    """
    labels = samples.labels(scored)
    totals = [sum(labels[start : start + batch_size]) for start in range(0, scored, batch_size)]
    return [totals[index // batch_size] for index in range(scored)]


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
        for _, indices in sorted(by_length.items()):
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
        order = sorted(range(start, stop), key=lambda index: (len(samples.ids[index]), index))
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
    if not samples.pictures:
        return Batch(tuple(indices), ids, mask)
    labels = torch.zeros_like(ids, dtype=torch.bool)
    for row, index in enumerate(indices):
        start, end = samples.spans[index]
        labels[row, start:end] = True
    pictures = [samples.pictures[index] for index in indices]
    return Batch(
        tuple(indices),
        ids,
        mask,
        labels=labels,
        patches=torch.cat([picture.patches for picture in pictures]),
        grids=torch.tensor([picture.grid for picture in pictures]),
        visual=mask.where(ids == torch.tensor(samples.image_token), 0),
    )
