"""Both engines on one cell: by gradient whatever the plan's method, and never a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qsens.config import Roots
from qsens.errors import UserError
from qsens.pipeline import compute
from qsens.pipeline.plan import plan_sweep
from qsens.pipeline.verify import verify
from tests.pipeline.seeing import Place

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("method", ["fisher", "kl_div"])
def test_a_plan_of_another_method_is_verified_by_gradient(
    demo_checkpoint: DemoResult, tmp_path: Path, method: str
) -> None:
    roots = Roots(root=REPO, results=tmp_path, configs=(REPO / "configs",))
    words = (
        f"model.path={demo_checkpoint.directory}",
        "quant_pair=wint8_aint8",
        "dataset.size=small",
        f"autoquant.method={method}",
    )
    plan = plan_sweep("demo-text", words, roots=roots)
    found = verify(plan, "wint8_aint8-small")
    assert found["method"] == "gradient"
    assert found["agrees"] is True
    assert found["largest"] < 1e-5
    assert found["only_in_one"] == ()


def test_what_modelopt_has_no_code_for_is_refused_before_anything_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path)
    plan = place.plan("quant_pair=wnvfp4_anvfp4", "dataset.size=small", "coverage=all_layers")
    monkeypatch.setattr(compute.scorer, "score", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(UserError, match=r"model\.visual\.patch_embed\.proj") as caught:
        verify(plan, plan.cells[0].cell)
    assert "on a GPU alone" in caught.value.what
    assert "coverage=lm_only" in caught.value.remedy


@pytest.mark.parametrize("given", ["quant_pair=wnvfp4_afp16", "coverage=lm_only"])
def test_what_modelopt_has_code_for_is_verified(tmp_path: Path, given: str) -> None:
    place = Place(tmp_path)
    words = {"quant_pair": "wnvfp4_anvfp4", "coverage": "all_layers"} | dict([given.split("=")])
    plan = place.plan(*(f"{key}={value}" for key, value in words.items()), "dataset.size=small")
    assert verify(plan, plan.cells[0].cell)["agrees"] is True
