"""Granularities: what they make of a pair, what is refused and why, and the grid they give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qsens.config import PairConfig, Roots, SweepConfig, choices, load_sweep
from qsens.errors import UserError
from qsens.grid import Plan, make_plan, read_plan
from qsens.identity import CheckpointIdentity, SamplesIdentity
from qsens.pipeline.plan import plan_json
from qsens.store import Store

REPO = Path(__file__).resolve().parents[2]
ROOTS = Roots(root=REPO, results=REPO, configs=(REPO / "configs",))
ALL = ("default", "w_tensor", "w_channel", "w_group64", "w_group128", "a_tensor", "a_token")
# Those of compressed-tensors: for all weights, for weights with integers, with activations too.
CT_GROUPS = ("ct_channel", "ct_group32", "ct_group64", "ct_group128")
CT_ZEROS = ("ct_group32_asym", "ct_group64_asym", "ct_group128_asym")
CT_INPUTS = ("ct_token", "ct_block128")
CT = ("ct", *CT_GROUPS, *CT_ZEROS, *CT_INPUTS)

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
    assert sorted(choices("quant_granularity", ROOTS)) == sorted((*ALL, *CT))


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
    assert applied.weight_quantizer.cfg() == weight
    got = applied.input_quantizer
    assert (got.cfg() if got else None) == inputs
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
    "mxfp8": (),
}
ACCEPTED_INPUTS = {
    "fp16": (),
    "nvfp4": (),
    "fp8": ("a_token",),
    "int8": ("a_token",),
    "int4": ("a_tensor",),
    "fp4": (),
    "mxfp8": (),
}


def test_which_pairs_accept_which() -> None:
    names = list(choices("quant_pair", ROOTS))
    config = load(",".join(names), ",".join((*ALL, *CT))).config
    assert len(config.quant_pair) == 22
    for pair in config.quant_pair:
        accepted = {
            granularity.name
            for granularity in config.quant_granularity
            if pair.refusal(granularity) is None
        }
        weight, activation = pair.name.removeprefix("w").split("_a")
        expected = {"default", "ct", *ACCEPTED_WEIGHTS[weight], *ACCEPTED_INPUTS[activation]}
        if ACCEPTED_WEIGHTS[weight]:
            expected |= {*CT_GROUPS, *(CT_ZEROS if weight != "fp8" else ())}
            expected |= {*(CT_INPUTS if ACCEPTED_INPUTS[activation] else ())}
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
    said = message.rpartition("allowed with these pairs: ")[2].rstrip(".").split(", ")
    assert said == sorted(said)
    assert [name for name in said if name not in CT] == allowed.split(", ")
    assert "ct" in said
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
        assert pair.weight_quantizer.cfg() == blocks(4, 64)
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
    with pytest.raises(UserError, match="allowed with these pairs: a_token, ct, default"):
        load("wfp4_afp8", "w_channel", roots)


INT8_CT = {"num_bits": 8, "axis": 0, "reference": "compressed-tensors"}


@pytest.mark.parametrize(
    ("pair", "granularity", "weight", "inputs", "bits"),
    [
        ("wint8_aint8", "ct_token", INT8_CT, INT8_TOKEN, 8.0),
        ("wint4_afp16", "ct", {**INT4_128, "reference": "compressed-tensors"}, None, 4.125),
        # A scale of 16 bits for 32 weights, with a zero point of four: 4 + 20 / 32.
        (
            "wint4_afp16",
            "ct_group32_asym",
            {**blocks(4, 32), "reference": "compressed-tensors", "symmetric": False},
            None,
            4.625,
        ),
        ("wfp4_afp16", "ct", {**MXFP4, "reference": "compressed-tensors"}, None, 4.25),
        (
            "wfp8_afp8",
            "ct_block128",
            {
                "num_bits": (4, 3),
                "block_sizes": {-1: 128, -2: 128, "type": "static"},
                "reference": "compressed-tensors",
            },
            {
                "num_bits": (4, 3),
                "block_sizes": {-1: 128},
                "type": "dynamic",
                "reference": "compressed-tensors",
            },
            8 + 16 / 128**2,
        ),
    ],
)
def test_compressed_tensors_is_a_reference(
    pair: str, granularity: str, weight: Any, inputs: Any, bits: float
) -> None:
    applied = laid_over(pair, granularity)
    assert applied.weight_quantizer.cfg() == weight
    got = applied.input_quantizer
    assert (got.cfg() if got else None) == inputs
    assert applied.effective_bits == bits
    assert not applied.by_modelopt
    assert laid_over(pair, "default").by_modelopt


def test_floats_have_no_zero_point() -> None:
    with pytest.raises(UserError, match="its weights are no integers, which alone have a zero"):
        load("wfp8_afp16", "ct_group64_asym")


def test_a_pair_is_named_with_its_granularity() -> None:
    found = plan("wfp8_afp8,wint8_aint8-ct_token,wint4_afp16-ct_group64,wint4_afp16", "default")
    assert sorted(cell.cell for cell in found.cells) == [
        "wfp8_afp8-small",
        "wint4_afp16-ct_group64-small",
        "wint4_afp16-small",
        "wint8_aint8-ct_token-small",
    ]
    alone = plan("wint8_aint8", "ct_token").cells[0]
    assert alone.digest == found.cell("wint8_aint8-ct_token-small").digest
    read = Plan.model_validate_json(plan_json(found))
    assert [cell.cell for cell in read.cells] == [cell.cell for cell in found.cells]


def test_what_is_named_goes_beside_the_granularities_of_the_sweep() -> None:
    config = load("wfp8_afp8,wint8_aint8-ct_token", "default,a_token").config
    assert [(pair.name, granularity.name) for pair, granularity in config.formats] == [
        ("wfp8_afp8", "default"),
        ("wfp8_afp8", "a_token"),
        ("wint8_aint8", "ct_token"),
    ]


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("wint8_aint8-ct_tokens", "unknown quant granularity 'ct_tokens'"),
        ("wint9_aint8-ct_token", "unknown quant pair 'wint9_aint8-ct_token'"),
        (
            "wint8_aint8-ct_token,wint8_aint8-ct_token",
            "quant_pair wint8_aint8 names ct_token twice",
        ),
        ("wint8_afp16-ct_token", "its activations are not quantized"),
    ],
)
def test_a_granularity_in_a_name_that_is_none_is_refused(named: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(named, "default")


def test_pairings_are_of_what_a_sweep_names() -> None:
    config = load("wfp8_afp8,wint8_aint8-ct_token", "default").config
    given = config.model_dump() | {"pairings": {"wfp8_afp8": ["ct_token"]}}
    with pytest.raises(ValidationError, match="leave it to the names in quant_pair"):
        SweepConfig.model_validate(given)


def test_modelopts_engine_refuses_formats_of_compressed_tensors() -> None:
    with pytest.raises(UserError, match=r"does not compute FP8_DEFAULT_CFG\+ct_token of wfp8_afp8"):
        load_sweep("single", ["quant_pair=wfp8_afp8-ct_token", "autoquant.engine=modelopt"])
