"""What a manifest says of groups: ranks, and why some have none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsens.checkpoint.groups import Group
from qsens.config import Roots
from qsens.documents import dump_document
from qsens.engine.scores import CellScores, GroupScore
from qsens.pipeline.plan import plan_sweep
from qsens.pipeline.result import build_manifest
from qsens.pipeline.sweep import run_sweep
from qsens.results import read_manifest
from qsens.schema.manifest import Manifest, Status
from tests.pipeline import results

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult

REPO = Path(__file__).resolve().parents[2]


def built(tmp_path: Path, *entries: tuple[str, Status, float | None, str | None]) -> Manifest:
    made = results.plan(tmp_path, day=1)
    versions = {**made.versions, "nvidia-modelopt": "0.47.0"}
    made = made.model_copy(update={"versions": versions})
    cell = made.cells[0]
    scores = CellScores(
        groups=tuple(
            GroupScore(
                Group(name, (name,), "down", 0, 64, covered=status != "disabled"),
                status,
                reason,
                sensitivity=value,
                sensitivity_per_token=value,
            )
            for name, status, value, reason in entries
        ),
        module_types={},
        tensors={},
        timings={},
        padding_share=0.0,
    )
    known = results.manifest(made, cell, torch.ones(12, 16).numpy()).dataset
    assert known is not None
    return build_manifest(made, cell, scores, dataset=known, device="cpu", timings={}, memory={})


def test_what_has_no_score_has_no_rank(tmp_path: Path) -> None:
    found = built(
        tmp_path,
        ("a", "non_finite", None, "not finite, first at sample 3: a.weight holds NaN"),
        ("b", "scored", 2.0, None),
        ("c", "failed", None, "does not divide"),
        ("d", "scored", 0.0, None),
        ("e", "no_gradient", None, "no gradient reached it"),
        ("f", "scored", 1.0, None),
        ("g", "disabled", None, "outside the coverage"),
    )
    ranks = {name[0]: row.rank for name, row in found.layer_sensitivity.items()}
    # ModelOpt gives what is disabled a 0; a measured 0 comes with it, by name.
    assert ranks == {"a": None, "b": 4, "c": None, "d": 1, "e": None, "f": 3, "g": 2}
    assert [entry.name[0] for entry in found.sensitivity_ranking] == ["d", "g", "f", "b"]
    assert [entry.importance for entry in found.sensitivity_ranking] == [0.0, 0.0, 1.0, 2.0]
    # Each reason stands in the list, so that whoever reads why a sweep is PARTIAL reads it too.
    assert found.partial == [
        "1 of 6 groups got no finite score, first a: not finite, first at sample 3: a.weight holds "
        "NaN",
        "1 of 6 groups got no gradient, first e: no gradient reached it",
        "1 of 6 groups got no score, first c: does not divide",
    ]
    assert (
        found.scheme.auto_quantize_batch_size
        == results.plan(tmp_path, day=1).config.autoquant.batch_size
    )


def test_manifests_with_and_without_ranks_are_read(tmp_path: Path) -> None:
    found = built(tmp_path, ("a", "non_finite", None, "why"), ("b", "scored", 1.0, None))
    path = tmp_path / "one_quant_manifest.json"
    data = found.model_dump(mode="json")
    path.write_text(dump_document(data))
    unsealed = {"checksum"}
    assert read_manifest(path).model_dump(exclude=unsealed) == found.model_dump(exclude=unsealed)
    del data["scheme"]["auto_quantize_batch_size"]
    path.write_text(dump_document(data))
    assert read_manifest(path).scheme.auto_quantize_batch_size is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "name",
    ["model.language_model.layers.1.mlp.down_proj.weight", "model.language_model.norm.weight"],
)
def test_the_tensor_that_spoils_all_scores_is_named(
    demo_checkpoint: DemoResult, tmp_path: Path, name: str, value: float
) -> None:
    checkpoint = tmp_path / "spoilt"
    shutil.copytree(demo_checkpoint.directory, checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    assert name in weights
    weights[name].view(-1)[7] = value
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    roots = Roots(root=REPO, results=tmp_path / "results", configs=(REPO / "configs",))
    words = [f"model.path={checkpoint}", "quant_pair=wint8_afp16", "dataset.size=small"]
    published, errors = run_sweep(plan_sweep("demo-text", words, roots=roots))
    assert errors == []
    assert published["complete"] is False
    manifest = read_manifest(Path(published["cells"][0]["manifest"]))
    rows = [row for row in manifest.layer_sensitivity.values() if row.status != "disabled"]
    assert {row.status for row in rows} == {"non_finite"}
    assert {row.rank for row in rows} == {None}
    said = f"{name} holds NaN or infinity, 1 of its values"
    assert all(said in (row.reason or "") for row in rows)
    (partial,) = published["partial"]
    assert partial["cell"] == "wint8_afp16-small"
    assert said in partial["reason"]
    page = Path(published["index"])
    assert said in page.read_text(encoding="utf-8")
    assert said in (page.parent / "summary.md").read_text(encoding="utf-8").replace("\\", "")
