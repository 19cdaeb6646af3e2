from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult

ROOT = Path(__file__).resolve().parent.parent.parent
PAIRS = "wfp8_afp16,wfp4_afp16"


@pytest.fixture(autouse=True)
def _root_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", ["pytest"])


def test_a_part_is_made_once(tmp_path: Path) -> None:
    from benchmarks._parts import Parts

    made = []

    def make() -> dict[str, int]:
        made.append(1)
        return {"made": len(made)}

    assert Parts(tmp_path, {"model": "m", "count": 1}).get("a", make) == {"made": 1}
    again = Parts(tmp_path, {"count": 1, "model": "m"})
    assert again.get("a", make) == {"made": 1}
    assert again.known(lambda: again.get("a", make)) == {"made": 1}
    # What is not there is not made on the way.
    assert again.known(lambda: again.get("b", make)) is None
    assert Parts(tmp_path, {"model": "m", "count": 2}).get("a", make) == {"made": 2}
    assert again.get("b", make) == {"made": 3}


def test_a_call_goes_on_where_one_was_cut_off(
    demo_checkpoint: DemoResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import fidelity

    common = ["--model", str(demo_checkpoint.directory), "--device", "cpu", "--work", str(tmp_path)]
    common += ["--pairs", PAIRS, "--draws", "2", "--seeds", "1", "--sets", "given", "--bits", "6"]
    assert fidelity.main([*common, "--only", "truth"]) == 0
    assert "truth-wfp8_afp16" in capsys.readouterr().err
    parts = {path: path.read_bytes() for path in tmp_path.rglob("truth-*.json")}
    assert len(parts) == 2
    assert fidelity.main([*common, "--only", "methods,recipes"]) == 0
    said = capsys.readouterr()
    assert "truth-" not in said.err
    assert {path: path.read_bytes() for path in parts} == parts
    # Tables of this call and of what was there.
    report = (tmp_path / "fidelity.md").read_text()
    assert report in said.out
    lines = [line.split(" | ") for line in report.splitlines()]
    (row,) = (line for line in lines if line[0] == "| `wfp4_afp16`")
    assert float(row[1]) > 0.9
    assert (tmp_path / f"{demo_checkpoint.directory.name}.svg").is_file()

    # One group of the sweep after the other, in the formats that ModelOpt chose.
    (file,) = tmp_path.rglob("modelopt-2-pairs-6.json")
    theirs = json.loads(file.read_text())
    assert set(theirs["formats"].values()) <= {*PAIRS.split(",")}
    (summary,) = tmp_path.rglob("summary.json")
    rows = {
        (cell["pair"], row["layer"]): row
        for cell in json.loads(summary.read_text())["cells"]
        if cell["size"] == "medium"
        for row in cell["rows"]
    }
    predicted = sum(
        row["sensitivity_per_token"]
        for (pair, _), row in rows.items()
        if theirs["formats"].get(row["members"][0]) == pair
    )
    (row,) = (line for line in lines if line[0] == "| ModelOpt")
    assert row[6] == f"{predicted:.5f}"
    assert float(row[1]) == pytest.approx(theirs["bits"], abs=1e-3)
    # Nothing is left to be made.
    assert fidelity.main([*common, "--only", "truth,methods,recipes"]) == 0
    assert f"{demo_checkpoint.directory.name}-" not in capsys.readouterr().err
