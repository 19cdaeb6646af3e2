from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CELLS = ["wfp8_afp8-small", "wint8_afp16-small"]


@pytest.fixture(autouse=True)
def _root_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", ["pytest"])


def test_floor_counts_two_operations_a_weight_and_row() -> None:
    from benchmarks._floor import count_work

    # 3, 5 and 2 tokens; 2, 4 and 1 labels. 10 weights in layers, 7 in the head.
    work = count_work([3, 5, 2], weights=10, head=7, calibrated=3, scored=[1, 2])
    assert work.calibrate == 2 * 10 * 10
    assert work.forward == work.backward == 2 * (10 * 8 + 7 * 6)
    assert work.candidates == 2 * (10 * 3 + 7 * 2) + 2 * (10 * 8 + 7 * 6)
    assert work.total == 200 + 3 * 244 + 88


def test_floor_needs_no_calibration() -> None:
    from benchmarks._floor import count_work

    assert count_work([4], weights=3, head=0, calibrated=0, scored=[1]).calibrate == 0


def _piece(cells: dict[str, float], fused: float) -> dict[str, Any]:
    agreement = {"own_batches": {"max": 0.5, "median": 0.1, "spearman": 1.0}}
    run = {"cpu_seconds": 1.0, "peak": 0}
    return {
        "baseline": "longest",
        "modelopt": {
            cell: {**run, "seconds": {"calibrate": 0.0, "score": value}, "agreement": agreement}
            for cell, value in cells.items()
        },
        "fused": [
            {**run, "cells": list(cells), "seconds": {"calibrate": 0.0, "score": fused}, "floor": 1}
        ],
    }


def test_pieces_add_up_and_a_later_one_wins() -> None:
    from benchmarks import _results

    results = _results.start({"model": "m"}, ["a-small", "b-small"])
    for piece in (
        _piece({"a-small": 30.0}, 3.0),
        _piece({"b-small": 20.0}, 2.0),
        _piece({"a-small": 40.0}, 4.0),
    ):
        results = _results.add(results, piece)
    assert len(results["pieces"]) == 2
    summary = _results.summarize(results)["longest"]
    assert (summary["cells"], summary["of"]) == (2, 2)
    assert (summary["modelopt"], summary["fused"], summary["ratio"]) == (60.0, 6.0, 10.0)
    assert summary["ratio_grid"] is None  # no run of the whole grid


def test_another_workload_is_refused(tmp_path: Path) -> None:
    from benchmarks import _results

    file = tmp_path / "bench.json"
    _results.write(file, _results.start({"model": "m"}, ["a-small"]))
    with pytest.raises(_results.MergeError, match="another workload"):
        _results.resume(file, _results.start({"model": "n"}, ["a-small"]))


def test_a_small_run_in_two_pieces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import fused_vs_modelopt

    file = tmp_path / "bench.json"
    for cell in CELLS:
        arguments = ["--shape", "qwen3-vl-tiny", "--device", "cpu", "--sizes", "small"]
        arguments += ["--pairs", "wfp8_afp8,wint8_afp16", "--cells", cell]
        arguments += ["--baseline", "reference", "--resume", str(file)]
        assert fused_vs_modelopt.main(arguments) == 0
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["grid"] == CELLS
    assert [list(piece["modelopt"]) for piece in results["pieces"]] == [[cell] for cell in CELLS]
    for cell, piece in zip(CELLS, results["pieces"], strict=True):
        assert [run["cells"] for run in piece["fused"]] == [[cell], CELLS]
        assert set(piece["modelopt"][cell]["seconds"]) == {"calibrate", "score"}
        same = piece["modelopt"][cell]["agreement"]["same_batches"]
        assert same["only_one"] == 0
        assert same["groups"] == 9  # four groups in each of two layers, and the head
        assert same["max"] < 1e-3
        assert same["spearman"] > 0.99
    assert results["summary"]["reference"]["cells"] == 2
    assert CELLS[0] in capsys.readouterr().out
