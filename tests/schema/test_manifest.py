"""Manifests of older runs: whatever they lack is unknown, and what is broken is named."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qsens.cli import app
from qsens.errors import Damaged
from qsens.pipeline.publish import report
from qsens.report import build_cell
from qsens.report.cell import facts
from qsens.results import read_manifest

REFERENCE = Path(__file__).parents[3] / "shared" / "reference-manifests"
NAME = "old_quant_manifest.json"
FORMATS = ["FP8_DEFAULT_CFG(effective-bits: 8.0)", "NONE(effective-bits: 16.0)"]
GROUPS = [f"model.layers.{layer}.{leaf}" for layer in range(2) for leaf in ("o_proj", "down_proj")]
OLDER: dict[str, Any] = {
    "scheme": {
        "name": "fp8_autoquant_lm",
        "auto_quantize_bits": 8.5,
        "auto_quantize_method": "gradient",
        "auto_quantize_score_size": 128,
        "coverage_mode": "lm_only",
        "coverage_fraction": 1.0,
        "quant_formats": ["FP8_DEFAULT_CFG"],
    },
    "model": {"id": "checkpoints/some-model"},
    "dataset": {"name": "captions", "size": "medium", "num_calib_samples": 128},
    "num_quantized_layers": len(GROUPS),
    "layers": {name: {"quantized": True, "module_type": "QuantLinear"} for name in GROUPS},
    "autoquant_state": {
        "keys": ["best"],
        "constraints": {"effective_bits": 8.0},
        "score": 1.0,
        "is_satisfied": True,
    },
    "layer_sensitivity": {
        f"{name}.quant_recipe": {
            "formats": FORMATS,
            "scores": [float(2**at), 0.0],
            "costs": [4096.0, 8192.0],
            "importance": float(2**at),
            "rank": at + 1,
        }
        for at, name in enumerate(GROUPS)
    },
    "sensitivity_ranking": [{"name": f"{name}.quant_recipe", "importance": 1.0} for name in GROUPS],
}
ROW = f"{GROUPS[1]}.quant_recipe"
Key = tuple[str, ...]


def keys_of(manifest: dict[str, Any]) -> list[Key]:
    """Return the path of every key of a manifest; of one row and one layer among many."""
    found: list[Key] = []
    for name, value in manifest.items():
        found.append((name,))
        inner = value if isinstance(value, dict) else {}
        if name in ("layers", "layer_sensitivity"):
            first = next(iter(inner))
            found += [(name, first), *((name, first, key) for key in inner[first])]
        else:
            found += [(name, key) for key in inner]
    return found


def without(manifest: dict[str, Any], *keys: Key) -> dict[str, Any]:
    """Return a copy that lacks ``keys``."""
    changed = copy.deepcopy(manifest)
    for *parents, leaf in keys:
        node = changed
        for parent in parents:
            node = node.get(parent, {})
        node.pop(leaf, None)
    return changed


def reported(manifest: Any, directory: Path) -> str:
    """Write a manifest and its reports; return the Markdown."""
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    (directory / NAME).write_text(text)
    report(directory)
    return (directory / "per-layer-sensitivity.md").read_text(encoding="utf-8")


def is_reported_or_named(manifest: dict[str, Any], directory: Path) -> bool:
    """Return whether it is reported; else one message names what is wrong with its rows."""
    try:
        text = reported(manifest, directory)
    except Damaged as error:
        text = error.what
    assert "\n" not in text or text.startswith("# Layer sensitivity: ")
    assert "\n" in text or "layer_sensitivity" in text
    return "\n" in text


REQUIRED = {
    ("layer_sensitivity",),
    *(("layer_sensitivity", f"{GROUPS[0]}.quant_recipe", key) for key in ("formats", "scores")),
}


def test_only_the_rows_are_required(tmp_path: Path) -> None:
    keys = keys_of(OLDER)
    assert len(keys) > 30
    for taken in itertools.chain(((key,) for key in keys), itertools.combinations(keys, 2)):
        changed = without(OLDER, *taken)
        row = changed.get("layer_sensitivity", {}).get(f"{GROUPS[0]}.quant_recipe", {})
        broken = "layer_sensitivity" not in changed or (row and not {"formats", "scores"} <= {*row})
        assert is_reported_or_named(changed, tmp_path) is not bool(broken), taken


def test_what_is_missing_is_unknown(tmp_path: Path) -> None:
    bare = {"layer_sensitivity": OLDER["layer_sensitivity"]}
    text = reported(bare, tmp_path)
    assert text.startswith("# Layer sensitivity: unknown\n")
    for line in (
        "| Scheme | unknown |",
        "| Formats | unknown |",
        "| Model | unknown |",
        "| Samples scored at most | unknown |",
        "| Coverage | unknown, unknown |",
        "| Effective bits | target unknown |",
        "| Total sensitivity | 1.500e+01 |",  # 1 + 2 + 4 + 8
    ):
        assert line in text, line
    half = reported(without(OLDER, ("scheme", "quant_formats"), ("model", "id")), tmp_path)
    assert "| Dataset | captions, medium |" in half
    assert "| Samples | unknown asked, unknown used, unknown scored |" in half
    page = (tmp_path / "per-layer-sensitivity.html").read_text(encoding="utf-8")
    assert "None" not in page.partition("<script")[0]


def test_what_is_something_else_is_unknown_too(tmp_path: Path) -> None:
    for name in set(OLDER) - {"layer_sensitivity"}:
        for other in (None, 7, "text", [], [[]], {"a": {"b": 1}}, 10**400, math.nan):
            assert is_reported_or_named(OLDER | {name: other}, tmp_path), (name, other)


def test_order_and_unknown_keys_do_not_matter(tmp_path: Path) -> None:
    def more(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        items = [(key, more(value)) for key, value in reversed(node.items())]
        return dict(items)

    changed = more(OLDER)
    for section in (changed, *(changed[name] for name in ("scheme", "model", "autoquant_state"))):
        section["of somebody else"] = {"deep": [1, {"er": None}]}
    for row in changed["layer_sensitivity"].values():
        row["of somebody else"] = math.nan
    assert reported(changed, tmp_path) == reported(OLDER, tmp_path)


@pytest.mark.parametrize("key", ["formats", "scores", "costs"])
@pytest.mark.parametrize("value", [[], "text", 7, {}, [{}], [[1.0]]])
def test_a_broken_row_is_named_with_its_key(key: str, value: Any, tmp_path: Path) -> None:
    changed = copy.deepcopy(OLDER)
    changed["layer_sensitivity"][ROW][key] = value
    (tmp_path / NAME).write_text(json.dumps(changed))
    ran = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert isinstance(ran.exception, Damaged)
    assert ran.exception.exit_code == 2
    assert f"layer_sensitivity.{ROW}.{key}" in ran.exception.what


@pytest.mark.parametrize("rows", [None, [], {}, 7, {"a": 7}, {"a": {}}, {"a": None}])
def test_rows_that_are_none_are_refused(rows: Any, tmp_path: Path) -> None:
    assert not is_reported_or_named(OLDER | {"layer_sensitivity": rows}, tmp_path)


@pytest.mark.parametrize("score", [1e308, -1e308, math.inf, -math.inf, math.nan])
def test_scores_beyond_any_sum_are_no_scores(score: float, tmp_path: Path) -> None:
    changed = copy.deepcopy(OLDER)
    for row in list(changed["layer_sensitivity"].values())[:3]:
        row["scores"][0] = row["costs"][0] = score
    text = reported(changed, tmp_path)
    assert "**INCOMPLETE:** 3 groups could not be scored" in text
    assert "| Total sensitivity | 8.000e+00 |" in text


@pytest.mark.parametrize("bits", ["9" * 5000, ".", "1.2.3", "1e999", "-1", "", "٣"])
def test_bits_that_are_none_are_not_known(bits: str, tmp_path: Path) -> None:
    changed = copy.deepcopy(OLDER)
    changed["layer_sensitivity"][ROW]["formats"][0] = f"X(effective-bits: {bits})"
    reported(changed, tmp_path)
    assert read_manifest(tmp_path / NAME).layer_sensitivity[ROW].num_bits is None


def test_numbers_in_names_may_be_of_any_length(tmp_path: Path) -> None:
    changed = copy.deepcopy(OLDER)
    name = f"model.layers.{'9' * 5000}.mlp.down_proj.quant_recipe"
    changed["layer_sensitivity"][name] = changed["layer_sensitivity"].pop(ROW)
    assert is_reported_or_named(changed, tmp_path)
    assert read_manifest(tmp_path / NAME).layer_sensitivity[name].depth is None


@pytest.mark.parametrize("name", ["\x1b[2J\x07", "\n# a\r", "\u202e", ""])
def test_names_may_hold_anything(name: str, tmp_path: Path) -> None:
    changed = json.loads(json.dumps(OLDER).replace("some-model", json.dumps(name)[1:-1]))
    for section, key in (("scheme", "name"), ("dataset", "name"), ("scheme", "coverage_mode")):
        changed[section][key] = name
    changed["layer_sensitivity"][name] = changed["layer_sensitivity"].pop(ROW)
    text = reported(changed, tmp_path)
    page = (tmp_path / "per-layer-sensitivity.html").read_text(encoding="utf-8")
    for written in (text, page):
        assert not {"\x1b", "\x07", "\u202e"} & {*written}
    assert "| Total sensitivity | 1.500e+01 |" in text


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000 + "]" * 100_000,
        json.dumps(OLDER | {"deep": json.loads("[" * 400 + "]" * 400)}),
        json.dumps(OLDER).replace("8.5", "9" * 5000),
        json.dumps(OLDER).replace("0.o_proj", "\\ud800"),
        "",
        "[]",
        "7",
        "null",
    ],
)
def test_what_is_no_manifest_is_one_message(text: str, tmp_path: Path) -> None:
    with pytest.raises(Damaged) as caught:
        reported(text, tmp_path)
    assert str(tmp_path / NAME) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"formats": FORMATS[1:], "scores": [0.0]}, "4 groups left unquantized (disabled)"),
        ({"scores": [0.0, 0.0]}, "4 groups with a score of exactly 0"),
        ({"scores": [None, 0.0]}, "4 groups whose score is no finite number"),
    ],
)
def test_where_nothing_was_measured_the_first_screen_says_so(
    changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    changed = copy.deepcopy(OLDER)
    for row in changed["layer_sensitivity"].values():
        row.update(changes)
    text = reported(changed, tmp_path)
    said = next(line for line in text.splitlines() if "NOTHING WAS MEASURED" in line)
    assert why in said
    assert text.index(said) < text.index("| Scheme |")
    page = (tmp_path / "per-layer-sensitivity.html").read_text(encoding="utf-8")
    assert page.index(why) < page.index("Total sensitivity")
    assert "Complete</span>" not in page
    assert "NOTHING WAS MEASURED" not in reported(OLDER, tmp_path)


def test_two_older_manifests_that_say_little_are_compared(tmp_path: Path) -> None:
    bare = {"layer_sensitivity": OLDER["layer_sensitivity"]}
    for name, manifest in (("one", bare), ("other", OLDER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / NAME).write_text(json.dumps(manifest))
    ran = CliRunner().invoke(
        app, ["compare", str(tmp_path / "one"), str(tmp_path / "other"), "--json"]
    )
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert found["cells"][0]["spearman"] == pytest.approx(1.0)
    # What one does not record is no value that it had.
    assert {entry["before"] for entry in found["differences"]} == {None}


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="no published manifests beside the checkout")
@pytest.mark.parametrize("path", sorted(REFERENCE.glob("*.json")), ids=lambda path: path.stem)
def test_published_manifests_are_read_without_any_key(path: Path, tmp_path: Path) -> None:
    whole = json.loads(path.read_text(encoding="utf-8"))
    rows = list(whole["layer_sensitivity"].items())
    few = whole | {"layer_sensitivity": dict([*rows[:3], *rows[-5:]])}
    keys = keys_of(few)
    for taken in [(), *((key,) for key in keys), *itertools.combinations(keys, 2)]:
        changed = without(few, *taken)
        row = changed.get("layer_sensitivity", {}).get(rows[0][0], {})
        (tmp_path / NAME).write_text(json.dumps(changed))
        if "layer_sensitivity" not in changed or (row and not {"formats", "scores"} <= {*row}):
            with pytest.raises(Damaged, match="layer_sensitivity"):
                read_manifest(tmp_path / NAME)
        else:
            assert facts(build_cell(read_manifest(tmp_path / NAME)))
    for key in [(), *((name,) for name in whole if name != "layer_sensitivity")]:
        assert is_reported_or_named(without(whole, key) if key else whole, tmp_path)
    assert is_reported_or_named(dict(reversed(whole.items())) | {"more": [1]}, tmp_path)
