from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qsens.config import Roots
from qsens.errors import UserError
from qsens.pipeline.compare import compare
from qsens.pipeline.publish import publish
from qsens.report.compare import write_comparison
from qsens.store import Store
from tests.pipeline import results

REFERENCE = Path(__file__).parents[3] / "shared" / "reference-manifests"
MOVING = {results.LAYERS[3]: 5.0}


def roots(path: Path) -> Roots:
    return Roots(**{field.name: path for field in dataclasses.fields(Roots)})


@pytest.fixture
def sweeps(tmp_path: Path) -> list[Any]:
    first = results.whole(results.plan(tmp_path, day=1), seed=1)
    second = results.whole(results.plan(tmp_path, day=2, checkpoint="b"), 1, MOVING)
    for made in (first, second):
        publish(made)
    return [first, second]


def test_two_sweeps_by_id_and_by_directory(sweeps: list[Any], tmp_path: Path) -> None:
    found = compare(sweeps[0].sweep_id, sweeps[1].sweep_id, roots(tmp_path))
    assert [cell.name for cell in found.cells] == ["wint8_afp16-small", "wint8_afp16-medium"]
    assert [(entry.cause, entry.what) for entry in found.differences] == [("checkpoint", "digest")]
    medium = found.cells[1]
    assert (medium.samples, medium.moved, medium.per_token) == ("the same", 1, True)
    assert medium.groups[0].layer == results.LAYERS[3]
    assert medium.groups[0].relative == pytest.approx(4.0)
    assert {group.status for group in medium.groups[1:]} == {"noise"}
    directories = [str(Store(made).sweep_dir()) for made in sweeps]
    assert compare(*directories, roots(tmp_path)) == found


def test_two_cells_in_three_spellings(sweeps: list[Any], tmp_path: Path) -> None:
    found = compare(
        f"{sweeps[0].sweep_id}/wint8_afp16-small",
        f"{sweeps[1].sweep_id}/wint8_afp16-medium",
        roots(tmp_path),
    )
    (cell,) = found.cells
    assert (cell.name, cell.samples) == ("wint8_afp16-small / wint8_afp16-medium", "different")
    # The newest sweep's results are those in the cells' directories.
    store = Store(sweeps[1])
    published = [
        str(store.cell_dir(store.plan.cell(f"wint8_afp16-{s}"))) for s in ("small", "medium")
    ]
    (cell,) = compare(*published, roots(tmp_path)).cells
    assert cell.samples == "different"
    kept = [str(store.manifest(store.plan.cell(f"wint8_afp16-{s}"))) for s in ("small", "medium")]
    assert compare(*kept, roots(tmp_path)).cells == (cell,)


def test_what_cannot_be_compared_is_refused(sweeps: list[Any], tmp_path: Path) -> None:
    sweep = sweeps[0].sweep_id
    for other, words in (
        ("nothing", "is no published sweep"),
        (f"{sweep}/wint8_afp16-small", "one is a sweep"),
        (f"{sweep}/wfp8_afp8-small", "no result of the cell"),
    ):
        with pytest.raises(UserError, match=words):
            compare(sweep, other, roots(tmp_path))


def test_the_page_is_one_table_of_groups(sweeps: list[Any], tmp_path: Path) -> None:
    found = compare(sweeps[0].sweep_id, sweeps[1].sweep_id, roots(tmp_path))
    page = write_comparison(found, tmp_path / "out" / "page.html")
    text = page.read_text(encoding="utf-8")
    assert text.count("<tr>") == 1 + 1 + (1 + 2) + (1 + 24)
    assert "+400.0 %" in text
    assert write_comparison(found, tmp_path / "out" / "page.html").read_text() == text


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the published manifests are not here")
def test_two_published_manifests_through_the_command_line(tmp_path: Path) -> None:
    names = ("wfp8_afp8-lm-medium", "wint8_afp16-lm-medium")
    files = [str(REFERENCE / f"qwen3_vl_4b-{name}.json") for name in names]
    command = [sys.executable, "-m", "qsens", "compare", *files, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    found = json.loads(done.stdout)
    (cell,) = found["cells"]
    assert cell["samples"] == "noise unknown"
    assert {group["moved"] for group in cell["groups"]} == {None}
    assert len(cell["groups"]) == 145
    assert "formats" in {entry["what"] for entry in found["differences"]}
    raw = [json.loads(Path(file).read_text())["layer_sensitivity"] for file in files]
    key = "model.language_model.layers.4.mlp.gate_proj"
    (row,) = [group for group in cell["groups"] if group["layer"] == key]
    assert [row["before"], row["after"]] == [one[f"{key}.quant_recipe"]["scores"][0] for one in raw]
