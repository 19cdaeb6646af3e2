"""Checkpoints that see, whose weights are named as in older files or as modules are today."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qsens.checkpoint.quantized import shapes
from qsens.errors import UserError
from qsens.pipeline.cell import score
from tests.engine import pictures
from tests.pipeline.seeing import Place, rows, scores

PAIRS = "wint8_aint8,wint4_afp16"
CELLS = [f"{pair}{coverage}-small" for pair in PAIRS.split(",") for coverage in ("-all_layers", "")]


def today(name: str) -> str:
    """Return a weight's name as that of its module: ``model.visual``, ``model.language_model``."""
    inner = name.removeprefix("model.")
    if inner.startswith(("visual.", "language_model.", "lm_head.")):
        return name if inner.startswith("lm_head.") else f"model.{inner}"
    return f"model.language_model.{inner}"


def before(name: str) -> str:
    """Return it with ``visual`` at the top, as Qwen2.5-VL's files have it."""
    return today(name).replace("model.visual.", "visual.")


def renamed(checkpoint: Path, target: Path, rule: Callable[[str], str]) -> Path:
    """Copy a checkpoint with other names for its weights."""
    shutil.copytree(checkpoint, target)
    weights = load_file(target / "model.safetensors")
    named = {rule(name): tensor for name, tensor in weights.items()}
    assert len(named) == len(weights)
    save_file(named, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("family", pictures.FAMILIES)
def test_either_name_of_the_tower_loads_plans_and_scores_alike(family: str, tmp_path: Path) -> None:
    place = Place(tmp_path, family)
    tower = pictures.TOWER[family]
    covered = 3 * 7 + 1 + tower  # weights, of three decoder layers, the head and the tower
    if family == "Qwen2.5-VL":
        covered += 3  # gate and up share a group
    found = {}
    for label, rule in (("today", today), ("before", before)):
        checkpoint = renamed(place.checkpoint, tmp_path / label, rule)
        prefix = "model.visual." if label == "today" else "visual."
        assert sum(name.startswith(prefix) for name in shapes(checkpoint)) > tower
        given = (f"model.path={checkpoint}", "dataset.size=small")
        blocks = (*given, "quant_pair=wint4_afp16", "quant_granularity=w_group64")
        # The embedding is none of them, the patch embedding is one.
        (notice,) = place.plan(*blocks).notices
        assert f"of {covered} weights do not divide" in notice
        (notice,) = place.plan(*blocks, "coverage=lm_only").notices
        assert f"of {3 * 7 + 1} weights do not divide" in notice
        found[label] = place.run(place.plan(*given, f"quant_pair={PAIRS}"))
    for cell in CELLS:
        old, new = found["before"][cell], found["today"][cell]
        assert len(rows(new, True)) == tower
        assert {row.status for row in rows(new, True).values()} == {
            "scored" if "all_layers" in cell else "disabled"
        }
        for part in (True, False):
            assert scores(old, part) == scores(new, part)
            assert all(name.startswith("model.visual.") == part for name in rows(old, part))


def test_names_that_fit_no_module_are_refused_by_name(tmp_path: Path) -> None:
    place = Place(tmp_path)
    unmatched = renamed(place.checkpoint, tmp_path / "astray", lambda name: f"tower.{name}")
    plan = place.plan(f"model.path={unmatched}", "dataset.size=small")
    with pytest.raises(UserError, match=r"weights are missing, the first is lm_head\.weight"):
        score(plan, "wint8_aint8-all_layers-small")
