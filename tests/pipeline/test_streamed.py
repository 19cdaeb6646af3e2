"""A checkpoint larger than the memory it is given: the sweep of one that fits, number by number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qsens.config import Roots
from qsens.engine.scores import silent
from qsens.errors import UserError
from qsens.grid import Plan
from qsens.pipeline.cell import score
from qsens.pipeline.loading import load_checkpoint
from qsens.pipeline.plan import describe, plan_sweep
from qsens.pipeline.recipe import write_recipe
from qsens.pipeline.sweep import run_sweep
from qsens.results import read_manifest
from qsens.store import Store

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult


def planned(checkpoint: DemoResult, results: Path, gib: float, *more: str) -> Plan:
    roots = Roots.from_environment()
    words = [
        f"model.path={checkpoint.directory}",
        "quant_pair=wfp8_afp8,wint8_afp16",
        "dataset.size=small,medium",
        "autoquant.device=cpu",
        f"autoquant.memory_gb={gib}",
        *more,
    ]
    return plan_sweep(
        "single", words, roots=Roots(root=roots.root, results=results, configs=roots.configs)
    )


def rows_of(plan: Plan) -> dict[str, Any]:
    manifests = {cell.cell: read_manifest(Store(plan).manifest(cell)) for cell in plan.cells}
    return {
        cell: {name: row.sensitivity for name, row in manifest.layer_sensitivity.items()}
        for cell, manifest in manifests.items()
    }


@pytest.mark.parametrize("method", ["gradient", "fisher"])
def test_a_sweep_and_its_audit_are_those_of_a_checkpoint_that_fits(
    demo_checkpoint: DemoResult, tmp_path: Path, method: str
) -> None:
    more = (f"autoquant.method={method}", "autoquant.audit=sample", "autoquant.draws=2")
    whole = planned(demo_checkpoint, tmp_path / "whole", 2, *more)
    tight = planned(demo_checkpoint, tmp_path / "tight", 0.02, *more)
    assert [cell.digest for cell in tight.cells] == [cell.digest for cell in whole.cells]
    audited = []
    for plan in (whole, tight):
        results, errors = run_sweep(plan)
        assert errors == []
        summary = json.loads(Path(results["index"]).with_name("summary.json").read_text("utf-8"))
        points = [point for audit in summary["audit"] for point in audit["points"]]
        audited.append({(at, point["layer"]): point["truth"] for at, point in enumerate(points)})
    assert rows_of(tight) == rows_of(whole)
    assert len(audited[0]) > 20
    # Fewer copies go through at once under a limit, and products of other shapes round otherwise.
    assert audited[1] == pytest.approx(audited[0], rel=1e-4)
    memory = [read_manifest(Store(p).manifest(p.cells[0])).memory for p in (whole, tight)]
    assert memory[0]["streamed"] == 0 < memory[1]["streamed"]
    assert memory[1]["weights"] + memory[1]["predicted"] <= 0.02
    assert memory[1]["weights"] < memory[0]["weights"]


def test_a_recipe_is_measured_where_a_copy_has_no_room(
    demo_checkpoint: DemoResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checked = []
    for gib in (2, 0.025):
        plan = planned(demo_checkpoint, tmp_path / str(gib), gib, "autoquant.method=fisher")
        assert run_sweep(plan)[1] == []
        roots = Roots.from_environment()
        found = write_recipe(
            str(Store(plan).sweep_dir()),
            bits=9,
            target="json",
            check=True,
            roots=Roots(root=roots.root, results=plan.results, configs=roots.configs),
        )
        checked.append(found["check"])
    whole, tight = checked
    assert "a second copy of the model has no room" in caplog.text
    assert [entry["name"] for entry in whole["measured"]][-1] == "ModelOpt"
    assert [each["name"] for each in tight["measured"]] == [
        each["name"] for each in whole["measured"][:-1]
    ]
    for ours, theirs in zip(tight["measured"], whole["measured"], strict=False):
        assert ours["bits"] == pytest.approx(theirs["bits"])
        assert ours["divergence"] == pytest.approx(theirs["divergence"], rel=1e-3)
        assert ours["scored"] == pytest.approx(theirs["scored"], rel=1e-3)
    assert tight["captions"] == whole["captions"]


def test_a_plan_says_how_large_weights_are(demo_checkpoint: DemoResult, tmp_path: Path) -> None:
    weights = describe(planned(demo_checkpoint, tmp_path, 0.001), None)["weights"]
    assert weights["bytes"] == 4 * demo_checkpoint.parameters
    assert weights["streamed_bytes"] < weights["bytes"]
    assert weights["bus_bytes"] < weights["bytes"]
    assert "more than autoquant.memory_gb=0.001" in weights["placement"]


def test_less_than_a_layer_needs_is_refused_with_what_would_do(
    demo_checkpoint: DemoResult, tmp_path: Path
) -> None:
    plan = planned(demo_checkpoint, tmp_path, 0.001)
    with pytest.raises(UserError, match=r"a pass needs 0\.0\d GiB: .* there are 0\.00") as refused:
        score(plan, plan.cells[0].cell)
    assert "Set autoquant.memory_gb=0.0" in refused.value.remedy


def test_what_needs_the_whole_model_is_refused_where_it_does_not_fit(
    demo_checkpoint: DemoResult, tmp_path: Path
) -> None:
    plan = planned(demo_checkpoint, tmp_path, 0.005)
    # 2,243,584 weights of four bytes.
    with pytest.raises(
        UserError, match=r"take 0\.01 GiB, all of which .* there are 0\.01"
    ) as found:
        load_checkpoint(plan, silent, whole=True)
    assert found.value.where == "autoquant.memory_gb"
    assert found.value.remedy.startswith("Use a device with more memory")


def test_a_plan_of_before_is_read(demo_checkpoint: DemoResult, tmp_path: Path) -> None:
    plan = planned(demo_checkpoint, tmp_path, 2)
    held = plan.model_dump(mode="json", exclude={"checksum"})
    autoquant = held["config"]["autoquant"]
    del autoquant["memory_gb"]
    autoquant["memory_budget_gb"] = 0.5
    assert Plan.model_validate(held).config.autoquant.memory_gb is None
