"""Data sets of several files, and sizes that count tokens."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from qsens.engine.scores import silent
from qsens.errors import UserError
from qsens.grid import Plan
from qsens.pipeline.loading import load_whole
from qsens.pipeline.sweep import run_sweep
from qsens.results import read_manifest
from qsens.store import Store
from tests.checkpoint.hostile import plan_of
from tests.checkpoint.tiny_families import WORDS, configuration, save

# Word by word: a sample has as many tokens as words.
TEXTS = [" ".join(WORDS[: 2 + at % 7]) for at in range(30)]
LENGTHS = [2 + at % 7 for at in range(30)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(configuration("Llama", tied=True), tmp_path_factory.mktemp("llama") / "llama")


def jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def planned(checkpoint: Path, root: Path, *overrides: str) -> Plan:
    return plan_of(
        checkpoint,
        root / "results",
        f"dataset.directory={root}",
        "model.dtype=float32",
        "dataset.size=small",
        *overrides,
    )


def scores(plan: Plan) -> dict[str, float | None]:
    _, errors = run_sweep(plan)
    assert errors == []
    manifest = read_manifest(Store(plan).manifest(plan.cells[0]))
    return {name: group.sensitivity for name, group in manifest.layer_sensitivity.items()}


def needed(tokens: int) -> int:
    totals = list(itertools.accumulate(LENGTHS))
    return next(at for at, total in enumerate(totals, 1) if total >= tokens)


def test_sizes_in_tokens_are_heads_of_one_another(checkpoint: Path, tmp_path: Path) -> None:
    jsonl(tmp_path / "texts.jsonl", TEXTS)
    plan = planned(
        checkpoint,
        tmp_path,
        "dataset.files={small: texts.jsonl, medium: texts.jsonl, large: texts.jsonl}",
        "dataset.sizes={small: 3, medium: 20 tokens, large: 64 tokens}",
        "dataset.size=small,medium,large",
    )
    (sets,) = zip(*(cell.sets for cell in plan.cells), strict=True)
    assert [one.used for one in sets] == [3, needed(20), needed(64)]
    assert [one.asked for one in sets] == [3, needed(20), needed(64)]
    for one in sets:
        assert one.boundaries == (3, needed(20), needed(64))
    said = f"size 'large' is {needed(64)} samples of texts.jsonl, "
    assert f"{said}{sum(LENGTHS[: needed(64)])} tokens" in plan.notices
    # What is loaded is what was counted.
    samples = load_whole(plan, plan.cell("wint8_afp16-large"), silent).samples
    assert samples.tokens() == sum(LENGTHS[: needed(64)])
    # In samples, they have the same scores.
    in_samples = planned(
        checkpoint,
        tmp_path,
        "dataset.files={small: texts.jsonl}",
        f"dataset.sizes={{small: {needed(64)}}}",
    )
    large = plan.model_copy(update={"grid": [cell for cell in plan.grid if cell.size == "large"]})
    assert scores(large) == pytest.approx(scores(in_samples), rel=1e-4)


def test_longest_samples_count_as_they_are_cut(checkpoint: Path, tmp_path: Path) -> None:
    jsonl(tmp_path / "texts.jsonl", TEXTS)
    given = ("dataset.files={small: texts.jsonl}", "dataset.sizes={small: 20 tokens}")
    cut = planned(checkpoint, tmp_path, *given, "dataset.calib_seq_len=2")
    assert cut.cells[0].used == 10


def test_fewer_tokens_than_asked_for_are_partial(checkpoint: Path, tmp_path: Path) -> None:
    jsonl(tmp_path / "texts.jsonl", TEXTS)
    plan = planned(
        checkpoint,
        tmp_path,
        "dataset.files={small: texts.jsonl}",
        "dataset.sizes={small: 1M tokens}",
    )
    assert any("fewer than the 1048576 asked for" in notice for notice in plan.notices)
    run_sweep(plan)
    (reason,) = read_manifest(Store(plan).manifest(plan.cells[0])).partial
    assert f"{(1 << 20) - sum(LENGTHS)} tokens fewer than it asks for" in reason


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("64k", "neither a number of samples"),
        ("0 tokens", "neither a number of samples"),
        ("-5", "neither a number of samples"),
        ("1e3 tokens", "neither a number of samples"),
        ("0", "neither a number of samples"),
        ("1000001", "neither a number of samples"),
    ],
)
def test_what_is_no_size(checkpoint: Path, tmp_path: Path, spec: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        planned(checkpoint, tmp_path, f"dataset.sizes.small={spec}")
    assert caught.value.where == "dataset.sizes.small (the command line)"


def test_sizes_in_tokens_grow(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sizes out of order"):
        planned(checkpoint, tmp_path, "dataset.sizes={small: 2k tokens, medium: 2000 tokens}")


def test_pictures_are_no_tokens(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="known of text alone"):
        planned(
            checkpoint,
            tmp_path,
            "dataset.sizes={small: 2k tokens}",
            "dataset.files={small: a.jsonl}",
            "dataset.modality=image_text",
        )


def test_files_of_a_pattern_follow_one_another(checkpoint: Path, tmp_path: Path) -> None:
    for at, texts in enumerate((TEXTS[:3], TEXTS[3:4], TEXTS[4:9])):
        jsonl(tmp_path / "parts" / f"{at}.jsonl", texts)
    jsonl(tmp_path / "whole.jsonl", TEXTS[:9])
    sizes = "dataset.sizes={small: 8}"
    parts = planned(checkpoint, tmp_path, sizes, "dataset.files={small: parts/*.jsonl}")
    whole = planned(checkpoint, tmp_path, sizes, "dataset.files={small: whole.jsonl}")
    (one,) = parts.cells[0].sets
    assert [path.name for path in one.samples.paths] == ["0.jsonl", "1.jsonl", "2.jsonl"]
    assert scores(parts) == scores(whole)
    manifest: Any = read_manifest(Store(parts).manifest(parts.cells[0]))
    assert manifest.dataset.path.split(", ") == [str(path) for path in one.samples.paths]
    # Another file of the pattern is another data set.
    jsonl(tmp_path / "parts" / "3.jsonl", TEXTS[:1])
    assert (
        planned(checkpoint, tmp_path, sizes, "dataset.files={small: parts/*.jsonl}").cells[0].digest
        != parts.cells[0].digest
    )


def test_a_pattern_of_nothing(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file of the pattern") as caught:
        planned(checkpoint, tmp_path, "dataset.files={small: parts/*.jsonl}")
    assert str(tmp_path) in caught.value.where


def test_a_name_that_looks_like_a_pattern_is_a_name(checkpoint: Path, tmp_path: Path) -> None:
    jsonl(tmp_path / "a[1].jsonl", TEXTS)
    plan = planned(checkpoint, tmp_path, "dataset.files={small: 'a[1].jsonl'}")
    assert plan.cells[0].sets[0].samples.path == tmp_path / "a[1].jsonl"


def test_files_of_one_data_set_hold_one_kind(checkpoint: Path, tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "a", "completion": "red"}) + "\n")
    with pytest.raises(UserError, match=r"of kind completion, and a\.jsonl of kind text"):
        planned(checkpoint, tmp_path, "dataset.files={small: '[ab].jsonl'}")
