from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from qsens.analysis.ranking import by_depth, by_kind, mean_shares, normalise_name, rank
from qsens.results import read_manifest
from qsens.schema.manifest import Manifest

REFERENCE = Path(__file__).parents[3] / "shared" / "reference-manifests"


def manifest(rows: dict[str, dict[str, Any]]) -> Manifest:
    return Manifest.model_validate(
        {
            "schema_version": 1,
            "scheme": {
                "name": "s",
                "auto_quantize_bits": 8.0,
                "auto_quantize_method": "gradient",
                "auto_quantize_score_size": 1,
                "coverage_mode": "lm_only",
                "coverage_fraction": 1.0,
                "quant_formats": ["INT8"],
            },
            "model": {"id": "m"},
            "num_quantized_layers": 0,
            "layers": {},
            "autoquant_state": {},
            "sensitivity_ranking": [],
            "layer_sensitivity": {
                f"{name}.quant_recipe": {
                    "formats": ["INT8"],
                    "scores": [None],
                    "costs": [1.0],
                    "importance": None,
                    "rank": 1,
                    "status": "scored",
                    **row,
                }
                for name, row in rows.items()
            },
        }
    )


def test_rows_are_ranked_and_shared_out() -> None:
    ranking = rank(
        manifest(
            {
                "zero": {"sensitivity": 0.0},
                "b": {"sensitivity": 0.5},
                "off": {"status": "disabled"},
                "a": {"sensitivity": 0.5},
                "broken": {"status": "failed", "reason": "does not divide"},
                "top": {"sensitivity": 3.0, "members": ["top", "other"], "size_cost": 7.0},
                "also_off": {"status": "disabled"},
            }
        )
    )
    assert [(row.position, row.layer, row.status, row.share) for row in ranking.rows] == [
        (1, "top", "scored", 0.75),
        (2, "a", "scored", 0.125),
        (3, "b", "scored", 0.125),
        (4, "zero", "scored", 0.0),
        (None, "also_off", "disabled", None),
        (None, "off", "disabled", None),
        (None, "broken", "failed", None),
    ]
    assert ranking.rows[0].members == ("top", "other")
    assert ranking.rows[0].size_cost == 7.0
    assert ranking.rows[1].members == ("a",)
    assert ranking.rows[-1].reason == "does not divide"
    assert ranking.totals.sensitivity == 4.0
    assert (ranking.totals.groups, ranking.totals.scored) == (7, 4)
    assert list(ranking.totals.statuses.items()) == [("disabled", 2), ("failed", 1), ("scored", 4)]


def test_the_total_is_summed_exactly() -> None:
    rows = {f"g{i}": {"sensitivity": 0.1} for i in range(10)}
    assert sum([0.1] * 10) != 1.0
    assert rank(manifest(rows)).totals.sensitivity == 1.0


@pytest.mark.parametrize("score", [math.nan, math.inf, None])
def test_what_is_not_a_finite_score_is_not_ranked(score: float | None) -> None:
    ranking = rank(manifest({"good": {"sensitivity": 2.0}, "bad": {"sensitivity": score}}))
    assert [(row.layer, row.status, row.sensitivity) for row in ranking.rows] == [
        ("good", "scored", 2.0),
        ("bad", "non_finite", None),
    ]
    assert ranking.totals.sensitivity == 2.0


def test_shares_of_a_total_of_nothing_are_zero() -> None:
    ranking = rank(manifest({"b": {"sensitivity": 0.0}, "a": {"sensitivity": 0.0}}))
    assert [(row.layer, row.position, row.share) for row in ranking.rows] == [
        ("a", 1, 0.0),
        ("b", 2, 0.0),
    ]


def test_the_total_per_token_needs_every_scored_group() -> None:
    both = {"sensitivity": 1.0, "sensitivity_per_token": 0.25}
    assert rank(manifest({"a": both, "b": both})).totals.sensitivity_per_token == 0.5
    one = rank(manifest({"a": both, "b": {"sensitivity": 1.0}}))
    assert one.totals.sensitivity_per_token is None


def test_mean_shares_are_over_the_cells_that_score_a_group() -> None:
    first = rank(manifest({"model.a": {"sensitivity": 3.0}, "model.b": {"sensitivity": 1.0}}))
    second = rank(
        manifest({"a": {"sensitivity": 1.0}, "b": {"status": "failed"}, "c": {"sensitivity": 1.0}})
    )
    # a: (3/4 + 1/2) / 2; c: 1/2 in one cell; b: 1/4 in one cell.
    means = mean_shares([first.rows, second.rows])
    assert [(mean.layer, mean.share, mean.highest, mean.cells) for mean in means] == [
        ("model.a", 0.625, 0.75, 2),
        ("c", 0.5, 0.5, 1),
        ("model.b", 0.25, 0.25, 1),
    ]


def test_names_compare_without_a_leading_model() -> None:
    assert normalise_name("model.layers.0") == "layers.0"
    assert normalise_name("layers.0.model.x") == "layers.0.model.x"


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the published manifests are not here")
def test_the_published_manifests_rank_as_their_raw_scores() -> None:
    paths = sorted(REFERENCE.glob("*.json"))
    assert len(paths) == 6
    for path in paths:
        raw = json.loads(path.read_text(encoding="utf-8"))["layer_sensitivity"]
        by_score = sorted(raw, key=lambda key: -raw[key]["scores"][0])[:20]
        ranking = rank(read_manifest(path))
        assert [f"{row.layer}.quant_recipe" for row in ranking.rows[:20]] == by_score
        assert ranking.totals.groups == len(raw)
        assert math.isclose(
            ranking.totals.sensitivity, sum(row["scores"][0] for row in raw.values())
        )


def test_parts_add_up_by_kind_and_depth() -> None:
    rows = rank(
        manifest(
            {
                "layers.0.mlp.down_proj": {"sensitivity": 2.0, "kind": "down", "depth": 0},
                "layers.1.mlp.down_proj": {"sensitivity": 1.0, "kind": "down", "depth": 1},
                "layers.1.self_attn.o_proj": {"sensitivity": 4.0, "kind": "o", "depth": 1},
                "lm_head": {"sensitivity": 1.0, "kind": "head"},
                "visual.x": {"status": "disabled", "kind": "vision", "depth": 0},
            }
        )
    ).rows
    kinds = by_kind(rows)
    assert [(kind, part.groups, part.share) for kind, part in kinds.items()] == [
        ("o", 1, 0.5),
        ("down", 2, 0.375),
        ("head", 1, 0.125),
    ]
    assert kinds["down"].first == "layers.0.mlp.down_proj"
    depths = by_depth(rows)
    assert {depth: part.sensitivity for depth, part in depths.items()} == {0: 2.0, 1: 5.0}
    assert depths[1].first == "layers.1.self_attn.o_proj"
