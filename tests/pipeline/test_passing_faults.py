"""What goes wrong in one format for no reason of the format's own: nothing of it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

from qsens.config import Roots
from qsens.engine.gradient import scorer
from qsens.engine.kl import perturbed_forward
from qsens.errors import Fault
from qsens.grid import Plan
from qsens.pipeline.audit import audit, find_audits
from qsens.pipeline.plan import plan_sweep
from qsens.pipeline.sweep import run_sweep
from qsens.results import read_manifest
from qsens.schema.manifest import Manifest
from qsens.store import Store

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult


def plan_of(demo: DemoResult, results: Path, method: str) -> Plan:
    here = Roots.from_environment()
    return plan_sweep(
        "demo-text",
        [
            f"model.path={demo.directory}",
            "quant_pair=wint8_afp16,wfp8_afp16",
            "dataset.size=small",
            f"autoquant.method={method}",
        ],
        roots=Roots(root=here.root, results=results, configs=here.configs),
    )


def break_integers(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Make a disk full whenever a weight is quantized to integers."""
    works = module.quantize_weight

    def fails(weight: torch.Tensor, cfg: Mapping[str, Any], amax: Any) -> torch.Tensor:
        if cfg["num_bits"] == 8:
            raise OSError(28, "No space left on device")
        return works(weight, cfg, amax)

    monkeypatch.setattr(module, "quantize_weight", fails)


def numbers(manifest: Manifest) -> dict[str, float | None]:
    rows = manifest.layer_sensitivity
    return {key: row.sensitivity_per_token for key, row in rows.items() if row.status == "scored"}


@pytest.mark.parametrize(
    ("method", "module"), [("gradient", scorer), ("fisher", scorer), ("kl_div", perturbed_forward)]
)
def test_the_cell_fails_alone_and_is_computed_again(
    method: str,
    module: ModuleType,
    demo_checkpoint: DemoResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_of(demo_checkpoint, tmp_path / "broken", method)
    store = Store(plan)
    with monkeypatch.context() as broken:
        break_integers(broken, module)
        published, errors = run_sweep(plan)
    assert [type(error) for error in errors] == [Fault]
    assert isinstance(errors[0].__cause__, OSError)
    ((missing,),) = [published["missing"]]
    assert missing["cell"] == "wint8_afp16-small"
    assert "No space left on device" in missing["reason"]
    assert [store.is_done(cell) for cell in plan.cells] == [False, True]
    assert not store.result_dir(plan.cells[0]).exists()

    mended, errors = run_sweep(plan)
    assert (errors, mended["complete"]) == ([], True)
    apart = plan_of(demo_checkpoint, tmp_path / "undisturbed", method)
    run_sweep(apart)
    for cell, other in zip(plan.cells, apart.cells, strict=True):
        found, expected = (
            numbers(read_manifest(Store(one).manifest(at)))
            for one, at in ((plan, cell), (apart, other))
        )
        assert found == pytest.approx(expected, rel=1e-6)


def test_an_audit_fails_for_its_pair_alone_and_is_made_again(
    demo_checkpoint: DemoResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(demo_checkpoint, tmp_path, "fisher")
    run_sweep(plan)
    with monkeypatch.context() as broken:
        break_integers(broken, perturbed_forward)
        with pytest.raises(Fault, match="No space left on device"):
            audit(plan)
    assert [found.pair for found in find_audits(Store(plan))] == ["wfp8_afp16"]
    assert {found["pair"] for found in audit(plan)["audits"]} == {"wint8_afp16", "wfp8_afp16"}
