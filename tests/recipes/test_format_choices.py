"""What groups may become, from the rows of a sweep."""

from __future__ import annotations

import pytest

from qsens.recipes.format_choices import (
    UNQUANTIZED,
    DecisionGroup,
    FormatChoice,
    build_decision_groups,
)
from qsens.schema.summary import Row

LAYER = "model.language_model.layers.0."


def row(name: str, bits: float, damage: float | None, weights: int = 64, **other: object) -> Row:
    values: dict[str, object] = {
        "layer": name,
        "members": (name,),
        "kind": "other",
        "depth": 0,
        "status": "scored" if damage is not None else "failed",
        "num_bits": bits,
        "sensitivity": damage,
        "sensitivity_per_token": damage,
        "size_cost": weights * bits / 16,
        "position": None,
        "share": None,
    }
    return Row.model_validate(values | other)


def test_every_format_with_a_score_is_an_option() -> None:
    formats = {
        "w4": [row("a.o_proj", 4.25, 3.0), row("a.down_proj", 4.25, None, 128)],
        "w8": [row("a.o_proj", 8.0, 1.0), row("a.down_proj", 8.0, 2.0, 128)],
    }
    assert build_decision_groups(formats) == [
        DecisionGroup(
            ("a.o_proj",),
            64,
            (UNQUANTIZED, FormatChoice("w4", 4.25, 3.0), FormatChoice("w8", 8.0, 1.0)),
        ),
        DecisionGroup(("a.down_proj",), 128, (UNQUANTIZED, FormatChoice("w8", 8.0, 2.0))),
    ]


def test_disabled_groups_are_left_out_and_kept_ones_stay() -> None:
    rows = [
        row("visual.x", 16.0, None, status="disabled"),
        row(f"{LAYER}mlp.down_proj", 8.0, 1.0),
        row("lm_head", 8.0, 1.0),
    ]
    kept = build_decision_groups({"w8": rows}, keep=["language_model.*.down_proj"], keep_head=True)
    assert [(decision.groups, decision.choices) for decision in kept] == [
        ((f"{LAYER}mlp.down_proj",), (UNQUANTIZED,)),
        (("lm_head",), (UNQUANTIZED,)),
    ]


def test_parts_of_a_fused_layer_are_one_unit() -> None:
    leaves = ("q_proj", "k_proj", "v_proj", "o_proj")
    formats = {
        "w4": [row(f"{LAYER}self_attn.{leaf}", 4.5, 2.0**i) for i, leaf in enumerate(leaves)],
        "w8": [
            row(f"{LAYER}self_attn.{leaf}", 8.0, None if leaf == "k_proj" else 1.0)
            for leaf in leaves
        ],
    }
    fused, alone = build_decision_groups(formats)
    assert fused.groups == tuple(f"{LAYER}self_attn.{leaf}" for leaf in leaves[:3])
    assert fused.weights == 192
    # k has no score at 8 bits, so that none of the three can take it: 1 + 2 + 4 at 4.5.
    assert fused.choices == (UNQUANTIZED, FormatChoice("w4", 4.5, 7.0))
    assert alone.groups == (f"{LAYER}self_attn.o_proj",)


def test_groups_that_must_go_together() -> None:
    rows = [row("a", 8.0, 1.0), row("b", 8.0, 2.0), row("c", 8.0, 4.0)]
    decisions = build_decision_groups({"w8": rows}, together=[{"a", "c", "not there"}])
    assert [(decision.groups, decision.choices[-1].score) for decision in decisions] == [
        (("a", "c"), 5.0),
        (("b",), 2.0),
    ]
    assert len(build_decision_groups({"w8": rows}, together=[{"a", "b"}, {"b", "c"}])) == 1


def test_the_score_is_the_statistic_that_is_asked_for() -> None:
    formats = {
        "w8": [row("a", 8.0, 1.0, sensitivity_per_token=0.25)],
        "w4": [row("a", 4.5, 7.0, sensitivity_per_token=0.5)],
    }
    (decision,) = build_decision_groups(formats, "sensitivity")
    assert [choice.score for choice in decision.choices] == [0.0, 1.0, 7.0]
    (decision,) = build_decision_groups(formats, "sensitivity_per_token")
    assert [choice.score for choice in decision.choices] == [0.0, 0.25, 0.5]


def test_weights_that_differ_are_no_one_sweep() -> None:
    with pytest.raises(ValueError, match="64 weights, and 65"):
        build_decision_groups({"w4": [row("a", 4.0, 1.0)], "w8": [row("a", 8.0, 1.0, 65)]})
