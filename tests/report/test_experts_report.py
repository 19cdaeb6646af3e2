"""What a report says of the experts of mixtures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qsens.report import build_cell, write_cell


def mixture(make: Any, scores: list[float | None], tokens: list[int], **more: Any) -> Any:
    idle = [number for number, count in enumerate(tokens) if not count]
    experts = {"sensitivity": scores, "tokens": tokens, "without_tokens": idle}
    return make.group(2.0, kind="experts", experts=experts, **more)


def test_the_first_three_and_those_without_tokens(make: Any, tmp_path: Path) -> None:
    manifest = make.manifest(
        {
            "layers.0.mlp.experts": mixture(
                make, [0.5, None, 0.25, 2.0, 0.5, None], [3, 0, 1, 7, 1, 2]
            ),
            "layers.0.mlp.down_proj": make.group(1.0),
        }
    )
    md, data, html, *_ = write_cell(build_cell(manifest), tmp_path)
    line = "3 (2.000e+00, 7 tokens), 0 (5.000e-01, 3 tokens), 4 (5.000e-01, 1 token)"
    expected = f"| layers.0.mlp.experts | 6 | {line} | 1 |\n"
    assert expected in md.read_text(encoding="utf-8")
    assert line in html.read_text(encoding="utf-8")
    (found,) = json.loads(data.read_text(encoding="utf-8"))["mixtures"]
    assert found == {
        "layer": "layers.0.mlp.experts",
        "experts": 6,
        "first": [
            {"expert": 3, "sensitivity": 2.0, "tokens": 7},
            {"expert": 0, "sensitivity": 0.5, "tokens": 3},
            {"expert": 4, "sensitivity": 0.5, "tokens": 1},
        ],
        # The last has tokens and no finite score.
        "without_tokens": [1],
    }


def test_without_mixtures_nothing_is_said(make: Any, tmp_path: Path) -> None:
    manifest = make.manifest({"layers.0.mlp.down_proj": make.group(1.0)})
    md, data, html, *_ = write_cell(build_cell(manifest), tmp_path)
    assert "mixtures" not in json.loads(data.read_text(encoding="utf-8"))
    assert not any("xperts" in path.read_text(encoding="utf-8") for path in (md, html))


def test_94_layers_of_128_experts_stay_small(make: Any, tmp_path: Path) -> None:
    busy = mixture(make, [1e-3] * 128, [5] * 128)
    rare = mixture(make, [1e-3] * 28 + [None] * 100, [5] * 28 + [0] * 100)
    rows = {f"layers.{depth}.mlp.experts": busy if depth else rare for depth in range(94)}
    md, data, html, *_ = write_cell(build_cell(make.manifest(rows)), tmp_path)
    plain = {name: {**row, "experts": None} for name, row in rows.items()}
    without = write_cell(build_cell(make.manifest(plain)), tmp_path / "plain")
    for path, other in zip((md, html), without[::2], strict=False):
        assert path.stat().st_size < other.stat().st_size + 94 * 400
    assert data.stat().st_size < without[1].stat().st_size + 94 * 600
    text = md.read_text(encoding="utf-8")
    assert "| 100: 28, 29, 30, 31, 32, 33, 34, 35, ... |" in text
    assert text.count("| none |") == 93
