"""Packed checkpoints of the demo checkpoint's recipes: whole, resumed, refused, verified."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from qsens.config import Roots
from qsens.errors import DiskFull, UserError
from qsens.numerics import fake_quantize
from qsens.pipeline import export as step
from qsens.pipeline.export import RECIPE, export_checkpoint
from qsens.schema.recipe import read_recipe
from tests import disks

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult

pytest.importorskip("compressed_tensors")

REPO = Path(__file__).resolve().parents[2]
FORMATS = (
    "wint8_aint8-ct_token,wfp8_afp8-ct,wnvfp4_anvfp4-ct,wint4_afp16-ct_group64_asym,"
    "wint8_afp16-ct_channel,wfp8_afp16"
)
WEIGHT_ONLY = "wint4_afp16-ct_group64_asym,wint8_afp16-ct_channel"
QUIET: Callable[..., None] = lambda *_: None  # noqa: E731


@dataclass
class Swept:
    """A sweep of a checkpoint in several files, and recipes of it."""

    root: Path
    checkpoint: Path
    sweep_id: str = ""

    @property
    def roots(self) -> Roots:
        return Roots(root=REPO, results=self.root / "results", configs=(REPO / "configs",))

    def run(self, *words: str, code: int = 0) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "qsens", *words, "--json"],
            env={
                **os.environ,
                "QSENS_ROOT": str(REPO),
                "QSENS_RESULTS": str(self.root / "results"),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)

    def recipe(self, name: str, bits: float, pairs: str, *words: str) -> Path:
        path = self.root / f"{name}.json"
        options = ("--bits", str(bits), "--pairs", pairs, "--to", "json", "--out", str(path))
        self.run("recipe", self.sweep_id, *options, *words)
        return path

    def export(self, recipe: Path, directory: Path) -> dict[str, Any]:
        return export_checkpoint(recipe, directory, progress=QUIET, roots=self.roots)


@pytest.fixture(scope="module")
def swept(demo_checkpoint: DemoResult, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    root = tmp_path_factory.mktemp("export")
    made = Swept(root, root / "demo")
    shutil.copytree(demo_checkpoint.directory, made.checkpoint)
    (made.checkpoint / "model.safetensors").unlink()
    model = AutoModelForImageTextToText.from_pretrained(demo_checkpoint.directory)
    model.save_pretrained(made.checkpoint, max_shard_size="3MB")
    words = ("demo-text", f"model.path={made.checkpoint}", f"quant_pair={FORMATS}")
    found = made.run("sweep", *words, "dataset.size=small", "autoquant.method=fisher")
    made.sweep_id = found["sweep_id"]
    return made


@pytest.fixture(scope="module")
def mixed(swept: Swept) -> Path:
    """A recipe with all of those formats, by keeping each pair's share; the head too."""
    return swept.recipe("mixed", 6.0, FORMATS.removesuffix(",wfp8_afp16"), "--tied-head")


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_a_recipe_of_every_kind_is_packed_and_verified(
    swept: Swept, mixed: Path, tmp_path: Path
) -> None:
    target = tmp_path / "packed"
    written = swept.run("export", str(mixed), str(target), "--verify")
    assert written["verified"]["agrees"]
    assert written["verified"]["faked"] > 0
    recipe = read_recipe(mixed)
    assert len(recipe.formats) > 1
    names = {path.name for path in target.iterdir()}
    beside = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", RECIPE}
    assert names >= beside | {"config.json", "generation_config.json", "preprocessor_config.json"}
    assert len([name for name in names if name.endswith(".safetensors")]) > 2
    assert not any(name.startswith(".") for name in names)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(target).keys()
    sizes = [file.stat().st_size for file in target.glob("*.safetensors")]
    assert written["weight_bytes"] == index["metadata"]["total_size"] == sum(sizes)
    for name in beside - {RECIPE}:
        assert (target / name).read_bytes() == (swept.checkpoint / name).read_bytes()
    assert (target / RECIPE).read_bytes() == mixed.read_bytes()
    # What is not quantized is as it was.
    before, after = tensors(swept.checkpoint), tensors(target)
    chosen = {m for c in recipe.choices if c.format is not None for m in c.members}
    kept = {name for name in before if name.removesuffix(".weight") not in chosen}
    assert "model.visual.blocks.0.attn.proj.weight" in kept
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_the_fewest_bits_within_a_divergence(swept: Swept, mixed: Path) -> None:
    """Between the bits that a bit more, and a bit less, KL would do with."""
    at_six = read_recipe(mixed)
    words = ("--pairs", FORMATS.removesuffix(",wfp8_afp16"), "--tied-head", "--to", "json")

    def within(most: float) -> dict[str, Any]:
        found: dict[str, Any] = swept.run(
            "recipe", swept.sweep_id, "--max-kl", f"{most:.12g}", *words
        )
        return found

    same = within(at_six.damage * (1 + 1e-9))
    assert same["bits"] <= at_six.bits * (1 + 1e-9)
    assert same["damage"] <= at_six.damage * (1 + 1e-6)
    assert same["max_kl"] == pytest.approx(at_six.damage)
    less, more = within(at_six.damage / 2), within(at_six.damage * 2)
    assert more["bits"] < same["bits"] < less["bits"]
    assert less["damage"] <= at_six.damage / 2
    assert within(0.0)["bits"] == 16.0
    assert (
        "the fewest within"
        in swept.run(
            "recipe", swept.sweep_id, "--max-kl", "1", "--to", "llm-compressor", *words[:3]
        )["recipe"]
    )


def test_a_tied_head_becomes_a_weight_of_its_own(swept: Swept, tmp_path: Path) -> None:
    recipe = swept.recipe("head", 8.0, "wint8_afp16-ct_channel", "--tied-head")
    swept.export(recipe, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    found = tensors(tmp_path / "packed")
    embedding = found["model.language_model.embed_tokens.weight"]
    step_ = embedding.abs().amax(1, keepdim=True) / 127.5
    assert torch.equal(found["lm_head.weight_scale"], step_)
    assert found["lm_head.weight_packed"].dtype == torch.int32


def test_the_weights_that_transformers_loads_are_those_that_were_scored(
    swept: Swept, tmp_path: Path
) -> None:
    from transformers.utils.quantization_config import CompressedTensorsConfig

    path = swept.recipe("only", 5.5, WEIGHT_ONLY, "--tied-head")
    swept.export(path, tmp_path / "packed")
    packed = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "packed",
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(run_compressed=False),
    )
    original = AutoModelForImageTextToText.from_pretrained(swept.checkpoint, dtype=torch.float32)
    recipe = read_recipe(path)
    compared = 0
    for choice in recipe.choices:
        for member in choice.members:
            expected = original.get_submodule(member).weight
            if choice.format is not None:
                cfg = recipe.formats[choice.format].weight_quantizer.cfg()
                expected = fake_quantize(expected.detach(), cfg)
                compared += 1
            assert torch.equal(packed.get_submodule(member).weight, expected)
    assert compared > 20
    assert len(recipe.formats) == 2


def test_what_was_scored_in_16_bits_is_packed_in_16_bits(swept: Swept, tmp_path: Path) -> None:
    words = ("demo-text", f"model.path={swept.checkpoint}", "quant_pair=wint4_afp16-ct_group64")
    found = swept.run("sweep", *words, "dataset.size=small", "model.dtype=bfloat16")
    path = tmp_path / "recipe.json"
    options = ("--bits", "6", "--to", "json", "--out", str(path))
    swept.run("recipe", found["sweep_id"], *options)
    written = swept.run("export", str(path), str(tmp_path / "packed"), "--verify")
    assert written["verified"]["agrees"]
    assert written["verified"]["difference"] < 1e-4 * written["verified"]["largest"]
    packed = tensors(tmp_path / "packed")
    assert {t.dtype for t in packed.values() if t.ndim > 1 and t.is_floating_point()} == {
        torch.bfloat16
    }
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["text_config"]["dtype"] == "bfloat16"


def test_a_run_that_was_ended_goes_on_where_it_was(
    swept: Swept, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qsens.export import shards

    whole, target = tmp_path / "whole", tmp_path / "packed"
    swept.export(mixed, whole)
    save, saved = shards.save_file, []

    def ends(*args: Any, **words: Any) -> None:
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(args[1])
        save(*args, **words)

    monkeypatch.setattr(shards, "save_file", ends)
    with pytest.raises(KeyboardInterrupt):
        swept.export(mixed, target)
    assert not target.exists()
    (half,) = tmp_path.glob(".packed*export")
    first = {file: file.stat().st_mtime_ns for file in half.glob("*.safetensors")}
    assert len(first) == 2
    written: list[Path] = []
    monkeypatch.setattr(
        shards, "save_file", lambda *args, **words: (written.append(args[1]), save(*args, **words))
    )
    swept.export(mixed, target)
    assert len(written) == len(list(whole.glob("*.safetensors"))) - 2
    assert {target / file.name: time for file, time in first.items()} == {
        target / file.name: (target / file.name).stat().st_mtime_ns for file in first
    }
    assert not list(tmp_path.glob(".packed*export"))
    for file in whole.iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes(), file.name


def test_what_another_recipe_left_half_done_is_not_gone_on_with(
    swept: Swept, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qsens.export import shards

    other, target = swept.recipe("other", 9.0, "wint8_afp16-ct_channel"), tmp_path / "packed"
    with monkeypatch.context() as patched:
        patched.setattr(step, "served_files", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            swept.export(other, target)
    assert shards.save_file is not None
    swept.export(mixed, target)
    swept.export(mixed, tmp_path / "whole")
    for file in (tmp_path / "whole").iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("what", ["file", "directory"])
def test_nothing_is_written_over(swept: Swept, mixed: Path, tmp_path: Path, what: str) -> None:
    target = tmp_path / "packed"
    if what == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine").write_text("mine")
    with pytest.raises(UserError, match="holds something already; nothing was written"):
        swept.export(mixed, target)
    held = target if what == "file" else target / "mine"
    assert held.read_text() == "mine"


def test_a_full_disk_loses_nothing(swept: Swept, mixed: Path, tmp_path: Path) -> None:
    with disks.small(tmp_path / "disk", "4m"):
        with pytest.raises(DiskFull):
            swept.export(mixed, tmp_path / "disk" / "packed")
        assert not (tmp_path / "disk" / "packed").exists()
        (half,) = (tmp_path / "disk").glob(".packed*export")
        assert list(half.glob("*.safetensors"))
        assert not list(half.glob("*.tmp"))
        for file in half.glob("*.safetensors"):
            assert load_file(file)


def test_without_what_packs_it_says_what_to_install(
    swept: Swept, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(step, "version", lost)
    with pytest.raises(UserError, match=r"pip install 'qsens\[export\]'"):
        swept.export(mixed, tmp_path / "packed")


def test_modelopt_is_not_given_what_it_does_not_compute(swept: Swept) -> None:
    words = ("--bits", "9", "--to", "modelopt")
    found = swept.run("recipe", swept.sweep_id, *words)
    assert {entry["format"] for entry in found["formats"]} <= {"wfp8_afp16", None}
    reasons = {entry["format"]: entry["reason"] for entry in found["left_out"]}
    assert "its reference is compressed-tensors" in reasons["wint8_aint8-ct_token"]


def test_what_a_server_loads_is_chosen_and_packed(swept: Swept, tmp_path: Path) -> None:
    pairs = FORMATS.removesuffix(",wfp8_afp16")
    recipe = swept.recipe("served", 9.0, pairs, "--for", "vllm", "--gpu", "ampere")
    written = swept.export(recipe, tmp_path / "packed")
    assert written["modules"] > 10
    chosen = read_recipe(recipe)
    # No FP8 products before Ada, and its shards of 64 and 128 columns are those of groups of 64.
    assert "wfp8_afp8-ct" in chosen.formats or chosen.left_out or chosen.notices
    assert chosen.runtime is not None
    assert (chosen.runtime.name, chosen.runtime.gpu) == ("vllm", "ampere")


def test_a_format_of_modelopt_is_refused(swept: Swept, tmp_path: Path) -> None:
    recipe = swept.recipe("modelopt", 9.0, "wfp8_afp16")
    with pytest.raises(UserError, match="wfp8_afp16 is of ModelOpt's scales"):
        swept.export(recipe, tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_changed_is_refused(swept: Swept, mixed: Path, tmp_path: Path) -> None:
    file = swept.checkpoint / "config.json"
    held = file.read_text()
    try:
        file.write_text(held + "\n")
        with pytest.raises(UserError, match="is not the checkpoint of the recipe"):
            swept.export(mixed, tmp_path / "packed")
    finally:
        file.write_text(held)


def test_a_packed_weight_that_is_not_what_was_measured_is_found(
    swept: Swept, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    recipe = swept.recipe("spoilt", 9.0, "wint8_afp16-ct_channel")
    swept.export(recipe, tmp_path / "packed")
    for file in (tmp_path / "packed").glob("*.safetensors"):
        held = load_file(file)
        name = next((name for name in held if name.endswith("down_proj.weight_scale")), None)
        if name is not None:
            held[name] *= 1.5
            save_file(held, file, metadata={"format": "pt"})
            break
    found = swept.run("export", str(recipe), str(tmp_path / "packed"), "--verify", code=3)
    assert not found["verified"]["agrees"]
    assert found["verified"]["packed"] > 2 * found["verified"]["faked"]
