"""Tokens, nominal batches, and batches that never cross a boundary."""

from __future__ import annotations

import pytest

from qsens.data.samples import (
    Samples,
    equal_length_batches,
    make_batch,
    nominal_labels,
    segments,
    tokenize,
)
from qsens.errors import UserError


class Letters:
    """A tokenizer without a pad token: a letter a token."""

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def samples_of(*lengths: int) -> Samples:
    ids = tuple(tuple(range(1, length + 1)) for length in lengths)
    return Samples(ids=ids, truncated=(False,) * len(lengths))


def test_tokens_are_cut_and_said() -> None:
    samples = tokenize(["abc", "abcdef"], Letters(), longest=4)
    assert samples.ids == ((97, 98, 99), (97, 98, 99, 100))
    assert samples.truncated == (False, True)
    assert samples.tokens() == 7
    assert samples.tokens(1) == 3
    assert samples.labels() == [2, 3]


def test_a_caption_without_tokens_is_named() -> None:
    with pytest.raises(UserError, match="caption 2"):
        tokenize(["a", ""], Letters(), longest=4)


def test_one_token_has_no_label() -> None:
    assert samples_of(1, 2).labels() == [0, 1]


def test_nominal_batches_are_consecutive() -> None:
    # Labels 1 2 3 | 4 5 6 | 7: batches of three over seven samples.
    samples = samples_of(2, 3, 4, 5, 6, 7, 8)
    assert nominal_labels(samples.labels(7), 3) == [6, 6, 6, 15, 15, 15, 7]
    # With five scored, the second batch ends there.
    assert nominal_labels(samples.labels(5), 3) == [6, 6, 6, 9, 9]


def test_segments() -> None:
    assert segments(20, [16, 128]) == [(0, 16), (16, 20)]
    assert segments(16, [16, 128]) == [(0, 16)]
    assert segments(200, [128, 16, 100]) == [(0, 16), (16, 100), (100, 128), (128, 200)]


def test_equal_length_batches_hold_no_padding_and_cross_no_boundary() -> None:
    samples = samples_of(3, 5, 3, 3, 5, 3, 4, 3)
    batches = equal_length_batches(samples, boundaries=[4], batch_size=2)
    assert [batch.samples for batch in batches] == [(0, 2), (3,), (1,), (5, 7), (6,), (4,)]
    assert all(bool(batch.attention_mask.all()) for batch in batches)


def test_padding_is_masked_by_length_not_by_token() -> None:
    samples = Samples(ids=((7, 0, 0), (7,)), truncated=(False, False))
    batch = make_batch(samples, [0, 1])
    assert batch.input_ids.tolist() == [[7, 0, 0], [7, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.label_mask().tolist() == [[True, True], [False, False]]
