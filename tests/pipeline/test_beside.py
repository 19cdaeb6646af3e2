"""Publishing, pruning and reading side by side: nothing is half, nothing needed is removed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from qsens.grid import read_plan
from qsens.pipeline.plan import plan_json
from qsens.pipeline.stored import Result
from qsens.published import read_sweep
from qsens.results import read_result
from qsens.schema.manifest import MANIFEST_SUFFIX
from qsens.store import Store
from tests.pipeline import results

BESIDE = Path(__file__).with_name("beside.py")
TIMES = 6


def test_publish_beside_prune(tmp_path: Path) -> None:
    """Also prune beside prune, and beside what computes and reads."""
    root = tmp_path / "results"
    (tmp_path / "plans").mkdir()
    for day, checkpoint in enumerate("abcd", 1):
        made = results.whole(results.plan(root, day=day, checkpoint=checkpoint), seed=day)
        (tmp_path / "plans" / f"{day}.json").write_text(plan_json(made))
    shutil.copytree(root / ".cells", tmp_path / "stock")
    subprocess.run([sys.executable, str(BESIDE), str(tmp_path), str(TIMES)], check=True)

    said = [
        json.loads(line)
        for path in sorted(tmp_path.glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert sum(each["kind"] == "publish" for each in said) == 2 * TIMES
    assert [each for each in said if "traceback" in each] == []
    # What readers look for may be gone; whoever writes has no reason to end otherwise.
    assert {each["kind"] for each in said if "error" in each} <= {"report", "recipe"}
    assert {each["code"] for each in said if "error" in each} <= {2, 75}

    made = read_plan(tmp_path / "plans" / "1.json")
    model = Store(made).model_dir()
    sweeps = [path for path in (model / "sweeps").iterdir() if path.name[0] != "."]
    assert sweeps
    for directory in sweeps:
        summary, plan = read_sweep(directory)
        assert summary.sweep_id == plan.sweep_id == directory.name
        for cell in summary.done:
            read_result(root / ".cells" / cell.digest)
    for manifest in model.glob(f"weight-*/*/*{MANIFEST_SUFFIX}"):
        assert Result.at(manifest).samples is not None
