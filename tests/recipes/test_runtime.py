"""What runtimes make of formats and widths; the table is that of the servers' own sources."""

from __future__ import annotations

import random

import pytest

from qsens.config.runtime import GPUS, Gpu, RuntimeConfig, load_runtime
from qsens.names import Kind
from qsens.recipes.runtime import Deployment, Weight
from tests.recipes.every_format import at_all_granularities
from tests.recipes.formats.conftest import PAIRS

FORMATS = at_all_granularities(PAIRS)
NEWER = ("ampere", "ada", "hopper", "blackwell")
# For each format: the GPUs that run it as it is, then what others do instead, in words.
A16, MX4, MX8 = "16-bit", "MXFP4 activations", "MXFP8 activations"
NOWHERE: tuple[str, ...] = ()
VLLM: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "wint8_aint8-default": (("turing", "ampere", "ada", "hopper", "cpu"), {}),
    "wint8_aint8-ct_token": (("turing", "ampere", "ada", "hopper", "cpu"), {}),
    "wint8_aint8-ct": (("turing", "ampere", "ada", "hopper", "cpu"), {}),
    "wint8_aint8-w_group64": (NOWHERE, {}),
    "wint8_afp16-default": (("turing", *NEWER), {}),
    "wint8_afp16-ct_group128": (("turing", *NEWER), {}),
    "wint8_afp16-ct_group128_asym": (("hopper",), {}),
    "wint8_afp16-w_tensor": (NOWHERE, {}),
    "wint8_afp8-default": (NOWHERE, {}),
    "wint8_afp8-a_token": (NOWHERE, {}),
    "wfp8_aint8-default": (NOWHERE, {}),
    "wint4_afp16-ct_group64": (("turing", *NEWER), {"cpu": "INT8 activations"}),
    "wint4_afp16-ct_group128_asym": (("turing", *NEWER), {}),
    "wint4_afp8-default": (NOWHERE, {}),
    "wint4_aint8-default": (NOWHERE, {}),
    "wint4_aint8-a_token": (("cpu",), {}),
    "wint4_aint4-default": (NOWHERE, {}),
    "wfp8_afp8-default": (NEWER[1:], {"ampere": A16, "turing": A16}),
    "wfp8_afp8-ct_token": ((*NEWER[1:], "cpu"), {"ampere": A16, "turing": A16}),
    "wfp8_afp8-ct_block128": (NEWER[1:], {}),
    "wfp8_afp8-w_group128": (NOWHERE, {}),
    "wfp8_afp16-ct_channel": (("turing", *NEWER), {}),
    "wfp8_afp16-w_group64": (NOWHERE, {}),
    "wmxfp8_amxfp8-ct": (("blackwell",), dict.fromkeys(NEWER[:3], A16)),
    "wmxfp8_afp16-ct": (NEWER[:3], {"blackwell": MX8}),
    "wfp4_afp16-default": (NEWER[:3], {"blackwell": MX4}),
    "wfp4_afp16-ct": (NEWER[:3], {"blackwell": MX4}),
    "wfp4_afp4-ct": (("blackwell",), dict.fromkeys(NEWER[:3], A16)),
    # Served with other activations everywhere.
    "wfp4_afp8-default": (NOWHERE, {}),
    "wfp4_afp8-a_token": (("hopper", "blackwell"), dict.fromkeys(NEWER[2:], "may fall back")),
    "wnvfp4_anvfp4-ct": (("blackwell",), dict.fromkeys(NEWER[:3], A16)),
    "wnvfp4_afp16-ct": (NEWER, {}),
    "wnvfp4_afp8-default": (NOWHERE, {}),
}
SGLANG: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "wint8_aint8-ct_token": (("turing", "ampere", "ada", "hopper"), {}),
    "wint8_afp8-default": (NOWHERE, {}),
    "wint4_afp8-default": (NOWHERE, {}),
    "wint4_afp16-default": (NEWER, {}),
    "wfp8_afp8-ct_block128": (NEWER[1:], {}),
    "wfp4_afp16-default": (NEWER, {}),
    "wfp4_afp8-default": (NOWHERE, {}),
    "wnvfp4_anvfp4-default": (("blackwell",), dict.fromkeys(NEWER[:3], A16)),
    "wnvfp4_afp8-default": (NOWHERE, {}),
}
TENSORRT_LLM: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "wint8_aint8-default": (NEWER[:3], {}),
    "wint8_afp8-default": (NOWHERE, {}),
    "wint4_afp16-default": (NEWER[:3], {}),
    "wint4_afp8-default": (("ada", "hopper"), {}),
    "wfp8_afp8-default": (NEWER[1:], {}),
    "wfp8_afp8-ct_token": (("hopper",), {}),
    "wfp8_afp8-ct_block128": (("hopper",), {"blackwell": "powers of two"}),
    "wfp8_afp16-default": (NOWHERE, {}),
    "wfp4_afp8-default": (("blackwell",), {}),
    "wnvfp4_anvfp4-default": (("blackwell",), {}),
    "wnvfp4_afp8-default": (("blackwell",), {}),
}
TABLE = [
    (runtime, name)
    for runtime, names in (("vllm", VLLM), ("sglang", SGLANG), ("tensorrt_llm", TENSORRT_LLM))
    for name in names
]


@pytest.mark.parametrize(("runtime", "name"), TABLE)
def test_a_format_runs_where_the_sources_say(runtime: str, name: str) -> None:
    tables = {"vllm": VLLM, "sglang": SGLANG, "tensorrt_llm": TENSORRT_LLM}
    runs, instead = tables[runtime][name]
    loaded = load_runtime(runtime)
    for gpu in GPUS:
        found = Deployment(loaded, gpu).ruling(FORMATS[name])
        if gpu not in runs and gpu not in instead:
            assert found.refusal is not None, gpu
            assert found.refusal.startswith(f"{loaded.title} {loaded.version} "), gpu
            continue
        assert found.refusal is None, gpu
        if gpu in instead:
            assert instead[gpu] in (found.note or ""), gpu
        else:
            assert found.note is None or "XPUs" in found.note, gpu
    any_gpu = Deployment(loaded).ruling(FORMATS[name])
    assert (any_gpu.refusal is None) == bool(runs)
    if runs:
        assert set(any_gpu.absent) == set(GPUS) - set(runs) - set(instead)
        assert all(words in (any_gpu.note or "") for words in instead.values())


def test_what_vllm_reads_as_another_format_is_known_as_such() -> None:
    vllm = Deployment(load_runtime("vllm"))
    wrong = {name for name, pair in FORMATS.items() if vllm.ruling(pair).misread}
    # INT8 with FP8 and FP8 with INT8, however they are scaled: static or per token.
    assert wrong == {name for name in FORMATS if name.split("-")[0] in ("wint8_afp8", "wfp8_aint8")}
    assert {"wint8_afp8-default", "wint8_afp8-a_token", "wfp8_aint8-default"} <= wrong
    assert "bits, not types" in (vllm.ruling(FORMATS["wint8_afp8-default"]).refusal or "")


def test_transformers_takes_every_format() -> None:
    found = Deployment(load_runtime("transformers"))
    assert all(found.ruling(pair).refusal is None for pair in FORMATS.values())


def test_what_the_preset_for_servers_sweeps_runs_on_vllm() -> None:
    from qsens.config import load_sweep

    config = load_sweep("serving").config
    vllm = Deployment(load_runtime("vllm"))
    pairs = [
        pair.with_granularity(granularity)
        for granularity in config.quant_granularity
        for pair in config.pairs_with(granularity)
        if pair.refusal(granularity) is None
    ]
    assert len(pairs) == 17
    assert all(vllm.ruling(pair).refusal is None for pair in pairs)


Q, K, OUT, DOWN = (f"m.layers.0.{n}_proj" for n in ("q", "k", "o", "down"))
FITS: list[tuple[str, str, Kind, tuple[int, int], int, int, str | None]] = [
    # format, member, kind, (out, in), GPUs, rows of the fused layer, what is refused
    ("wint4_afp16-ct_group128", OUT, "o", (512, 512), 1, 512, None),
    # 512 / 2 = 256 = 2 groups; 512 / 8 = 64, half a group.
    ("wint4_afp16-ct_group128", OUT, "o", (512, 512), 2, 512, None),
    ("wint4_afp16-ct_group128", OUT, "o", (512, 512), 8, 512, "64 columns on each of 8 GPUs"),
    # Cut by rows, its columns stay whole.
    ("wint4_afp16-ct_group128", Q, "qkv", (512, 512), 8, 1024, None),
    ("wint4_afp16-ct_group128", Q, "qkv", (512, 576), 1, 1024, "576 columns do not divide"),
    ("wint4_afp16-ct_group64", Q, "qkv", (512, 576), 1, 1024, None),
    # 4864 = 38 * 128: over 2 GPUs 19 blocks, over 4 GPUs 9.5.
    ("wfp8_afp8-ct_block128", DOWN, "down", (896, 4864), 2, 896, None),
    ("wfp8_afp8-ct_block128", DOWN, "down", (896, 4864), 4, 896, "1216 columns on each of 4"),
    # k of 192 rows ends within a block, which only the last of a fused layer may.
    ("wfp8_afp8-ct_block128", K, "qkv", (192, 1024), 1, 1408, "192 rows do not divide into blocks"),
    ("wfp8_afp8-ct_block128", "m.v_proj", "qkv", (192, 1024), 1, 1408, None),
    ("wfp8_afp8-ct_block128", "m.v_proj", "qkv", (256, 1024), 4, 1408, "64 rows on each of 4"),
    ("wfp8_afp8-ct_block128", OUT, "o", (200, 1024), 1, 200, None),
    # Without groups, only the number of GPUs has to divide.
    ("wint8_aint8-ct_token", Q, "qkv", (90, 50), 4, 90, "90 rows do not divide over 4 GPUs"),
    ("wint8_aint8-ct_token", OUT, "o", (90, 50), 4, 90, "50 columns do not divide over 4 GPUs"),
    ("wint8_aint8-ct_token", Q, "qkv", (90, 50), 3, 90, None),
    # A vocabulary is filled up; what is not cut may have any size.
    ("wint8_aint8-ct_token", "lm_head", "head", (151937, 64), 2, 151937, None),
    ("wint8_aint8-ct_token", "m.q_a_proj", "qkv", (91, 50), 2, 91, None),
    # Experts: gate and up cut by rows, down by columns.
    ("wfp8_afp8-ct_block128", "m.experts.3.gate_proj", "experts", (768, 2048), 2, 768, None),
    ("wfp8_afp8-ct_block128", "m.experts.3.gate_proj", "experts", (768, 2048), 4, 768, "192 rows"),
    ("wfp8_afp8-ct_block128", "m.experts.3.down_proj", "experts", (2048, 768), 2, 2048, None),
    ("wfp8_afp8-ct_block128", "m.experts.3.down_proj", "experts", (2048, 768), 4, 2048, "192 col"),
    # As modules of their own, none of an expert's parts is the last of a fused layer.
    ("wfp8_afp8-ct_block128", "m.experts.3.up_proj", "gate_up", (192, 256), 1, 192, "192 rows"),
    ("wfp8_afp8-ct_block128", "m.mlp.up_proj", "gate_up", (192, 256), 1, 384, None),
    # Gate and up in one: 2 * 192 = 384 = 3 * 128, but neither half divides.
    ("wfp8_afp8-ct_block128", "m.experts.gate_up_proj", "experts", (384, 256), 1, 384, "192 rows"),
    ("wnvfp4_anvfp4-ct", OUT, "o", (64, 96), 2, 64, None),
    ("wnvfp4_anvfp4-ct", OUT, "o", (64, 96), 4, 64, "24 columns on each of 4 GPUs"),
]


@pytest.mark.parametrize(("name", "member", "kind", "shape", "gpus", "fused_rows", "words"), FITS)
def test_widths_divide_after_the_cut(
    name: str,
    member: str,
    kind: Kind,
    shape: tuple[int, int],
    gpus: int,
    fused_rows: int,
    words: str | None,
) -> None:
    vllm = Deployment(load_runtime("vllm"), "hopper", gpus)
    found = vllm.unfit(FORMATS[name], Weight(member, kind, shape, fused_rows))
    if words is None:
        assert found is None
    else:
        assert (found or "").startswith(f"vLLM 0.32: {words}")


@pytest.mark.parametrize(
    ("runtime", "gpu", "shape", "fused_rows", "words"),
    [
        ("vllm", "hopper", (48, 64), 144, None),
        ("vllm", "cpu", (48, 64), 144, "144 rows are no multiple of 32, on cpu"),
        # 48 + 48 + 32 = 128 = 4 * 32: the layer that they are fused into counts.
        ("vllm", "cpu", (48, 64), 128, None),
        # No generation asked for: it must fit wherever it runs as it is, which CPUs do not.
        ("vllm", None, (48, 64), 144, None),
        ("sglang", None, (48, 192), 128, "192 columns are no multiple of 128, on ampere"),
        ("sglang", "hopper", (48, 128), 128, None),
        ("sglang", "hopper", (48, 192), 128, "192 columns are no multiple of 128, on hopper"),
    ],
)
def test_tiles_hold_for_a_fused_layer(
    runtime: str, gpu: Gpu | None, shape: tuple[int, int], fused_rows: int, words: str | None
) -> None:
    found = Deployment(load_runtime(runtime), gpu).unfit(
        FORMATS["wint4_afp16-ct_group64"], Weight(K, "qkv", shape, fused_rows)
    )
    assert (found is None) if words is None else words in (found or "")


@pytest.mark.parametrize(
    ("member", "kind", "words"),
    [
        ("model.layers.0.mlp.gate", "other", "never quantizes routers"),
        ("model.layers.0.mlp.gate_proj", "gate_up", None),
        ("model.layers.0.mlp.shared_expert_gate", "other", "never quantizes gates of shared"),
        ("model.layers.0.linear_attn.conv1d", "other", "never quantizes convolutions"),
        ("model.language_model.embed_tokens", "other", "never quantizes embeddings"),
        ("lm_head", "head", None),
    ],
)
def test_what_is_never_quantized(member: str, kind: Kind, words: str | None) -> None:
    vllm = Deployment(load_runtime("vllm"))
    found = vllm.module_refusal(FORMATS["wint8_aint8-ct"], member, kind)
    assert (found is None) if words is None else words in (found or "")


def test_formats_for_experts_alone() -> None:
    sglang = Deployment(load_runtime("sglang"))
    pair = FORMATS["wfp4_afp8-a_token"]
    assert sglang.module_refusal(pair, "m.layers.0.mlp.experts", "experts") is None
    assert "experts alone" in (sglang.module_refusal(pair, "m.o_proj", "o") or "")


def test_what_becomes_one_module() -> None:
    vllm = Deployment(load_runtime("vllm"))
    names = [
        *(f"m.0.attn.{leaf}_proj" for leaf in ("v", "k", "q", "o")),
        *(f"m.1.attn.{leaf}" for leaf in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")),
        *(f"m.2.linear_attn.in_proj_{leaf}" for leaf in ("qkv", "z", "b", "a")),
        *(f"m.3.mlp.experts.{at}.{leaf}_proj" for at in (0, 1) for leaf in ("gate", "down")),
        "m.4.mlp.gate_proj",
    ]
    random.Random(0).shuffle(names)
    assert {frozenset(each) for each in vllm.fused(names)} == {
        frozenset(f"m.0.attn.{leaf}_proj" for leaf in "qkv"),
        frozenset({"m.1.attn.q_a_proj", "m.1.attn.kv_a_proj_with_mqa"}),
        frozenset({"m.2.linear_attn.in_proj_qkv", "m.2.linear_attn.in_proj_z"}),
        frozenset({"m.2.linear_attn.in_proj_b", "m.2.linear_attn.in_proj_a"}),
        frozenset(name for name in names if ".experts." in name),
    }
    assert isinstance(vllm.runtime, RuntimeConfig)
