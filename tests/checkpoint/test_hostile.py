"""Inputs that are not as they should be, through the whole pipeline: never a wrong number."""

from __future__ import annotations

import json
import logging
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import nn

from qsens.checkpoint.groups import find_groups
from qsens.checkpoint.loading import load_model
from qsens.checkpoint.structure import Structure, structure_of
from qsens.config import ModelConfig
from qsens.errors import UserError
from qsens.pipeline.verify import verify
from tests.checkpoint.hostile import (
    WEIGHTS,
    Found,
    Tensors,
    by_hand,
    changed,
    plan_of,
    rows,
    scores,
    sweep,
    tiny_model,
    token_ids,
    write_captions,
)

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult

CAPTIONS = [
    "Four singers tune banjos in a brightly lit ballroom.",
    "Three geologists rest on a rocky slope in the early morning.",
    "Beside a quiet pond, a small crow carries a twig.",
    "A young student walks in the square on a summer day.",
]
END = "<|im_end|>"
BOTH = "quant_pair=wint8_afp16,wfp8_afp8"
# Of a static and a dynamic kind, per channel, in blocks and in blocks of blocks.
EVERY = (
    "quant_pair=wint8_afp16,wint8_aint8,wfp8_afp8,wfp4_afp16,wfp4_afp8,wint4_afp16,"
    "wnvfp4_afp16,wnvfp4_anvfp4"
)
EVERY_COUNT = 8
# Of a layer: q/k/v, o, gate/up, down. Four layers, and the head.
GROUPS = 4 * 4 + 1
EMBEDDING = "model.language_model.embed_tokens.weight"
DOWN = "model.language_model.layers.1.mlp.down_proj"
# The rounding of float32 in a difference of outputs, which by_hand does not take.
CLOSE = 3e-3


@pytest.fixture(scope="module")
def demo(demo_checkpoint: DemoResult) -> Path:
    return demo_checkpoint.directory


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_captions(tmp_path_factory.mktemp("captions"), small=CAPTIONS)


@pytest.fixture(scope="module")
def plain(demo: Path, lines: str, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Nothing hostile: what the same captions give in float32."""
    found = sweep(demo, tmp_path_factory.mktemp("plain"), lines, BOTH)
    assert found.errors == []
    assert found.published["complete"]
    return found


@pytest.fixture(scope="module")
def untied(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint with a head of its own, in which the order of the tokens is turned."""

    def own_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDING].flip(0)

    target = tmp_path_factory.mktemp("untied") / "untied"
    return changed(demo, target, config=untie, weights=own_head)


def untie(config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False


def test_there_is_nothing_wrong_with_the_plain_one(demo: Path, plain: Found) -> None:
    found = scores(plain.manifests["wint8_afp16-small"])
    assert len(found) == GROUPS
    assert found == pytest.approx(by_hand(demo, token_ids(demo, CAPTIONS), 8), rel=CLOSE)


# Tokenizers


def test_no_pad_token(demo: Path, plain: Found, lines: str, tmp_path: Path) -> None:
    copy = changed(demo, tmp_path / "copy", tokenizer=lambda config: config.pop("pad_token"))
    found = sweep(copy, tmp_path, lines, BOTH)
    assert found.errors == []
    for cell, manifest in plain.manifests.items():
        assert scores(found.manifests[cell]) == scores(manifest)


def test_the_pad_token_is_the_end_token(demo: Path, tmp_path: Path) -> None:
    """Ends that a caption really has are real tokens: they are predicted and predict."""
    captions = [f"a cat{END}", END, f"a {END} dog sits{END}{END}", "two dogs rest by a pond"]
    ids = token_ids(demo, captions)
    end = json.loads((demo / "config.json").read_text())["text_config"]["eos_token_id"]
    assert [row.count(end) for row in ids] == [1, 1, 3, 0]
    copy = changed(demo, tmp_path / "copy", tokenizer=lambda config: config.update(pad_token=END))
    found = sweep(copy, tmp_path, write_captions(tmp_path, small=captions))
    dataset = found.only().dataset
    assert dataset is not None
    assert dataset.tokens == sum(map(len, ids))
    assert dataset.label_tokens == sum(len(row) - 1 for row in ids)
    assert scores(found.only()) == pytest.approx(by_hand(demo, ids, 8), rel=CLOSE)


def test_words_for_images_in_a_caption_are_text(demo: Path, tmp_path: Path) -> None:
    captions = ["a <|image_pad|> cat", "<|video_pad|>", "two <|vision_start|> dogs", "a pond"]
    found = sweep(demo, tmp_path, write_captions(tmp_path, small=captions))
    expected = by_hand(demo, token_ids(demo, captions), 8)
    assert scores(found.only()) == pytest.approx(expected, rel=CLOSE)


# Captions


def test_one_token_captions_have_no_label(demo: Path, tmp_path: Path) -> None:
    """The first nominal batch of two has no label at all."""
    captions = ["a", "a", "a cat sits on a mat", "a"]
    ids = token_ids(demo, captions)
    assert [len(row) for row in ids].count(1) == 3
    found = sweep(
        demo, tmp_path, write_captions(tmp_path, small=captions), BOTH, "autoquant.batch_size=2"
    )
    assert found.errors == []
    manifest = found.manifests["wint8_afp16-small"]
    assert scores(manifest) == pytest.approx(by_hand(demo, ids, 2), rel=CLOSE)
    assert manifest.dataset is not None
    assert manifest.dataset.label_tokens == len(ids[2]) - 1
    for cell in found.manifests.values():
        assert all(math.isfinite(score) and score > 0 for score in scores(cell).values())
    for state in found.states.values():
        assert state["label_tokens"].tolist() == [len(row) - 1 for row in ids]
        assert not state["per_sample"][:, [0, 1, 3]].any()


@pytest.mark.parametrize("engine", ["fused", "modelopt"])
def test_without_any_label_nothing_is_measured(demo: Path, engine: str, tmp_path: Path) -> None:
    """Zeros would look like the best scores there are; the larger size has some labels."""
    chosen = write_captions(tmp_path, small=["a"] * 4, medium=["a"] * 4 + CAPTIONS)
    found = sweep(
        demo,
        tmp_path,
        chosen,
        "dataset.size=small,medium",
        "dataset.sizes.medium=8",
        f"autoquant.engine={engine}",
    )
    assert list(found.manifests) == ["wint8_afp16-medium"]
    (error,) = found.errors
    assert isinstance(error, UserError)
    assert "nothing to predict" in error.what
    assert "captions_small.txt" in error.where
    assert found.published["missing"] == [{"cell": "wint8_afp16-small", "reason": error.what}]
    assert found.published["complete"] is False


def test_long_captions_are_cut_and_counted(demo: Path, tmp_path: Path) -> None:
    ids = token_ids(demo, CAPTIONS)
    longest = sorted(map(len, ids))[2]
    found = sweep(
        demo,
        tmp_path,
        write_captions(tmp_path, small=CAPTIONS),
        f"dataset.calib_seq_len={longest}",
    )
    dataset = found.only().dataset
    assert dataset is not None
    assert dataset.truncated == sum(len(row) > longest for row in ids) == 1
    assert dataset.tokens == sum(min(len(row), longest) for row in ids)
    expected = by_hand(demo, [row[:longest] for row in ids], 8)
    assert scores(found.only()) == pytest.approx(expected, rel=CLOSE)


def test_a_caption_of_ten_thousand_characters(demo: Path, tmp_path: Path) -> None:
    captions = ["a cat " * 1667, "two dogs", "x" * 10_000, "a pond"]
    found = sweep(
        demo, tmp_path, write_captions(tmp_path, small=captions), "dataset.calib_seq_len=64"
    )
    dataset = found.only().dataset
    assert dataset is not None
    lengths = [len(row) for row in token_ids(demo, [caption.strip() for caption in captions])]
    assert dataset.truncated == sum(length > 64 for length in lengths) == 2
    assert dataset.tokens == sum(min(length, 64) for length in lengths)
    assert len(scores(found.only())) == GROUPS


def test_512_equal_captions(demo: Path, tmp_path: Path) -> None:
    """A sample's score is the same every time, whatever shares its batch."""
    caption = "a dog sits on a mat"
    (ids,) = token_ids(demo, [caption])
    found = sweep(
        demo,
        tmp_path,
        write_captions(tmp_path, small=[caption] * 16, large=[caption] * 512),
        "dataset.sizes.small=16",
        "dataset.size=small,large",
        "autoquant.score_size=512",
    )
    assert found.errors == []
    small, large = (rows(found.manifests[f"wint8_afp16-{size}"]) for size in ("small", "large"))
    # Nominal batches of eight: s / T_b^2 each.
    one = by_hand(demo, [ids], 1)
    expected = {name: 512 * score / 8**2 for name, score in one.items()}
    assert scores(found.manifests["wint8_afp16-large"]) == pytest.approx(expected, rel=CLOSE)
    for name, row in large.items():
        assert row.sensitivity == pytest.approx(32 * (small[name].sensitivity or 0), rel=1e-5)
        assert row.sensitivity_per_token == pytest.approx(
            small[name].sensitivity_per_token, rel=1e-5
        )
    per_sample = found.states["wint8_afp16-large"]["per_sample"]
    spread = per_sample.amax(dim=1) / per_sample.amin(dim=1) - 1
    assert float(spread.max()) < 1e-4


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "holds no caption"),
        (b"\r\n \r\n\t\n", "holds no caption"),
        (b"\xef\xbb\xbf", "holds no caption"),
        (b"a cat\ntwo dogs\na caf\xe9\na pond\n", "line 3 is no UTF-8 (byte 0xe9)"),
        (b"\xff\xfea\x00 \x00c\x00a\x00t\x00\n\x00", "line 1 is no UTF-8 (byte 0xff)"),
    ],
)
def test_captions_that_cannot_be_read(demo: Path, data: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        plan_of(demo, tmp_path, write_captions(tmp_path, small=data))
    assert raised.value.exit_code == 2
    assert raised.value.what == words
    assert raised.value.where.endswith("captions_small.txt")
    assert raised.value.remedy


def test_too_few_captions_are_said(demo: Path, tmp_path: Path) -> None:
    found = sweep(demo, tmp_path, write_captions(tmp_path, small=CAPTIONS[:3]))
    manifest = found.only()
    assert manifest.partial == ["3 of 4 samples of size 'small'"]
    assert manifest.dataset is not None
    assert (manifest.dataset.samples_asked, manifest.dataset.samples_used) == (4, 3)
    expected = by_hand(demo, token_ids(demo, CAPTIONS[:3]), 8)
    assert scores(manifest) == pytest.approx(expected, rel=CLOSE)
    assert found.published["complete"] is False
    cell = Path(found.published["cells"][0]["manifest"]).parent
    for report in (found.text(), (cell / "per-layer-sensitivity.md").read_text(encoding="utf-8")):
        assert "PARTIAL" in report
        assert "3 of 4 samples" in report


@pytest.mark.parametrize(
    "data",
    ["\r\n".join(CAPTIONS).encode("utf-8-sig"), "\n\n ".join(CAPTIONS).encode() + b" \r\n\r\n"],
    ids=["crlf-and-mark", "empty-lines"],
)
def test_line_ends_change_nothing(demo: Path, plain: Found, data: bytes, tmp_path: Path) -> None:
    found = sweep(demo, tmp_path, write_captions(tmp_path, small=data), BOTH)
    assert found.errors == []
    for cell, manifest in plain.manifests.items():
        ours, theirs = found.manifests[cell], manifest
        assert [row.model_dump_json() for row in ours.layer_sensitivity.values()] == [
            row.model_dump_json() for row in theirs.layer_sensitivity.values()
        ]
        assert found.states[cell].keys() == plain.states[cell].keys()
        for name, tensor in plain.states[cell].items():
            assert tensor.numpy().tobytes() == found.states[cell][name].numpy().tobytes()


# Weights


def test_zero_rows_and_a_zero_weight(demo: Path, lines: str, tmp_path: Path) -> None:
    """A scale of nothing gives no NaN; what is 0 because nothing changed is a measured 0."""
    silent = "model.language_model.layers.2.self_attn"

    def zero(tensors: Tensors) -> None:
        tensors[f"{DOWN}.weight"][3] = 0
        tensors[f"{DOWN}.weight"][:, 64:192] = 0
        tensors[f"{silent}.o_proj.weight"].zero_()

    copy = changed(demo, tmp_path / "copy", weights=zero)
    found = sweep(copy, tmp_path, lines, EVERY)
    assert found.errors == []
    assert len(found.manifests) == EVERY_COUNT
    for manifest in found.manifests.values():
        ours = scores(manifest)
        zeros = {name for name, score in ours.items() if score == 0}
        assert zeros == {f"{silent}.q_proj", f"{silent}.o_proj"}
        assert all(math.isfinite(score) for score in ours.values())
        assert manifest.partial == []
    expected = by_hand(copy, token_ids(demo, CAPTIONS), 8)
    assert scores(found.manifests["wint8_afp16-small"]) == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("gradient", "no gradient reached it"),
        ("fisher", "no gradient reached it"),
        ("kl_div", "no sample ran through it"),
    ],
)
def test_what_text_never_runs_through(
    demo: Path, plain: Found, lines: str, method: str, reason: str, tmp_path: Path
) -> None:
    """With a coverage that lets the vision tower in, captions say nothing of it: no 0 is made up.

    Its groups: the patch embedding; in each of two blocks, q/k/v, the projection and two of the
    MLP; in each of two mergers, two.
    """
    everywhere = ("model.vision_patterns=[nothing*]", "model.language_patterns=[model.*]")
    found = sweep(demo, tmp_path, lines, *everywhere, f"autoquant.method={method}")
    manifest = found.only()
    vision = {name: row for name, row in rows(manifest).items() if "visual" in name}
    assert len(vision) == 1 + 2 * 4 + 2 * 2
    for row in vision.values():
        assert (row.status, row.reason) == ("no_gradient", reason)
        assert row.sensitivity is row.importance is row.relative_error is None
    others = {name: row.sensitivity for name, row in rows(manifest).items() if name not in vision}
    if method == "gradient":
        assert others == scores(plain.manifests["wint8_afp16-small"])
    assert all(score is not None and score > 0 for score in others.values())
    (partial,) = manifest.partial
    assert partial.startswith("13 of 30 groups got no gradient, first model.visual.patch_embed")
    assert found.published["complete"] is False
    assert "PARTIAL" in found.text()
    assert not any(layer.quantized for name, layer in manifest.layers.items() if "visual" in name)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("method", ["gradient", "fisher", "kl_div"])
def test_one_weight_is_not_finite(
    demo: Path, lines: str, value: float, method: str, tmp_path: Path
) -> None:
    """It poisons every output behind it and every gradient before it: no group has a number."""

    def poison(tensors: Tensors) -> None:
        tensors[f"{DOWN}.weight"][3, 5] = value

    copy = changed(demo, tmp_path / "copy", weights=poison)
    pairs = EVERY if method == "gradient" else BOTH
    found = sweep(copy, tmp_path, lines, pairs, f"autoquant.method={method}")
    assert found.errors == []
    assert len(found.manifests) == (EVERY_COUNT if method == "gradient" else 2)
    for manifest in found.manifests.values():
        for row in rows(manifest).values():
            assert row.status == "non_finite"
            assert row.reason == (
                f"not finite, first at sample 1: {DOWN}.weight holds NaN or infinity, "
                "1 of its values"
            )
            assert row.sensitivity is row.sensitivity_per_token is row.importance is None
            assert row.relative_error is None
            assert row.scores[0] is None
        assert len(manifest.partial) == 1
        assert "17 of 17 groups got no finite score" in manifest.partial[0]
        assert not any(layer.quantized for layer in manifest.layers.values())
        assert manifest.autoquant_state.is_satisfied is False
    assert found.published["complete"] is False
    assert "PARTIAL" in found.text()


def poison_third(untied: Path, target: Path) -> Path:
    """Copy ``untied`` with the embedding of a token infinite that only the third caption has."""
    ids = token_ids(untied, CAPTIONS)
    (_, _, third, _) = ids
    token = next(
        token for token in third if sum(token in row for row in ids) == 1 and token != third[-1]
    )

    def poison(tensors: Tensors) -> None:
        tensors[EMBEDDING][token] = math.inf

    return changed(untied, target, weights=poison)


def test_one_sample_is_not_finite(untied: Path, tmp_path: Path) -> None:
    """The third sample is named, and what does not read it stays as it is without it."""
    copy = poison_third(untied, tmp_path / "copy")
    chosen = write_captions(tmp_path, small=CAPTIONS[:2], medium=CAPTIONS)
    sizes = ["dataset.sizes.small=2", "dataset.sizes.medium=4"]
    found = sweep(copy, tmp_path / "poisoned", chosen, *sizes, BOTH, "dataset.size=small,medium")
    clean = sweep(untied, tmp_path / "clean", chosen, *sizes, BOTH)
    assert found.errors == clean.errors == []
    for pair in ("wint8_afp16", "wfp8_afp8"):
        ours, theirs = (each.manifests[f"{pair}-small"] for each in (found, clean))
        assert scores(ours) == pytest.approx(scores(theirs), rel=1e-6)
        for name, row in rows(theirs).items():
            assert rows(ours)[name].relative_error == pytest.approx(row.relative_error, rel=1e-6)
        assert ours.partial == []
        whole = rows(found.manifests[f"{pair}-medium"])
        assert {row.status for row in whole.values()} == {"non_finite"}
    # Nothing of the weights alone is calibrated: the samples around the third have their scores.
    whole = rows(found.manifests["wint8_afp16-medium"])
    (reason,) = {row.reason for row in whole.values()}
    assert reason.startswith(f"not finite, first at sample 3: {EMBEDDING} holds NaN or infinity, ")
    finite = found.states["wint8_afp16-medium"]["per_sample"].isfinite().all(dim=0)
    assert finite.tolist() == [True, True, False, True]


def test_the_other_engine_refuses_what_is_not_finite(untied: Path, tmp_path: Path) -> None:
    copy = poison_third(untied, tmp_path / "copy")
    chosen = write_captions(tmp_path, small=CAPTIONS)
    found = sweep(copy, tmp_path, chosen, "autoquant.engine=modelopt")
    (error,) = found.errors
    assert isinstance(error, UserError)
    assert error.what.startswith("ModelOpt refuses it: ")
    assert "autoquant.engine=fused" in error.remedy
    assert found.published["complete"] is False


def test_sizes_that_blocks_do_not_divide(demo: Path, lines: str, tmp_path: Path) -> None:
    """Inputs of 48 under blocks of 32 and of 128: the last block is filled up, as ModelOpt does."""
    model = tiny_model(tmp_path / "tiny", demo, hidden_size=48, intermediate_size=48)
    blocks = "quant_pair=wfp4_afp16,wint4_afp16,wnvfp4_anvfp4"
    plan = plan_of(model, tmp_path, lines, blocks)
    for cell in plan.cells:
        result = verify(plan, cell.cell, tolerance=1e-3)
        assert result["agrees"], result
    found = sweep(model, tmp_path, lines, blocks)
    assert found.errors == []
    for manifest in found.manifests.values():
        assert len(scores(manifest)) == 4 + 1
        assert all(score > 0 for score in scores(manifest).values())


def test_tied_and_untied_heads(
    demo: Path, plain: Found, untied: Path, lines: str, tmp_path: Path
) -> None:
    """The head is scored on the weight that it has: the embedding's, or its own."""

    def same(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()

    copy = changed(demo, tmp_path / "copy", config=untie, weights=same)
    tied = scores(plain.manifests["wint8_afp16-small"])
    assert scores(sweep(copy, tmp_path, lines).only()) == tied
    own = scores(sweep(untied, tmp_path, lines).only())
    assert own == pytest.approx(by_hand(untied, token_ids(untied, CAPTIONS), 8), rel=CLOSE)
    assert own["lm_head"] != pytest.approx(tied["lm_head"], rel=0.1)


# Checkpoints


@pytest.mark.parametrize("kept", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_data_types(
    demo: Path,
    plain: Found,
    lines: str,
    kept: str,
    dtype: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As kept in the file and as loaded: the model file alone says in which it is scored."""

    def cast(tensors: Tensors) -> None:
        tensors.update({name: value.to(getattr(torch, kept)) for name, value in tensors.items()})

    copy = changed(
        demo, tmp_path / "copy", config=lambda config: config.update(dtype=kept), weights=cast
    )
    with caplog.at_level(logging.WARNING, logger="qsens"):
        found = sweep(copy, tmp_path, lines, BOTH, f"model.dtype={dtype}")
    assert found.errors == []
    for cell, manifest in plain.manifests.items():
        ours, theirs = scores(found.manifests[cell]), scores(manifest)
        assert found.manifests[cell].model.dtype == dtype
        assert all(math.isfinite(score) and score > 0 for score in ours.values())
        correlation = spearmanr([ours[name] for name in theirs], list(theirs.values()))
        assert correlation.statistic > 0.9
    slow = [record for record in caplog.records if "slow" in record.getMessage()]
    assert bool(slow) == (dtype == "bfloat16")


class Old(nn.Module):
    """Names as they were before the language model got a level of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = tower()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([layer()])
        self.lm_head = nn.Linear(4, 4)


class New(nn.Module):
    """The same modules under the names of today."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.visual = tower()
        self.model.language_model = nn.Module()
        self.model.language_model.layers = nn.ModuleList([layer()])
        self.lm_head = nn.Linear(4, 4)


def tower() -> nn.Module:
    block = nn.Module()
    block.attn = nn.ModuleDict({"qkv": nn.Linear(4, 12), "proj": nn.Linear(4, 4)})
    found = nn.Module()
    found.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, 4, 2, stride=2)})
    found.blocks = nn.ModuleList([block])
    return found


def layer() -> nn.Module:
    found = nn.Module()
    found.self_attn = nn.ModuleDict(
        {name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    )
    return found


def test_a_vision_tower_under_either_name(demo: Path) -> None:
    loaded = load_model(ModelConfig(path=demo, dtype="float32"), torch.device("cpu"))
    structure = structure_of("qwen3_vl")
    assert isinstance(structure, Structure)
    text = {Old: "model.layers.0", New: "model.language_model.layers.0"}
    for model in (Old(), New(), loaded):
        groups = find_groups(model, structure.vision)
        vision = [group for group in groups if group.kind == "vision"]
        assert [group.covered for group in groups] == [group not in vision for group in groups]
        if model is loaded:
            assert (len(vision), len(groups)) == (1 + 2 * 4 + 2 * 2, 13 + GROUPS)
            continue
        assert len(vision) == 3
        prefix = text[type(model)]
        assert [group.name for group in groups if group.covered] == [
            f"{prefix}.self_attn.q_proj",
            f"{prefix}.self_attn.o_proj",
            "lm_head",
        ]


@pytest.mark.parametrize(
    ("kind", "words"),
    [("qwen9_vl", "model type 'qwen9_vl'"), (None, "model type 'unknown'")],
)
def test_transformers_is_too_old(
    demo: Path, lines: str, kind: str | None, words: str, tmp_path: Path
) -> None:
    import transformers

    def rename(config: dict[str, Any]) -> None:
        config["model_type"] = kind
        if kind is None:
            del config["model_type"]

    parts = ("model.language_patterns=[model.language_model.*]", "model.head_patterns=[lm_head]")
    found = sweep(changed(demo, tmp_path / "copy", config=rename), tmp_path, lines, *parts)
    (error,) = found.errors
    assert error.exit_code == 2
    assert f"transformers {transformers.__version__} cannot load {words}" in error.what
    assert "\n" not in error.what
    assert "newer transformers" in error.remedy
    assert [entry["reason"] for entry in found.published["missing"]] == [error.what]


def test_a_shard_is_missing(demo: Path, tmp_path: Path) -> None:
    copy = changed(demo, tmp_path / "copy")
    tensors = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).unlink()
    files = {name: f"model-{index % 3}.safetensors" for index, name in enumerate(sorted(tensors))}
    for shard in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == shard}, copy / shard)
    index = {"metadata": {}, "weight_map": files}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    plan_of(copy, tmp_path)
    (copy / "model-1.safetensors").unlink()
    with pytest.raises(UserError) as raised:
        plan_of(copy, tmp_path)
    assert raised.value.what == "1 of 3 weight files are missing, first model-1.safetensors"
    assert raised.value.exit_code == 2


def test_pickles_alone(demo: Path, tmp_path: Path) -> None:
    copy = changed(demo, tmp_path / "copy")
    (copy / WEIGHTS).rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickle \(\.bin\) only") as raised:
        plan_of(copy, tmp_path)
    assert "save_pretrained" in raised.value.remedy
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("missing", [f"{DOWN}.weight", "model.language_model.norm.weight"])
def test_a_weight_is_missing(demo: Path, lines: str, missing: str, tmp_path: Path) -> None:
    copy = changed(demo, tmp_path / "copy", weights=lambda tensors: tensors.pop(missing))
    found = sweep(copy, tmp_path, lines)
    (error,) = found.errors
    assert isinstance(error, UserError)
    assert error.what == f"1 weights are missing, the first is {missing}"
    assert found.manifests == {}


def test_an_untied_head_is_missing(demo: Path, lines: str, tmp_path: Path) -> None:
    found = sweep(changed(demo, tmp_path / "copy", config=untie), tmp_path, lines)
    (error,) = found.errors
    assert error.what == "1 weights are missing, the first is lm_head.weight"


def test_a_weight_of_another_shape(demo: Path, lines: str, tmp_path: Path) -> None:
    def cut(tensors: Tensors) -> None:
        tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"][:, :128]

    found = sweep(changed(demo, tmp_path / "copy", weights=cut), tmp_path, lines)
    (error,) = found.errors
    assert isinstance(error, UserError)
    assert f"{DOWN}.weight: (128, 128) where (128, 384) is said" in error.what
    assert found.manifests == {}


# Callers


@pytest.mark.parametrize("context", [torch.no_grad(), torch.inference_mode()], ids=["no", "infer"])
@pytest.mark.parametrize("method", ["gradient", "fisher", "kl_div"])
def test_a_caller_that_wants_no_gradients(
    demo: Path,
    plain: Found,
    lines: str,
    context: AbstractContextManager[None],
    method: str,
    tmp_path: Path,
) -> None:
    with context:
        found = sweep(demo, tmp_path / "within", lines, BOTH, f"autoquant.method={method}")
        assert not torch.is_grad_enabled()
    assert found.errors == []
    if method != "gradient":
        plain = sweep(demo, tmp_path / "without", lines, BOTH, f"autoquant.method={method}")
    for cell, manifest in plain.manifests.items():
        assert scores(found.manifests[cell]) == scores(manifest)


def test_the_other_engine_in_inference_mode(demo: Path, lines: str, tmp_path: Path) -> None:
    with torch.inference_mode():
        found = sweep(demo, tmp_path, lines, "autoquant.engine=modelopt")
    expected = by_hand(demo, token_ids(demo, CAPTIONS), 8)
    assert scores(found.only()) == pytest.approx(expected, rel=CLOSE)
