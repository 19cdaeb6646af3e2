from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qsens.analysis.samples import read_samples
from qsens.errors import UserError


def write(path: Path, scores: list[list[float]], labels: list[int], groups: str) -> Path:
    tensors = {"per_sample": np.array(scores), "label_tokens": np.array(labels, dtype=np.int64)}
    save_file(tensors, path, metadata={"groups": groups})
    return path


def test_scores_are_read_by_name_and_per_token(tmp_path: Path) -> None:
    path = write(tmp_path / "s", [[1.0, 5.0], [2.0, 4.0]], [2, 4], "a\nb")
    found = read_samples(path, "gradient")
    assert found is not None
    assert (found.groups, found.count) == (("a", "b"), 2)
    assert found.per_token().tolist() == [1.0, 1.0]
    # Nats are over real tokens, one more than labels in each sample: 6 / 8.
    nats = read_samples(path, "fisher")
    assert nats is not None
    assert nats.per_token().tolist() == [0.75, 0.75]
    assert found.take(["b"]).scores.tolist() == [[2.0, 4.0]]


def test_groups_without_finite_scores_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "s", [[1.0, np.nan], [2.0, 4.0]], [2, 4], "a\nb")
    found = read_samples(path, "gradient")
    assert found is not None
    assert found.groups == ("b",)


def test_a_file_without_scores_of_samples_is_none(tmp_path: Path) -> None:
    save_file({"amax.input.a": np.ones(1)}, tmp_path / "s")
    assert read_samples(tmp_path / "s", "gradient") is None


def test_broken_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(b"\x00\x01")
    for path in (tmp_path / "cut", tmp_path / "none"):
        with pytest.raises(UserError, match="cannot be read"):
            read_samples(path, "gradient")
    path = write(tmp_path / "s", [[1.0, 2.0]], [2, 4], "a\nb")
    with pytest.raises(UserError, match="2 groups"):
        read_samples(path, "gradient")
