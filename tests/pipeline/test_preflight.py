"""What a plan refuses before any GPU time is spent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qsens.config import Roots, SweepConfig, load_sweep
from qsens.errors import UserError
from qsens.pipeline.plan import plan_sweep
from qsens.pipeline.preflight import check_formats, covered_shapes

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult

REPO = Path(__file__).resolve().parents[2]
VISION = ("*visual*",)
SHAPES = {
    "model.visual.patch_embed.proj.weight": (32, 3, 2, 16, 16),
    "model.language_model.embed_tokens.weight": (1000, 96),
    "model.language_model.layers.0.mlp.down_proj.weight": (96, 160),
    "model.language_model.layers.0.self_attn.q_proj.weight": (128, 96),
    "model.language_model.norm.weight": (96,),
    # As the files of Qwen3-VL-MoE have them: every expert transposed.
    "model.language_model.layers.0.mlp.experts.gate_up_proj": (4, 96, 128),
    "model.language_model.layers.0.mlp.experts.down_proj": (4, 64, 96),
    "model.language_model.layers.0.mlp.gate.weight": (4, 96),
}


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    pairs = tmp_path / "configs" / "quant_pair"
    pairs.mkdir(parents=True)
    quantizers = {
        "wthird_afp16": "{num_bits: 8, axis: 2}",
        "wfourth_afp16": "{num_bits: 8, axis: 3}",
        "wblocks_afp16": "{num_bits: 4, block_sizes: {'-1': 64}}",
    }
    for name, quantizer in quantizers.items():
        (pairs / f"{name}.yaml").write_text(
            f"weight: w\nactivation: fp16\nformat: F\neffective_bits: 8\n"
            f"weight_quantizer: {quantizer}\n"
        )
    return Roots(root=tmp_path, results=tmp_path, configs=(pairs.parent, REPO / "configs"))


def config(roots: Roots, pairs: str) -> SweepConfig:
    return load_sweep("demo-text", [f"quant_pair={pairs}"], roots=roots).config


def test_embeddings_norms_routers_and_the_vision_tower_are_not_covered() -> None:
    assert sorted(shape for shape in covered_shapes(SHAPES, VISION).values()) == [
        (96, 64),
        (96, 160),
        (128, 96),
        (128, 96),
    ]
    # Where the tower is covered, its patch embedding is a weight like others.
    assert (32, 3, 2, 16, 16) in covered_shapes(SHAPES, ()).values()
    assert (1000, 96) not in covered_shapes(SHAPES, ()).values()


def test_experts_lie_either_way_round_or_apart() -> None:
    stem = "model.layers.0.mlp"
    expected = [(96, 64), (128, 96)]
    upright = {
        f"{stem}.experts.gate_up_proj": (4, 128, 96),
        f"{stem}.experts.down_proj": (4, 96, 64),
    }
    assert sorted(covered_shapes(upright, ()).values()) == expected
    apart = {f"{stem}.experts.{at}.up_proj.weight": (64, 96) for at in range(4)}
    router = {f"{stem}.gate.weight": (4, 96)}
    assert list(covered_shapes(apart | router, ()).values()) == [(64, 96)] * 4
    # Without experts beside it, a module of that name is one like any other.
    assert list(covered_shapes(router, ()).values()) == [(4, 96)]


def test_a_format_that_fits_no_weight_is_refused_by_name(roots: Roots) -> None:
    with pytest.raises(UserError, match="dimension 3") as caught:
        check_formats(config(roots, "wfp8_afp8,wfourth_afp16"), covered_shapes(SHAPES, VISION))
    assert caught.value.where == "quant_pair wfourth_afp16"


def test_a_format_that_fits_some_weights_is_a_notice(roots: Roots) -> None:
    deeper = covered_shapes(SHAPES | {"model.conv.weight": (8, 3, 5)}, VISION)
    assert check_formats(config(roots, "wthird_afp16"), deeper) == [
        "wthird_afp16: 4 of 5 weights lack a dimension that it names"
    ]
    covered = covered_shapes(SHAPES, VISION)
    (notice,) = check_formats(config(roots, "wblocks_afp16"), covered)
    # 160 and 96, the inputs of gate and up among them, do not divide by 64; 64, that of down, does.
    assert notice.startswith("wblocks_afp16: 3 of 4 weights do not divide into its blocks")
    assert check_formats(config(roots, "wfp8_afp8,wint8_aint8"), covered) == []


def test_the_plan_refuses_it_and_imports_no_torch(
    demo_checkpoint: DemoResult, roots: Roots
) -> None:
    words = [
        "plan",
        "demo-text",
        f"model.path={demo_checkpoint.directory}",
        "quant_pair=wthird_afp16",
    ]
    code = f"""
import sys
sys.argv = ["qsens", *{words!r}]
from qsens.cli import main
try:
    main()
finally:
    assert not {{"torch", "transformers", "modelopt"}} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"QSENS_ROOT": str(roots.root)},
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "quant_pair wthird_afp16: wthird_afp16 names dimension 2 of weights" in done.stderr


def test_a_disk_that_is_too_small_is_refused(demo_checkpoint: DemoResult, roots: Roots) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    disk = roots.root / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount")
    small = Roots(root=roots.root, results=disk / "results", configs=roots.configs)
    try:
        with pytest.raises(UserError, match=r"6 cells need about \d\d MiB, [78] MiB are free"):
            plan_sweep("demo-text", [f"model.path={demo_checkpoint.directory}"], roots=small)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_lanes_come_from_the_configuration_unless_they_are_said(
    demo_checkpoint: DemoResult, roots: Roots
) -> None:
    words = [f"model.path={demo_checkpoint.directory}", "dag.lanes=2"]
    plan = plan_sweep("demo-text", words, roots=roots)
    assert {cell.lane for cell in plan.cells} == {0, 1}
    assert {cell.lane for cell in plan_sweep("demo-text", words, lanes=1, roots=roots).cells} == {0}
    alone = plan_sweep("demo-text", words[:1], roots=roots)
    assert {cell.lane for cell in alone.cells} == {0}
    assert alone.digest == plan.digest
