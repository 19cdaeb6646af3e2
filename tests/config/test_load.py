"""Loading of configuration: what is accepted, and what each refusal says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qsens.config import Roots, choices, load_sweep
from qsens.errors import UserError

REPO = Path(__file__).resolve().parents[2]
SEVEN = [
    "wfp4_afp8",
    "wfp4_afp16",
    "wfp8_afp8",
    "wfp8_afp16",
    "wint8_afp16",
    "wint8_afp8",
    "wint8_aint8",
]


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    return Roots(root=tmp_path, results=tmp_path, configs=(REPO / "configs",))


def own_configs(tmp_path: Path, **files: str) -> Roots:
    """Return roots whose first directory of configuration holds ``group__name`` files."""
    own = tmp_path / "own"
    for key, text in files.items():
        group, name = key.split("__")
        (own / group).mkdir(parents=True, exist_ok=True)
        (own / group / f"{name}.yaml").write_text(text)
    return Roots(root=tmp_path, results=tmp_path, configs=(own, REPO / "configs"))


def test_nightly_is_seven_pairs_at_three_sizes(roots: Roots) -> None:
    config = load_sweep("nightly", roots=roots).config
    assert [pair.name for pair in config.quant_pair] == SEVEN
    assert config.dataset[0].size == ("small", "medium", "large")
    assert config.dataset[0].sizes == {"small": 16, "medium": 128, "large": 512}
    assert config.autoquant.score_size == 512
    assert config.output_layout == "publish"
    assert config.model.dtype == "bfloat16"
    checkpoint = "models/qwen3_vl_4b_instruct/checkpoints/Qwen3-VL-4B-Instruct"
    assert config.model.path == roots.root / checkpoint
    assert config.dataset[0].directory == roots.root / "datasets/vlm-quantize-calib"


def test_defaults_that_people_rely_on(roots: Roots) -> None:
    config = load_sweep("single", roots=roots).config
    assert config.autoquant.effective_bits == 8.0
    assert config.autoquant.score_size == 128
    assert config.autoquant.batch_size == 8
    assert config.autoquant.device == "auto"
    assert config.dataset[0].calib_seq_len == 512
    assert config.dataset[0].max_calib_samples is None
    assert config.model.trust_remote_code is False
    assert config.dag.schedule == "0 2 * * *"
    assert config.dag.max_active_runs == 4


@pytest.mark.parametrize("preset", ["nightly", "demo", "demo-text", "single"])
def test_every_preset_loads(preset: str, roots: Roots) -> None:
    assert load_sweep(preset, roots=roots).config.preset == preset


def test_demo_captions_lie_beside_their_file(roots: Roots) -> None:
    dataset = load_sweep("demo-text", roots=roots).config.dataset[0]
    assert dataset.paths("small") == (REPO / "configs/dataset/demo/captions_small.txt",)
    assert dataset.paths("small")[0].is_file()


def test_demo_drawings_lie_beside_the_checkpoint_wherever_it_is(roots: Roots) -> None:
    config = load_sweep("demo", roots=roots).config
    assert config.dataset[0].directory == config.model.path / "drawings"
    assert config.coverage == ("lm_only", "all_layers")
    moved = load_sweep("demo", ["model.path=/elsewhere/tiny"], roots=roots).config
    assert moved.dataset[0].directory == Path("/elsewhere/tiny/drawings")
    # Only the path is taken over: a name is that of results.
    named = load_sweep("demo", ["model.name=other"], roots=roots).config
    assert named.model.path == config.model.path
    assert named.dataset[0].directory == config.dataset[0].directory


def test_overrides_of_every_kind(roots: Roots) -> None:
    config = load_sweep(
        "nightly",
        [
            "quant_pair=wfp8_afp8,wint8_afp16",
            "dataset.size=small,large",
            "autoquant.batch_size=4",
            "runner.report_only=true",
            "runner.output_dir=out",
            "dag.schedule=null",
            "dataset.max_calib_samples=7",
            "output_layout=tmp",
        ],
        roots=roots,
    ).config
    assert [pair.name for pair in config.quant_pair] == ["wfp8_afp8", "wint8_afp16"]
    assert config.dataset[0].size == ("small", "large")
    assert config.autoquant.batch_size == 4
    assert config.runner.report_only is True
    assert config.runner.output_dir == roots.root / "out"
    assert config.dag.schedule is None
    assert config.dataset[0].max_calib_samples == 7
    assert config.output_layout == "tmp"


def test_path_alone_names_the_model(roots: Roots) -> None:
    loaded = load_sweep("single", ["model.path=/somewhere/My Model-7B"], roots=roots)
    name = loaded.config.model.name
    assert loaded.config.model.short_name == name
    # The first digits of the SHA-256 of "My Model-7B", as sha256sum prints them.
    assert name == "My_Model-7B-3822601d"
    assert any(name in notice for notice in loaded.notices)
    named = load_sweep("single", ["model.path=/x/Y", "model.name=z"], roots=roots)
    assert named.config.model.name == "z"
    assert named.config.model.short_name == "tiny_qwen3_vl"


def named(roots: Roots, path: Path | str) -> str:
    """Return the name that a checkpoint's path gives its results; it must have been said."""
    loaded = load_sweep("single", [f"model.path={path}"], roots=roots)
    name = loaded.config.model.name
    assert loaded.config.model.short_name == name
    assert f"'{name}'" in loaded.notices[0]
    return name


@pytest.mark.parametrize("name", ["Qwen3-VL-4B-Instruct", "a", "x.y", "a_b", "a_", "A" * 120])
def test_a_path_that_ends_in_a_name_gives_it_as_it_is(name: str, roots: Roots) -> None:
    assert named(roots, f"/somewhere/{name}") == name
    assert named(roots, f"/somewhere/{name}/") == name
    assert named(roots, f"/somewhere/{name}/.") == name


def test_no_two_directories_share_a_name(roots: Roots) -> None:
    """Neither those that differ in what no name may hold, nor those of nothing else."""
    parts = ["a b", "a_b", "a  b", "a\tb", "a+b", "ä b", "a_b_", "-a_b", "_a_b"]
    parts += ["模型", "Модель", "模型2", "...", "---", "_", "x.y", "x.y ", " x.y", "é", "e"]
    parts += ["A" * 120, "A" * 121, "A" * 122]
    names = [named(roots, f"/somewhere/{part}") for part in parts]
    assert len(set(names)) == len(parts)
    assert all(re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,119}", name) for name in names)


def test_a_path_without_a_last_part_takes_that_of_the_directory(
    roots: Roots, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "inner").mkdir(parents=True)
    assert named(roots, tmp_path / "one" / "inner" / "..") == "one"
    assert named(roots, tmp_path / "two" / "inner" / "..") == "two"
    assert named(roots, "/").startswith("model-")


def test_experimental_pair_is_said_once(roots: Roots) -> None:
    notices = load_sweep("nightly", roots=roots).notices
    assert [notice for notice in notices if "experimental" in notice] == [
        "wint8_afp8 is experimental: nobody is known to deploy it"
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("autoquant.efective_bits=6", ["autoquant.efective_bits", "command line", "score_size"]),
        ("colour=red", ["colour", "command line", "quant_pair", "dataset"]),
        ("quant_pair=wfp9_afp9", ["quant_pair", "wfp9_afp9", "wint8_aint8", "command line"]),
        ("quant_pair=", ["quant_pair", "at least one"]),
        ("quant_pair=wfp8_afp8,wfp8_afp8", ["wfp8_afp8", "twice"]),
        ("model=unheard_of", ["model", "unheard_of", "tiny_qwen3_vl"]),
        ("dataset.size=large,small", ["size", "out of order", "small, medium, large"]),
        ("dataset.size=huge", ["dataset.size", "huge", "'small', 'medium' or 'large'"]),
        ("dataset.sizes.small=600", ["sizes out of order", "600"]),
        ("autoquant.effective_bits=many", ["autoquant.effective_bits", "many", "number"]),
        ("autoquant.effective_bits=0", ["autoquant.effective_bits", "greater than 0"]),
        ("autoquant.device=tpu", ["autoquant.device", "tpu"]),
        ("autoquant=8", ["autoquant", "section", "autoquant.batch_size"]),
        ("model.path=${oc.env:HOME}", ["model.path", "interpolation", "command line"]),
        ("model.name=${model.path}", ["model.name", "interpolation"]),
        ("model.name=../../etc", ["model.name", "../../etc"]),
        ("coverage=everything", ["coverage", "everything", "lm_only"]),
        ("no-equals-sign", ["no-equals-sign", "key=value"]),
    ],
)
def test_refusals_name_key_source_and_what_is_allowed(
    override: str, said: list[str], roots: Roots
) -> None:
    with pytest.raises(UserError) as caught:
        load_sweep("demo-text", [override], roots=roots)
    message = str(caught.value)
    for words in said:
        assert words in message
    assert caught.value.exit_code == 2
    assert len(message.splitlines()) <= 2


def test_unknown_preset_lists_presets(roots: Roots) -> None:
    presets = "demo, demo-domains, demo-text, fp8-all-layers, int8-3phase, nightly, serving, single"
    with pytest.raises(UserError, match=presets):
        load_sweep("weekly", roots=roots)


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    roots = own_configs(
        tmp_path,
        sweep__mine="defaults: {model: tiny_qwen3_vl, dataset: demo, quant_pair: wfp8_afp8}\n"
        "autoquant: {bacth_size: 8}\n",
    )
    with pytest.raises(UserError) as caught:
        load_sweep("mine", roots=roots)
    assert "autoquant.bacth_size" in str(caught.value)
    assert str(tmp_path / "own/sweep/mine.yaml") in str(caught.value)
    assert "Did you mean batch_size?" in str(caught.value)


def test_a_wrong_value_in_a_pair_file_names_that_file(tmp_path: Path) -> None:
    roots = own_configs(
        tmp_path,
        quant_pair__mine="weight: fp8\nactivation: fp8\nformat: X\neffective_bits: 99\n"
        "weight_quantizer: {num_bits: [4, 3]}\n",
    )
    with pytest.raises(UserError) as caught:
        load_sweep("single", ["quant_pair=mine"], roots=roots)
    assert "effective_bits" in str(caught.value)
    assert str(tmp_path / "own/quant_pair/mine.yaml") in str(caught.value)


def test_own_files_win_and_interpolate(tmp_path: Path) -> None:
    roots = own_configs(
        tmp_path,
        model__mine="name: mine\npath: checkpoints/${model.name}\ndtype: float16\n",
        quant_pair__wfp8_afp8="weight: fp8\nactivation: fp8\nformat: MINE\neffective_bits: 8\n"
        "weight_quantizer: {num_bits: [4, 3]}\n",
    )
    config = load_sweep("single", ["model=mine"], roots=roots).config
    assert config.model.path == tmp_path / "checkpoints/mine"
    assert config.quant_pair[0].format == "MINE"
    assert "mine" in choices("model", roots)


def test_a_broken_interpolation_names_its_file(tmp_path: Path) -> None:
    roots = own_configs(
        tmp_path,
        sweep__mine="defaults: {model: tiny_qwen3_vl, dataset: demo, quant_pair: wfp8_afp8}\n"
        "output_layout: ${nowhere.at.all}\n",
    )
    with pytest.raises(UserError, match=r"mine\.yaml"):
        load_sweep("mine", roots=roots)


def test_effective_bits_count_block_scales(roots: Roots) -> None:
    pairs = {pair.name: pair for pair in load_sweep("nightly", roots=roots).config.quant_pair}
    # 32 elements of 4 bits under one scale of 8 bits.
    assert pairs["wfp4_afp8"].effective_bits == (32 * 4 + 8) / 32
    assert pairs["wfp4_afp16"].effective_bits == 4.25
    assert {pairs[name].effective_bits for name in SEVEN[2:]} == {8.0}


def test_published_names_stay(roots: Roots) -> None:
    pairs = {pair.name: pair for pair in load_sweep("nightly", roots=roots).config.quant_pair}
    assert pairs["wint8_aint8"].scheme == "int8_autoquant_lm_default"
    assert pairs["wint8_aint8"].run_dir.format(short_name="qwen3_vl_4b", size="small") == (
        "qwen3_vl_4b_autoquant_int8_lm_small"
    )
