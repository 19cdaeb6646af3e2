"""Samples of text: captions, texts, conversations, by the checkpoint's tokenizer. Needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qsens.config import DatasetConfig
from qsens.data.records import Record
from qsens.data.rendering import conversation_samples
from qsens.data.samples import Samples, tokenize


def text_samples(records: Sequence[Record], tokenizer: Any, dataset: DatasetConfig) -> Samples:
    """Return records as a language model reads them, cut where the data set says.

    Args:
        records: Records that fit, all of one kind.
        tokenizer: The checkpoint's tokenizer, with its chat template.
        dataset: Their data set.

    Raises:
        UserError: The tokenizer cannot make samples of them.
    """
    longest = dataset.calib_seq_len
    conversations = [one.conversation for one in records if one.conversation is not None]
    if conversations:
        return conversation_samples(conversations, tokenizer, loss=dataset.loss, longest=longest)
    return tokenize([record.caption for record in records], tokenizer, longest=longest)


def lengths(records: Sequence[Record], tokenizer: Any, dataset: DatasetConfig) -> list[int]:
    """Return how many tokens each record is, as it is read; one that does not fit is none."""
    left = [not (record.fault or record.needs_pictures) for record in records]
    fitting = [record for record, fits in zip(records, left, strict=True) if fits]
    counts = iter(len(ids) for ids in text_samples(fitting, tokenizer, dataset).ids)
    return [next(counts) if fits else 0 for fits in left]
