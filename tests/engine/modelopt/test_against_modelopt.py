"""Both engines against a plain ``mtq.auto_quantize`` that shares no code with the project.

The demo checkpoint, its own captions and drawings, fp32 on the CPU.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional as F

from tests.demo import chats

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult

BATCH = 8
SAMPLES = 16


@pytest.fixture(scope="module")
def captions(request: pytest.FixtureRequest) -> list[str]:
    path = request.config.rootpath / "configs/dataset/demo/captions_small.txt"
    return path.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def token_ids(demo_checkpoint: DemoResult, captions: list[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint.directory)
    return [tokenizer(caption)["input_ids"] for caption in captions]


@pytest.fixture(scope="module")
def batches(token_ids: list[list[int]]) -> list[dict[str, torch.Tensor]]:
    """Batches of one length each, up to eight samples, shortest first; with each sample's 1/T_b."""
    labels = [len(ids) - 1 for ids in token_ids]
    found = []
    for indices, weights in of_one_length(labels):
        ids = torch.tensor([token_ids[index] for index in indices])
        found.append({"input_ids": ids, "labels": ids, "weights": weights})
    return found


@pytest.fixture(scope="module")
def seen(demo_checkpoint: DemoResult) -> list[dict[str, torch.Tensor]]:
    """The same of the drawings and their captions; the captions alone are labels."""
    from PIL import Image
    from transformers import AutoConfig, AutoTokenizer

    where = demo_checkpoint.directory / "drawings"
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint.directory)
    config = AutoConfig.from_pretrained(demo_checkpoint.directory)
    lines = (where / "drawings_small.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    pictures = [Image.open(where / sample["image"]) for sample in samples]
    answers = [tokenizer(sample["caption"])["input_ids"] for sample in samples]
    asked = tokenizer(chats.TURN)["input_ids"]
    found = []
    for indices, weights in of_one_length([len(answer) for answer in answers]):
        given = chats.inputs(
            config,
            asked,
            [answers[index] for index in indices],
            [pictures[index] for index in indices],
        )
        labels = given["input_ids"].clone()
        labels[:, : len(asked)] = -100
        found.append({**given, "labels": labels, "weights": weights})
    return found


def of_one_length(labels: list[int]) -> list[tuple[list[int], torch.Tensor]]:
    """Return which samples share a batch, with each one's 1/T_b."""
    totals = [sum(labels[start : start + BATCH]) for start in range(0, SAMPLES, BATCH)]
    by_length = defaultdict(list)
    for index, count in enumerate(labels):
        by_length[count].append(index)
    found = []
    for _, indices in sorted(by_length.items()):
        for start in range(0, len(indices), BATCH):
            chosen = indices[start : start + BATCH]
            weights = torch.tensor([1 / totals[index // BATCH] for index in chosen])
            found.append((chosen, weights))
    return found


def auto_quantize(
    directory: Any,
    config: dict[str, Any],
    batches: list[dict[str, torch.Tensor]],
    outside: tuple[str, ...] = ("*visual*",),
) -> dict[str, float]:
    """Return ModelOpt's score of every group but those that the patterns leave out."""
    import modelopt.torch.quantization as mtq
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()

    def loss(output: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits, labels = output.logits[:, :-1].float(), batch["labels"][:, 1:]
        each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return (each.sum(dim=1) * batch["weights"]).sum()

    def forward(model: Any, batch: dict[str, torch.Tensor]) -> Any:
        given = {name: value for name, value in batch.items() if name not in ("labels", "weights")}
        return model(**given)

    _, state = mtq.auto_quantize(
        model,
        constraints={
            "effective_bits": 8.0,
            "cost": {"excluded_module_name_patterns": list(outside)},
        },
        quantization_formats=[config],
        data_loader=batches,
        forward_step=forward,
        loss_func=loss,
        disabled_layers=list(outside),
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        verbose=False,
    )
    return {
        name.removesuffix(".quant_recipe"): stats["scores"][0]
        for name, stats in state["candidate_stats"].items()
        if not outside or "visual" not in name
    }


def e4m3_of_a_gpu(config: dict[str, Any]) -> dict[str, Any]:
    """Return an FP8 configuration that divides 448 by the maximum, as ModelOpt's kernels do.

    On a CPU ModelOpt multiplies by ``1 / amax * 448``, which may be a unit in the last place off;
    that rounds a weight now and then to the other side, and moves a score by up to 1e-3.
    """
    from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
        is_registered_quant_backend,
        register_quant_backend,
    )

    def e4m3(x: torch.Tensor, quantizer: Any) -> torch.Tensor:
        # A true division: torch makes ``448 / amax`` of a number and a tensor ``1 / amax * 448``.
        scale = torch.full_like(quantizer.amax, 448) / quantizer.amax
        return (x * scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) / scale

    if not is_registered_quant_backend("e4m3_of_a_gpu"):
        register_quant_backend("e4m3_of_a_gpu", e4m3)
    entries = [
        {**entry, "cfg": {**entry["cfg"], "backend": "e4m3_of_a_gpu"}}
        if (entry.get("cfg") or {}).get("num_bits") == (4, 3)
        else entry
        for entry in config["quant_cfg"]
    ]
    return {**config, "quant_cfg": entries}


@pytest.fixture(scope="module")
def plain(
    demo_checkpoint: DemoResult, batches: list[dict[str, torch.Tensor]]
) -> dict[str, dict[str, float]]:
    import modelopt.torch.quantization as mtq

    presets = {
        "wfp8_afp8": e4m3_of_a_gpu(mtq.FP8_DEFAULT_CFG),
        "wint8_aint8": mtq.INT8_DEFAULT_CFG,
        "wint8_afp16": mtq.INT8_WEIGHT_ONLY_CFG,
    }
    return {
        pair: auto_quantize(demo_checkpoint.directory, config, batches)
        for pair, config in presets.items()
    }


def run_sweep(
    directory: Any, tmp_path: Any, engine: str, pairs: str, sizes: str = "small", *more: str
) -> dict[str, dict[str, float]]:
    """Return the sensitivities of a sweep through the product, by cell and group."""
    from qsens.config import Roots
    from qsens.pipeline.plan import plan_sweep
    from qsens.pipeline.sweep import run_sweep as sweep
    from qsens.results import read_manifest

    roots = Roots.from_environment()
    roots = Roots(root=roots.root, results=tmp_path, configs=roots.configs)
    plan = plan_sweep(
        "single",
        [
            f"model.path={directory}",
            f"quant_pair={pairs}",
            f"dataset.size={sizes}",
            f"autoquant.engine={engine}",
            "autoquant.device=cpu",
            *more,
        ],
        roots=roots,
    )
    published, errors = sweep(plan)
    assert errors == []
    assert published["complete"]
    found = {}
    for cell in published["cells"]:
        manifest = read_manifest(tmp_path.__class__(cell["manifest"]))
        found[cell["cell"]] = {
            name.removesuffix(".quant_recipe"): row.sensitivity
            for name, row in manifest.layer_sensitivity.items()
            if row.status == "scored"
        }
    return found


def largest_difference(ours: dict[str, float], theirs: dict[str, float]) -> float:
    assert ours.keys() == theirs.keys()
    return max(abs(ours[name] / theirs[name] - 1) for name in ours)


def test_reference_engine_equals_a_plain_call(
    demo_checkpoint: DemoResult, plain: dict[str, dict[str, float]], tmp_path: Any
) -> None:
    found = run_sweep(demo_checkpoint.directory, tmp_path, "modelopt", "wfp8_afp8,wint8_aint8")
    assert len(found["wfp8_afp8-small"]) == 4 * 4 + 1
    assert largest_difference(found["wfp8_afp8-small"], plain["wfp8_afp8"]) < 1e-5
    assert largest_difference(found["wint8_aint8-small"], plain["wint8_aint8"]) < 1e-5


def test_fused_engine_equals_plain_calls(
    demo_checkpoint: DemoResult, plain: dict[str, dict[str, float]], tmp_path: Any
) -> None:
    """Its own batches regroup sums, which moves fp32 scores: median 1e-4, largest 5e-3 allowed."""
    found = run_sweep(demo_checkpoint.directory, tmp_path, "fused", ",".join(plain))
    for pair, theirs in plain.items():
        ours = found[f"{pair}-small"]
        assert largest_difference(ours, theirs) < 5e-3
        differences = sorted(abs(ours[name] / theirs[name] - 1) for name in ours)
        assert differences[len(differences) // 2] < 1e-4
        assert sorted(ours, key=ours.__getitem__) == sorted(theirs, key=theirs.__getitem__)


def test_all_layers_equal_plain_calls_on_the_drawings(
    demo_checkpoint: DemoResult, seen: list[dict[str, torch.Tensor]], tmp_path: Any
) -> None:
    """Every group of the tower and of the language model, on the same samples: 1e-3."""
    import modelopt.torch.quantization as mtq

    found = run_sweep(
        demo_checkpoint.directory,
        tmp_path,
        "fused",
        "wfp8_afp8,wint8_aint8",
        "small",
        "dataset=demo_drawings",
        "coverage=all_layers",
    )
    presets = {
        "wfp8_afp8": e4m3_of_a_gpu(mtq.FP8_DEFAULT_CFG),
        "wint8_aint8": mtq.INT8_DEFAULT_CFG,
    }
    for pair, config in presets.items():
        theirs = auto_quantize(demo_checkpoint.directory, config, seen, outside=())
        ours = found[f"{pair}-all_layers-small"]
        tower = [name for name in ours if "visual" in name]
        # The patches; qkv, proj and the MLP of two blocks; both linears of either merger.
        assert len(tower) == 1 + 2 * 4 + 2 * 2
        assert len(ours) == len(tower) + 4 * 4 + 1
        assert largest_difference(ours, theirs) < 1e-3
        assert all(value > 0 for value in ours.values())


def test_verify_agrees_on_the_drawings(demo_checkpoint: DemoResult, tmp_path: Any) -> None:
    from qsens.config import Roots
    from qsens.pipeline.plan import plan_sweep
    from qsens.pipeline.verify import verify

    roots = Roots.from_environment()
    roots = Roots(root=roots.root, results=tmp_path, configs=roots.configs)
    words = [f"model.path={demo_checkpoint.directory}", "dataset.size=small"]
    plan = plan_sweep("demo", [*words, "autoquant.device=cpu"], roots=roots)
    result = verify(plan, "wint8_aint8-all_layers-small")
    assert result["agrees"], result
    assert result["largest"] < 1e-3
    assert result["only_in_one"] == ()


def test_verify_agrees_on_the_same_batches(demo_checkpoint: DemoResult, tmp_path: Any) -> None:
    """All seven pairs, one format a call, identical batch tensors: 1e-3 for every group."""
    from qsens.config import Roots
    from qsens.pipeline.plan import plan_sweep
    from qsens.pipeline.verify import verify

    roots = Roots.from_environment()
    roots = Roots(root=roots.root, results=tmp_path, configs=roots.configs)
    seven = "wfp4_afp8,wfp4_afp16,wfp8_afp8,wfp8_afp16,wint8_afp16,wint8_afp8,wint8_aint8"
    plan = plan_sweep(
        "single",
        [f"model.path={demo_checkpoint.directory}", f"quant_pair={seven}", "autoquant.device=cpu"],
        roots=roots,
    )
    for cell in plan.cells:
        result = verify(plan, cell.cell)
        assert result["agrees"], result
        assert result["largest"] < 1e-3
        assert result["spearman"] == pytest.approx(1.0)
        assert result["only_in_one"] == ()
    assert not verify(plan, "wfp8_afp8-small", tolerance=0.0)["agrees"]


def test_one_pass_equals_one_call_each_and_half_the_memory(
    demo_checkpoint: DemoResult, tmp_path: Any
) -> None:
    """Results depend on neither the grid nor the budget: 1e-6."""
    pairs, sizes = "wfp4_afp8,wfp8_afp8,wint8_aint8,wint8_afp16", "small,medium"
    together = run_sweep(
        demo_checkpoint.directory,
        tmp_path / "all",
        "fused",
        pairs,
        sizes,
        "autoquant.score_size=96",
    )
    for index, cell in enumerate(["wint8_aint8-small", "wfp8_afp8-medium", "wfp4_afp8-medium"]):
        pair, size = cell.split("-")
        alone = run_sweep(
            demo_checkpoint.directory,
            tmp_path / str(index),
            "fused",
            pair,
            size,
            "autoquant.score_size=96",
        )
        assert largest_difference(alone[cell], together[cell]) < 1e-6
    tight = run_sweep(
        demo_checkpoint.directory,
        tmp_path / "tight",
        "fused",
        pairs,
        sizes,
        "autoquant.score_size=96",
        "autoquant.memory_gb=0.02",
    )
    for cell, scores in together.items():
        assert largest_difference(tight[cell], scores) < 1e-6
