"""Granularities: what they make of a pair, what is refused and why, and the grid they give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qsens.config import PairConfig, Roots, choices, load_sweep
from qsens.errors import UserError
from qsens.grid import Plan, make_plan, read_plan
from qsens.identity import CheckpointIdentity, SamplesIdentity
from qsens.pipeline.plan import plan_json
from qsens.store import Store

REPO = Path(__file__).resolve().parents[2]
ROOTS = Roots(root=REPO, results=REPO, configs=(REPO / "configs",))
ALL = ("default", "w_tensor", "w_channel", "w_group64", "w_group128", "a_tensor", "a_token")

FP8_TENSOR = {"num_bits": (4, 3), "axis": None}
FP8_TOKEN = {"num_bits": (4, 3), "block_sizes": {-1: None}, "type": "dynamic"}
INT8_TENSOR = {"num_bits": 8, "axis": None}
INT8_CHANNEL = {"num_bits": 8, "axis": 0}
INT8_TOKEN = {"num_bits": 8, "block_sizes": {-1: None}, "type": "dynamic"}
INT4_TOKEN = {"num_bits": 4, "block_sizes": {-1: None}, "type": "dynamic"}
INT4_128 = {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}
MXFP4 = {
    "num_bits": (2, 1),
    "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)},
}


def blocks(bits: int | tuple[int, int], size: int) -> dict[str, Any]:
    return {"num_bits": bits, "block_sizes": {-1: size, "type": "static"}}


def load(pairs: str, granularities: str, roots: Roots = ROOTS) -> Any:
    return load_sweep(
        "single", [f"quant_pair={pairs}", f"quant_granularity={granularities}"], roots=roots
    )


def laid_over(pair: str, granularity: str, roots: Roots = ROOTS) -> PairConfig:
    config = load(pair, granularity, roots).config
    applied: PairConfig = config.quant_pair[0].with_granularity(config.quant_granularity[0])
    return applied


def own_granularity(tmp_path: Path, name: str, text: str) -> Roots:
    directory = tmp_path / "own" / "quant_granularity"
    directory.mkdir(parents=True)
    (directory / f"{name}.yaml").write_text(text)
    return Roots(root=tmp_path, results=tmp_path, configs=(tmp_path / "own", REPO / "configs"))


def plan(pairs: str, granularities: str, lanes: int = 1) -> Plan:
    loaded = load(pairs, granularities)
    return make_plan(
        loaded.config,
        ROOTS,
        checkpoint=CheckpointIdentity(
            path=Path("Tiny"),
            digest="cd" * 32,
            tokenizer_digest="01" * 32,
            architecture="TinyForCausalLM",
            weight_bytes=1,
        ),
        samples={
            loaded.config.dataset[0].name: {
                "small": SamplesIdentity(path=Path("captions.txt"), digest="ef" * 32, available=16)
            }
        },
        versions={"qsens": "0.1.0"},
        lanes=lanes,
        notices=loaded.notices,
    )


def test_the_files_are_the_granularities_that_are_documented() -> None:
    assert sorted(choices("quant_granularity", ROOTS)) == sorted(ALL)


@pytest.mark.parametrize(
    ("pair", "granularity", "weight", "inputs", "bits"),
    [
        ("wfp8_afp8", "w_channel", {"num_bits": (4, 3), "axis": 0}, FP8_TENSOR, 8.0),
        ("wfp8_afp8", "w_group64", blocks((4, 3), 64), FP8_TENSOR, 8.25),
        ("wfp8_afp16", "w_group128", blocks((4, 3), 128), None, 8.125),
        ("wfp8_afp8", "a_token", FP8_TENSOR, FP8_TOKEN, 8.0),
        ("wint8_aint8", "w_tensor", INT8_TENSOR, INT8_TENSOR, 8.0),
        ("wint8_afp16", "w_group64", blocks(8, 64), None, 8.25),
        ("wint8_afp8", "w_group128", blocks(8, 128), FP8_TENSOR, 8.125),
        ("wint8_aint8", "a_token", INT8_CHANNEL, INT8_TOKEN, 8.0),
        ("wint4_afp16", "w_tensor", {"num_bits": 4, "axis": None}, None, 4.0),
        ("wint4_afp16", "w_channel", {"num_bits": 4, "axis": 0}, None, 4.0),
        ("wint4_aint4", "w_group64", blocks(4, 64), INT4_TOKEN, 4.25),
        ("wint4_aint4", "a_tensor", INT4_128, {"num_bits": 4, "axis": None}, 4.125),
        ("wfp4_afp8", "a_token", MXFP4, FP8_TOKEN, 4.25),
    ],
)
def test_what_it_makes_of_a_pair(
    pair: str, granularity: str, weight: Any, inputs: Any, bits: float
) -> None:
    own, applied = laid_over(pair, "default"), laid_over(pair, granularity)
    assert applied.weight_quantizer.modelopt() == weight
    got = applied.input_quantizer
    assert (got.modelopt() if got else None) == inputs
    assert applied.effective_bits == bits
    assert applied.format == f"{own.format}+{granularity}"
    assert applied.quant_cfg()[1]["cfg"]["effective_bits"] == bits
    kept = {"name", "weight", "activation", "scheme", "run_dir"}
    assert applied.model_dump(include=kept) == own.model_dump(include=kept)


def test_the_default_leaves_a_pair_as_it_is() -> None:
    config = load("wint4_aint4,wfp4_afp16", "default").config
    for pair in config.quant_pair:
        assert pair.with_granularity(config.quant_granularity[0]) is pair


# By the two halves of a pair's name; `default` goes with all.
ACCEPTED_WEIGHTS = {
    "fp4": (),
    "nvfp4": (),
    "fp8": ("w_channel", "w_group64", "w_group128"),
    "int8": ("w_tensor", "w_group64", "w_group128"),
    "int4": ("w_tensor", "w_channel", "w_group64"),
}
ACCEPTED_INPUTS = {
    "fp16": (),
    "nvfp4": (),
    "fp8": ("a_token",),
    "int8": ("a_token",),
    "int4": ("a_tensor",),
}


def test_which_pairs_accept_which() -> None:
    names = list(choices("quant_pair", ROOTS))
    config = load(",".join(names), ",".join(ALL)).config
    assert len(config.quant_pair) == 19
    for pair in config.quant_pair:
        accepted = {
            granularity.name
            for granularity in config.quant_granularity
            if pair.refusal(granularity) is None
        }
        weight, activation = pair.name.removeprefix("w").split("_a")
        expected = {"default", *ACCEPTED_WEIGHTS[weight], *ACCEPTED_INPUTS[activation]}
        assert accepted == expected, pair.name


@pytest.mark.parametrize(
    ("pair", "granularity", "why", "allowed"),
    [
        ("wfp4_afp16", "w_group64", "blocks of its weights are part of the format", "default"),
        ("wnvfp4_afp8", "w_channel", "blocks of its weights are part", "a_token, default"),
        ("wnvfp4_anvfp4", "a_token", "blocks of its activations are part", "default"),
        (
            "wint8_afp16",
            "a_token",
            "its activations are not quantized",
            "default, w_group128, w_group64, w_tensor",
        ),
        (
            "wint8_aint8",
            "w_channel",
            "its weights have it already: it would repeat 'default'",
            "a_token, default, w_group128, w_group64, w_tensor",
        ),
        (
            "wfp8_afp8",
            "w_tensor",
            "its weights have it already",
            "a_token, default, w_channel, w_group128, w_group64",
        ),
        (
            "wint4_afp16",
            "w_group128",
            "its weights have it already",
            "default, w_channel, w_group64, w_tensor",
        ),
        (
            "wint4_aint4",
            "a_token",
            "its activations have it already",
            "a_tensor, default, w_channel, w_group64, w_tensor",
        ),
        (
            "wfp8_aint8",
            "a_tensor",
            "its activations have it already",
            "a_token, default, w_channel, w_group128, w_group64",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    pair: str, granularity: str, why: str, allowed: str
) -> None:
    with pytest.raises(UserError) as caught:
        load(pair, granularity)
    message = str(caught.value)
    for words in (pair, granularity, why, "quant_granularity (the command line)"):
        assert words in message
    assert message.endswith(f"allowed with these pairs: {allowed}.")
    assert caught.value.exit_code == 2
    assert len(message.splitlines()) == 2


def test_a_pair_alone_refuses_too() -> None:
    pair = load("wfp4_afp16", "default").config.quant_pair[0]
    group = load("wint8_afp16", "w_group64").config.quant_granularity[0]
    with pytest.raises(UserError, match=r"wfp4_afp16: w_group64 makes no sense .* weights"):
        pair.with_granularity(group)


def test_a_sweep_leaves_out_what_makes_no_sense_and_says_so() -> None:
    found = plan("wfp8_afp8,wint8_aint8,wfp4_afp16", "default,w_channel,a_token")
    assert [cell.cell for cell in found.cells] == [
        "wfp8_afp8-small",
        "wfp8_afp8-a_token-small",
        "wint8_aint8-small",
        "wint8_aint8-a_token-small",
        "wfp8_afp8-w_channel-small",
        "wfp4_afp16-small",
    ]
    assert found.notices == [
        "wint8_aint8 is left out at w_channel: its weights have it already: "
        "it would repeat 'default'",
        "wfp4_afp16 is left out at w_channel: the blocks of its weights are part of the format",
        "wfp4_afp16 is left out at a_token: its activations are not quantized",
    ]


def test_one_granularity_that_no_pair_accepts_refuses_the_sweep() -> None:
    with pytest.raises(UserError) as caught:
        load("wint8_afp16,wfp4_afp16,wnvfp4_afp16", "default,w_channel")
    said = str(caught.value)
    assert "wint8_afp16: its weights have it already" in said
    assert "wfp4_afp16, wnvfp4_afp16: the blocks of its weights are part of the format" in said


def test_a_plan_gives_the_pair_that_is_computed(tmp_path: Path) -> None:
    found = plan("wfp8_afp8,wint4_afp16", "default,w_group64")
    (tmp_path / "plan.json").write_text(plan_json(found))
    read = read_plan(tmp_path / "plan.json")
    for each in (found, read):
        cell = each.cell("wint4_afp16-w_group64-small")
        pair = each.cell(cell.cell).precision
        assert pair.format == "INT4_BLOCKWISE_WEIGHT_ONLY_CFG+w_group64"
        assert pair.effective_bits == 4.25
        assert pair.weight_quantizer.modelopt() == blocks(4, 64)
        assert each.cell("wint4_afp16-small").precision.effective_bits == 4.125
    assert len({cell.digest for cell in found.cells}) == 4
    alone = plan("wfp8_afp8", "default").cells[0]
    assert alone.digest == found.cell("wfp8_afp8-small").digest


def test_its_name_stands_between_the_pair_and_the_run() -> None:
    found = load_sweep(
        "single",
        ["quant_granularity=default,w_channel", "output_layout=publish"],
        roots=ROOTS,
    ).config
    published = plan("wfp8_afp8", "default,w_channel").model_copy(update={"config": found})
    store = Store(published)
    run = "tiny_qwen3_vl_autoquant_wfp8_afp8_lm_small"
    assert [
        store.cell_dir(cell).relative_to(store.model_dir()).as_posix() for cell in published.cells
    ] == [f"weight-fp8-act-fp8/{run}", f"weight-fp8-act-fp8/w_channel/{run}"]


def test_lanes_keep_equal_weights_together() -> None:
    found = plan("wfp8_afp8,wfp8_afp16", "default,w_channel,w_group64,a_token", lanes=3)
    lanes: dict[int, set[str]] = {}
    for cell in found.cells:
        weight = found.cell(cell.cell).precision.weight_quantizer
        lanes.setdefault(cell.lane, set()).add(weight.model_dump_json())
    assert [len(weights) for _, weights in sorted(lanes.items())] == [1, 1, 1]


def test_a_calibrated_overlay_asks_for_calibration() -> None:
    assert laid_over("wfp4_aint4", "default").algorithm is None
    assert laid_over("wfp4_aint4", "a_tensor").algorithm == "max"
    inputs = laid_over("wfp8_afp8", "a_token").input_quantizer
    assert inputs is not None
    assert not inputs.needs_calibration()


@pytest.mark.parametrize(
    ("pair", "granularity", "experimental"),
    [
        ("wint4_afp16", "w_tensor", True),
        ("wint4_afp16", "w_channel", False),
        ("wint8_afp16", "w_tensor", False),
        ("wfp8_afp8", "a_token", False),
        ("wint4_aint4", "w_group64", True),
    ],
)
def test_four_bit_integers_under_one_scale_are_experimental(
    pair: str, granularity: str, experimental: bool
) -> None:
    assert laid_over(pair, granularity).experimental is experimental


def test_what_is_experimental_only_at_a_granularity_is_said() -> None:
    assert load("wint4_afp16", "default,w_channel,w_tensor").notices == (
        "wint4_afp16 at w_tensor is experimental: nobody is known to deploy it",
    )


def test_both_sides_at_once(tmp_path: Path) -> None:
    roots = own_granularity(
        tmp_path,
        "channel_token",
        "weight_quantizer: {axis: 0}\n"
        'input_quantizer: {type: dynamic, block_sizes: {"-1": null}}\n',
    )
    applied = laid_over("wfp8_afp8", "channel_token", roots)
    # As in ModelOpt's FP8_PER_CHANNEL_PER_TOKEN_CFG.
    assert [entry.get("cfg") for entry in applied.quant_cfg()] == [
        None,
        {"num_bits": (4, 3), "axis": 0, "effective_bits": 8.0},
        FP8_TOKEN,
    ]
    # The weights have it already, the activations do not.
    assert laid_over("wint8_aint8", "channel_token", roots).input_quantizer is not None
    with pytest.raises(UserError, match="wint8_afp16: its activations are not quantized"):
        load("wint8_afp16", "channel_token", roots)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("default", "weight_quantizer: {axis: 0}\n", "'default', and it alone"),
        ("mine", "", "'default', and it alone"),
        ("mine", "input_quantizer: {axis: -1}\n", "needs type: dynamic"),
        (
            "mine",
            'weight_quantizer: {block_sizes: {"-1": 32, type: dynamic, scale_bits: [8, 0]}}\n',
            "write a pair",
        ),
        ("mine", "weight_quantizer: {num_bits: 4}\n", "unknown key"),
        ("mine", "weight_quantizer: {axes: 0}\n", "Did you mean axis?"),
    ],
)
def test_a_wrong_file_is_refused_and_named(name: str, text: str, said: str, tmp_path: Path) -> None:
    roots = own_granularity(tmp_path, name, text)
    with pytest.raises(UserError) as caught:
        load("wint8_aint8", name, roots)
    assert said in str(caught.value)
    assert f"quant_granularity/{name}.yaml" in str(caught.value)


def test_another_broken_file_does_not_hide_what_is_allowed(tmp_path: Path) -> None:
    roots = own_granularity(tmp_path, "broken", "weight_quantizer: {axes: 0}\n")
    with pytest.raises(UserError, match="allowed with these pairs: a_token, default"):
        load("wfp4_afp8", "w_channel", roots)
