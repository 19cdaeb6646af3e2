"""Recipes from a real sweep of the demo checkpoint, through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from qsens.config import Roots
from qsens.documents import dump_document
from qsens.published import find_sweep

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult

REPO = Path(__file__).resolve().parents[2]
PAIRS = "wfp8_afp8,wint8_afp16,wfp4_afp16,wint4_afp16"


@dataclass
class Sweep:
    """A published sweep."""

    results: Path
    directory: Path

    def run(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "qsens", *words],
            env={
                **os.environ,
                "QSENS_ROOT": str(REPO),
                "QSENS_RESULTS": str(self.results),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == code, done.stderr
        return done

    def json(self, *words: str, code: int = 0) -> Any:
        return json.loads(self.run("recipe", *words, "--json", code=code).stdout)


@pytest.fixture(scope="module")
def sweep(demo_checkpoint: DemoResult, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    made = Sweep(tmp_path_factory.mktemp("recipe"), Path())
    done = made.run(
        "sweep",
        "demo-text",
        f"model.path={demo_checkpoint.directory}",
        f"quant_pair={PAIRS}",
        "dataset.size=small,medium",
        "--json",
    )
    made.directory = Path(json.loads(done.stdout)["index"]).parent
    return made


def test_the_recipe_is_the_sum_of_its_rows(sweep: Sweep, tmp_path: Path) -> None:
    out = tmp_path / "recipe.json"
    answer = sweep.json(str(sweep.directory), "--bits", "6", "--to", "json", "--out", str(out))
    assert answer["path"] == str(out)
    assert "recipe" not in answer
    recipe = json.loads(out.read_text())
    summary = json.loads((sweep.directory / "summary.json").read_text())
    rows = {
        (cell["pair"], row["layer"]): row
        for cell in summary["cells"]
        if cell["size"] == "medium"
        for row in cell["rows"]
    }
    used = total = damage = 0.0
    for choice in recipe["choices"]:
        (group,) = choice["groups"]
        weights = rows["wfp8_afp8", group]["size_cost"] * 2  # 16-bit words at 8 bits
        total += weights
        if choice["format"] is None:
            used += 16 * weights
            continue
        row = rows[choice["format"], group]
        used += row["num_bits"] * weights
        damage += row["sensitivity"]
    assert len(recipe["choices"]) == 17
    assert recipe["bits"] == answer["bits"] == pytest.approx(used / total)
    assert recipe["damage"] == pytest.approx(damage)
    assert 5.5 < recipe["bits"] <= 6
    assert [c["groups"] for c in recipe["choices"] if c["format"] is None] == [["lm_head"]]
    assert any("tied" in notice for notice in recipe["notices"])
    assert all(name.startswith("model.visual.") for name in recipe["outside"])
    # The curve in the summary is that of the same search.
    curve = [(point["bits"], point["damage"]) for point in summary["pareto"]]
    assert curve[-1] == (16.0, 0.0)
    below = [point for point in curve if point[0] <= recipe["bits"]]
    above = [point for point in curve if point[0] >= recipe["bits"]]
    assert above[0][1] <= recipe["damage"] <= below[-1][1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--bits, --max-kl: names no target"),
        (("--bits", "6", "--max-kl", "0.1"), "--bits, --max-kl: names two targets"),
        (("--max-kl", "-1"), "-1 nats a token are no target"),
        (("--max-kl", "0.1"), "its scores are no KL divergence (method gradient)"),
        (("--max-kl", "0.1", "--worst-case"), "--max-kl with --worst-case"),
    ],
)
def test_a_target_is_one_that_the_sweep_knows(
    sweep: Sweep, words: tuple[str, ...], said: str
) -> None:
    done = sweep.run("recipe", str(sweep.directory), "--to", "json", *words, code=2)
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 2


def test_an_infeasible_target_names_the_nearest(sweep: Sweep) -> None:
    answer = sweep.json(str(sweep.directory), "--bits", "4.5", "--to", "modelopt", code=3)
    assert answer["error"] == "AnswerIsNo"
    # The head, 131072 of 1114112 weights, is tied and stays at 16 bits; the rest takes 4.125.
    nearest = (131072 * 16 + 983040 * 4.125) / 1114112
    named = float(answer["remedy"].split()[2])
    assert nearest <= named <= nearest + 1e-4
    words = (str(sweep.directory), "--bits", str(named), "--to", "modelopt")
    assert sweep.json(*words)["bits"] == pytest.approx(nearest)
    free = sweep.json(str(sweep.directory), "--bits", "4.5", "--to", "modelopt", "--tied-head")
    assert free["bits"] <= 4.5
    (notice,) = free["notices"]
    assert notice.startswith("1 quantized module matches *lm_head*, which ModelOpt's presets leave")


def test_size_pairs_and_keep(sweep: Sweep) -> None:
    words = (str(sweep.directory), "--bits", "10", "--to", "json")
    kept = sweep.json(
        *words, "--size", "small", "--pairs", "wfp8_afp8,wfp4_afp16", "--keep", "*layers.0.*"
    )
    assert kept["size"] == "small"
    recipe = json.loads(kept["recipe"])
    for choice in recipe["choices"]:
        unquantized = choice["depth"] == 0 or choice["kind"] == "head"
        assert choice["format"] in (None, "wfp8_afp8", "wfp4_afp16")
        assert not unquantized or choice["format"] is None
    assert "matches no group" in sweep.json(*words, "--keep", "nothing", code=2)["what"]
    assert "no pair 'wnone'" in sweep.json(*words, "--pairs", "wnone", code=2)["what"]
    for bits in ("0", "-1", "nan", "17"):
        wrong = sweep.json(str(sweep.directory), "--bits", bits, "--to", "json", code=2)
        assert wrong["where"] == "--bits"
    assert "no result of size 'large'" in sweep.json(*words, "--size", "large", code=2)["what"]


def test_text_goes_to_stdout_and_is_what_the_tool_reads(sweep: Sweep) -> None:
    words = ("recipe", str(sweep.directory / "summary.json"), "--bits", "6", "--to")
    config = yaml.safe_load(sweep.run(*words, "modelopt").stdout)
    named = {entry["quantizer_name"] for entry in config["quant_cfg"][1:]}
    assert "model.language_model.layers.0.self_attn.q_proj.weight_quantizer" in named
    assert not any("lm_head" in name for name in named)
    (stage,) = yaml.safe_load(sweep.run(*words, "llm-compressor").stdout).values()
    modifier = stage["quantization_modifiers"]["QuantizationModifier"]
    targets = [name for group in modifier["config_groups"].values() for name in group["targets"]]
    assert len(targets) == len(set(targets)) == 4 * 7
    assert "lm_head" in modifier["ignore"]


def test_a_recipe_for_a_runtime_states_it(sweep: Sweep) -> None:
    words = (str(sweep.directory), "--bits", "10", "--to", "json")
    found = sweep.json(*words, "--for", "vllm", "--gpu", "hopper", "--tensor-parallel", "2")
    stated = {"name": "vllm", "version": "0.32", "gpu": "hopper", "tensor_parallel": 2}
    assert found["runtime"] == json.loads(found["recipe"])["runtime"] == stated
    # The demo's down_proj has 384 columns, and 192 of them on each GPU are a group and a half.
    (left,) = found["left_out"]
    assert left["format"] == "wint4_afp16"
    assert left["reason"].startswith("vLLM 0.32: 192 columns on each of 2 GPUs do not divide")
    assert left["modules"] == [f"model.language_model.layers.{at}.mlp.down_proj" for at in range(4)]
    assert sweep.json(*words)["runtime"] is None
    # INT8 weights without activations have no kernel on CPUs, nor has MXFP4.
    cpu = sweep.json(*words, "--for", "vllm", "--gpu", "cpu", "--pairs", "wint8_afp16,wint4_afp16")
    (left,) = cpu["left_out"]
    assert left["format"] == "wint8_afp16"
    assert left["reason"].startswith("vLLM 0.32 does not run it on cpu, but on turing, ampere")
    # Where a generation runs something else, or none was named, it is said.
    words = (str(sweep.directory), "--bits", "9", "--to", "json", "--pairs", "wfp4_afp16")
    there = sweep.json(*words, "--for", "vllm", "--gpu", "blackwell")
    said = "wfp4_afp16: vLLM 0.32: on blackwell it runs with MXFP4 activations"
    assert said in there["notices"]
    anywhere = sweep.json(*words, "--for", "vllm")["notices"]
    assert "wfp4_afp16: vLLM 0.32: it runs with MXFP4 activations on blackwell" in anywhere
    assert "wfp4_afp16: vLLM 0.32 does not run it on turing, cpu" in anywhere
    # For llm-compressor, what vLLM does is said, whoever serves it.
    packed = sweep.json(*words[:3], "--to", "llm-compressor", "--pairs", "wfp4_afp16")
    assert "wfp4_afp16: vLLM 0.32: it runs with MXFP4 activations on blackwell" in packed["notices"]
    assert packed["runtime"] is None
    # TensorRT-LLM is known by what ModelOpt writes.
    other = sweep.json(*words[:3], "--to", "llm-compressor", "--for", "tensorrt_llm")
    assert any("layout of modelopt" in notice for notice in other["notices"])


def test_a_runtime_that_cannot_be_asked_for_is_one_message(sweep: Sweep) -> None:
    words = (str(sweep.directory), "--bits", "10", "--to", "json")
    unknown = sweep.json(*words, "--for", "vlm", code=2)
    assert (unknown["where"], unknown["what"]) == ("--for", "unknown runtime 'vlm'")
    for option, value in (("--gpu", "hopper"), ("--tensor-parallel", "2")):
        alone = sweep.json(*words, option, value, code=2)
        assert alone["where"] == option
        assert "--for sglang, tensorrt_llm, transformers, vllm" in alone["remedy"]
    cut = sweep.json(*words, "--for", "transformers", "--tensor-parallel", "2", code=2)
    assert cut["where"] == "--tensor-parallel"
    wrong = sweep.run("recipe", *words, "--for", "vllm", "--gpu", "volta", code=2)
    assert "'turing'" in wrong.stderr
    none = sweep.json(*words, "--for", "vllm", "--gpu", "cpu", "--pairs", "wint8_afp16", code=2)
    assert none["what"].startswith("none of its pairs can be given to vllm 0.32 on cpu: ")


def test_an_infeasible_target_for_a_runtime_names_the_nearest(sweep: Sweep) -> None:
    words = (str(sweep.directory), "--to", "json", "--for", "tensorrt_llm", "--gpu", "ada")
    # FP4 weights have no kernel there, and INT4 in groups of 128 has.
    answer = sweep.json(*words, "--bits", "4.5", code=3)
    nearest = (131072 * 16 + 983040 * 4.125) / 1114112
    assert float(answer["remedy"].split()[2]) == pytest.approx(nearest, abs=1e-4)
    assert "wfp4_afp16: TensorRT-LLM main of 2026-11 does not run it on ada" in answer["remedy"]


def test_a_check_measures_on_captions_that_were_not_used(sweep: Sweep, tmp_path: Path) -> None:
    used = (REPO / "configs/dataset/demo/captions_medium.txt").read_text()
    (tmp_path / "used.txt").write_text(used)
    words = (str(sweep.directory), "--bits", "10", "--to", "json", "--check")
    none_left = sweep.json(*words, "--captions", str(tmp_path / "used.txt"), code=2)
    assert "--captions" in none_left["remedy"]

    largest = (REPO / "configs/dataset/demo/captions_large.txt").read_text().splitlines()
    new = [line for line in largest if line not in used.splitlines()][:12]
    (tmp_path / "some.txt").write_text(used + "\n".join(new) + "\n")
    # At 16 bits nothing is quantized: the divergence is exactly 0, and nothing is better.
    none = (str(sweep.directory), "--bits", "16", "--to", "json", "--check")
    some = ("--pairs", "wfp8_afp8,wfp4_afp16", "--captions", str(tmp_path / "some.txt"))
    checked = sweep.json(*none, *some)["check"]
    assert checked["captions"] == 12
    recipe, fp8, fp4, theirs = checked["measured"]
    assert (recipe["name"], recipe["bits"], recipe["divergence"]) == ("recipe", 16.0, 0.0)
    assert (fp8["name"], fp4["name"], theirs["name"]) == ("wfp8_afp8", "wfp4_afp16", "ModelOpt")
    # The tied head, 131072 of 1114112 weights, stays at 16 bits.
    assert fp8["bits"] == pytest.approx((131072 * 16 + 983040 * 8) / 1114112)
    assert 0 < fp8["divergence"] < fp4["divergence"]
    assert checked["better"] == []
    # By the proxy there is no prediction in nats.
    assert recipe["predicted"] is None


def test_a_recipe_that_a_single_pair_beats_is_told_with_exit_code_3(
    sweep: Sweep, tmp_path: Path
) -> None:
    # As if 8 bits hurt and 4 bits did not: the recipe is 4 bits everywhere.
    summary = json.loads((sweep.directory / "summary.json").read_text())
    for cell in summary["cells"]:
        for row in cell["rows"]:
            if row["sensitivity"] is not None:
                row["sensitivity"] = 1.0 if cell["pair"] == "wfp8_afp8" else 0.0
    (tmp_path / "summary.json").write_text(dump_document(summary))
    (tmp_path / "plan.json").write_bytes((sweep.directory / "plan.json").read_bytes())
    (tmp_path / "some.txt").write_text("A red cube on a table.\nTwo green balls in a box.\n")
    words = (str(tmp_path), "--bits", "9", "--to", "json", "--pairs", "wfp8_afp8,wfp4_afp16")
    checked = sweep.json(*words, "--check", "--captions", str(tmp_path / "some.txt"), code=3)
    assert "wfp8_afp8" in checked["check"]["better"]


def test_a_sweep_by_its_id(sweep: Sweep) -> None:
    roots = Roots(root=REPO, results=sweep.results, configs=())
    assert find_sweep(sweep.directory.name, roots.results) == sweep.directory
    assert sweep.json(sweep.directory.name, "--bits", "6", "--to", "json")["bits"] <= 6
    missing = sweep.json("20200101T000000000Z-00000000", "--bits", "6", "--to", "json", code=2)
    assert missing["what"] == "is no published sweep"
