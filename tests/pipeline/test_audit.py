"""Audits of a real sweep of the demo checkpoint, through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qsens.analysis.audit import judge
from qsens.documents import dump_document, dump_json
from qsens.pipeline.audit import find_audits
from qsens.results import read_manifest
from qsens.schema.audit import Audit, Point, digest_of
from qsens.store import Store
from tests.pipeline import results

if TYPE_CHECKING:
    from qsens.demo.checkpoint import DemoResult

REPO = Path(__file__).resolve().parents[2]
# 2 bits and one scale for weights and inputs: the outputs are of another size altogether.
BROKEN = """\
weight: int2
activation: int2
format: BROKEN
effective_bits: 2
experimental: true
weight_quantizer: {num_bits: 2, axis: null}
input_quantizer: {num_bits: 2, axis: null}
"""


@dataclass
class Place:
    """A results root with a plan in it."""

    root: Path

    def json(self, *words: str, code: int = 0) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "qsens", *words, "--json"],
            env={
                **os.environ,
                "QSENS_ROOT": str(REPO),
                "QSENS_RESULTS": str(self.root / "results"),
                "QSENS_CONFIG_DIR": str(self.root / "configs"),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def place(demo_checkpoint: DemoResult, tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = Place(tmp_path_factory.mktemp("audit"))
    pairs = made.root / "configs" / "quant_pair"
    pairs.mkdir(parents=True)
    (pairs / "wint2_aint2.yaml").write_text(BROKEN)
    words = [
        "demo-text",
        f"model.path={demo_checkpoint.directory}",
        "quant_pair=wint8_aint8,wfp4_afp16,wint2_aint2",
        "dataset.size=small,medium",
    ]
    for method in ("fisher", "kl_div"):
        plan = str(made.root / f"{method}.json")
        sizes = [] if method == "fisher" else ["dataset.size=small"]
        made.json("plan", *words, *sizes, f"autoquant.method={method}", "--out", plan)
        made.json("score", "--plan", plan, "--cell", "wint8_aint8-small")
    return made


@pytest.fixture(scope="module")
def audited(place: Place) -> Any:
    # The broken pair makes the answer no.
    return place.json("audit", "--plan", str(place.root / "fisher.json"), code=3)


def test_truth_is_method_kl_div(place: Place, audited: Any) -> None:
    assert audited["missing"] == []
    plan = json.loads((place.root / "kl_div.json").read_text())
    digests = {cell["cell"]: cell["digest"] for cell in plan["cells"]}
    for entry in audited["audits"]:
        manifest = place.root / "results/.cells" / digests[entry["cell"]] / "manifest.json"
        rows = json.loads(manifest.read_text())["layer_sensitivity"]
        assert len(entry["points"]) == 12
        for point in entry["points"]:
            known = rows[f"{point['layer']}.quant_recipe"]["sensitivity_per_token"]
            assert point["truth"] == pytest.approx(known, rel=1e-9)


def test_the_choice_holds_the_top_and_the_head(place: Place, audited: Any) -> None:
    plan = json.loads((place.root / "fisher.json").read_text())
    for entry in audited["audits"]:
        assert entry["size"] == "small"
        (digest,) = (c["digest"] for c in plan["cells"] if c["cell"] == entry["cell"])
        manifest = place.root / "results/.cells" / digest / "manifest.json"
        rows = json.loads(manifest.read_text())["layer_sensitivity"]
        scores = {
            name.removesuffix(".quant_recipe"): row["sensitivity_per_token"]
            for name, row in rows.items()
            if row["status"] == "scored"
        }
        order = sorted(scores, key=scores.__getitem__, reverse=True)
        names = [point["layer"] for point in entry["points"]]
        assert names[:5] == order[:5]
        assert "lm_head" in names
        assert names == [name for name in order if name in names]
        assert all(point["estimate"] == scores[point["layer"]] for point in entry["points"])
        assert all(point["standard_error"] is not None for point in entry["points"])


def test_verdicts(audited: Any) -> None:
    verdicts = {entry["pair"]: entry["judgement"]["verdict"] for entry in audited["audits"]}
    assert verdicts["wint2_aint2"] == "do not trust"
    assert verdicts["wint8_aint8"] != "do not trust"
    assert verdicts["wfp4_afp16"] != "do not trust"


def test_an_audit_is_not_made_twice_but_extended(place: Place, audited: Any) -> None:
    plan = str(place.root / "fisher.json")
    again = place.json("audit", "--plan", plan, "--pair", "wint8_aint8")
    (entry,) = again["audits"]
    assert entry == next(e for e in audited["audits"] if e["pair"] == "wint8_aint8")
    fewer = place.json("audit", "--plan", plan, "--pair", "wint8_aint8", "--groups", "8")
    assert fewer == again
    more = place.json("audit", "--plan", plan, "--pair", "wint8_aint8", "--full")
    assert more["audits"][0]["mode"] == "full"
    assert len(more["audits"][0]["points"]) == 17


@pytest.fixture(scope="module")
def published(place: Place, audited: Any) -> Any:
    return place.json("publish", "--plan", str(place.root / "fisher.json"))


def test_published_with_the_sweep(place: Place, audited: Any) -> None:
    plan = json.loads((place.root / "fisher.json").read_text())
    digests = {cell["cell"]: cell["digest"] for cell in plan["cells"]}
    scored = {
        cell: (place.root / "results/.cells" / digest / "manifest.json").read_bytes()
        for cell, digest in digests.items()
    }
    published = place.json("publish", "--plan", str(place.root / "fisher.json"))
    summary = json.loads((Path(published["index"]).parent / "summary.json").read_text())
    verdicts = {entry["pair"]: entry["judgement"]["verdict"] for entry in summary["audit"]}
    assert verdicts["wint2_aint2"] == "do not trust"
    assert len(verdicts) == 3
    for cell in published["cells"]:
        pair = cell["cell"].split("-")[0]
        manifest = json.loads(Path(cell["manifest"]).read_text())
        # The copy says what was found later; the result itself is as it was scored.
        found = manifest.pop("audit")
        (entry,) = (entry for entry in summary["audit"] if entry["pair"] == pair)
        assert found == entry
        assert found["cell_digest"] == digests[f"{pair}-small"]
        assert len(found["digest"]) == 64
        result = place.root / "results/.cells" / digests[cell["cell"]] / "manifest.json"
        assert result.read_bytes() == scored[cell["cell"]]
        # Each has a checksum of its own, which reading checks.
        assert read_manifest(Path(cell["manifest"])).verified
        kept = json.loads(scored[cell["cell"]])
        assert kept.pop("checksum") != manifest.pop("checksum")
        assert kept == manifest | {"audit": None}
        folder = Path(cell["manifest"]).parent
        reports = {
            path: path.read_bytes() for path in sorted(folder.glob("per-layer-sensitivity.*"))
        }
        report = json.loads((folder / "per-layer-sensitivity.json").read_text())
        assert report["audit"]["pair"] == pair
        assert report["audit"]["judgement"]["verdict"] == verdicts[pair]
        assert f"{verdicts[pair]}: " in (folder / "per-layer-sensitivity.md").read_text()
        # Made again from the directory alone, the audit included.
        for path in reports:
            path.unlink()
        place.json("report", str(folder))
        assert {path: path.read_bytes() for path in reports} == reports
    # What was found about the scores makes no other result of them.
    assert all(cell["done"] for cell in _planned(place, plan))


def _planned(place: Place, plan: Any) -> Any:
    """Return the cells of a new plan over the same grid."""
    words = [f"model.path={plan['checkpoint']['path']}", "autoquant.method=fisher"]
    words += ["quant_pair=wint8_aint8,wfp4_afp16,wint2_aint2", "dataset.size=small,medium"]
    return place.json("plan", "single", *words)["cells"]


def _recipe(place: Place, published: Any, *words: str, code: int = 0) -> Any:
    directory = str(Path(published["index"]).parent)
    return place.json("recipe", directory, "--bits", "9", "--to", "json", *words, code=code)


def _rows(published: Any, cell: str) -> dict[str, Any]:
    summary = json.loads((Path(published["index"]).parent / "summary.json").read_text())
    (found,) = (entry for entry in summary["cells"] if entry["cell"] == cell)
    return {row["layer"]: row for row in found["rows"]}


def test_a_recipe_divides_estimates_that_are_off_by_their_ratio(
    place: Place, published: Any, tmp_path: Path
) -> None:
    summary = json.loads((Path(published["index"]).parent / "summary.json").read_text())
    # Estimates of one pair are made too small, as a second order that misses something would.
    (entry,) = (entry for entry in summary["audit"] if entry["pair"] == "wfp4_afp16")
    for point in entry["points"]:
        point["truth"] = 1.1 * max(point["estimate"], point["truth"])
    entry["judgement"] |= {"ratio": 0.9, "verdict": "trust"}
    off = {"wfp4_afp16": 0.9}
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "summary.json").write_text(dump_document(summary))
    (sweep / "plan.json").write_bytes((Path(published["index"]).parent / "plan.json").read_bytes())
    (tmp_path / "some.txt").write_text("A red cube on a table.\nTwo green balls in a box.\n")
    answer = _recipe(
        place,
        {"index": str(sweep / "index.html")},
        "--check",
        "--captions",
        str(tmp_path / "some.txt"),
        "--tied-head",
    )
    (left_out,) = answer["left_out"]
    assert left_out["format"] == "wint2_aint2"
    assert "not to be trusted" in left_out["reason"]
    recipe = json.loads(answer["recipe"])
    assert {choice["format"] for choice in recipe["choices"]} == {"wint8_aint8", "wfp4_afp16", None}
    for choice in recipe["choices"]:
        if choice["format"] is None:
            continue
        (group,) = choice["groups"]
        row = _rows(published, f"{choice['format']}-medium")[group]
        price = recipe["prices"][choice["format"]]
        ratio = off.get(choice["format"])
        assert price["source"] == ("corrected estimates" if ratio else "estimates")
        assert price["ratio"] == ratio
        damage = row["sensitivity_per_token"] / (ratio or 1.0)
        assert choice["damage"] == pytest.approx(damage)
    # By fisher the prediction is one of the divergence; on the captions that were scored, what
    # parts the two is the interaction of groups and what the estimates are off by.
    assert answer["damage_unit"] == "nats a token"
    ours = answer["check"]["measured"][0]
    assert (ours["name"], ours["predicted"]) == ("recipe", recipe["damage"])
    assert answer["check"]["scored"] == 128
    assert 0.6 < ours["scored"] / ours["predicted"] < 1.5


def test_a_pair_measured_in_full_is_priced_by_the_truth(place: Place, published: Any) -> None:
    plan = str(place.root / "fisher.json")
    full = place.json("audit", "--plan", plan, "--pair", "wint2_aint2", "--full", code=3)
    (entry,) = full["audits"]
    truth = {point["layer"]: point["truth"] for point in entry["points"]}
    answer = _recipe(place, place.json("publish", "--plan", plan), "--pairs", "wint2_aint2")
    recipe = json.loads(answer["recipe"])
    assert recipe["prices"]["wint2_aint2"]["source"] == "true divergences"
    assert recipe["prices"]["wint2_aint2"]["verdict"] == "do not trust"
    used = [choice for choice in recipe["choices"] if choice["format"] is not None]
    assert used
    assert all(choice["damage"] == truth[choice["groups"][0]] for choice in used)


def test_the_truth_needs_no_audit(place: Place) -> None:
    answer = place.json("audit", "--plan", str(place.root / "kl_div.json"), code=2)
    assert "true KL divergence already" in answer["what"]
    answer = place.json(
        "audit", "--plan", str(place.root / "fisher.json"), "--pair", "wnone", code=2
    )
    assert "no pair 'wnone'" in answer["what"]


def test_a_sweep_audits_where_it_is_told_to(place: Place) -> None:
    published = place.json(
        "sweep",
        "demo-text",
        f"model.path={json.loads((place.root / 'fisher.json').read_text())['checkpoint']['path']}",
        "quant_pair=wfp8_afp16",
        "dataset.size=small",
        "autoquant.audit=sample",
    )
    summary = json.loads((Path(published["index"]).parent / "summary.json").read_text())
    (entry,) = summary["audit"]
    assert entry["method"] == "gradient"
    assert entry["judgement"]["ratio"] is None
    assert entry["judgement"]["verdict"] in ("rank only", "do not trust")


def test_an_older_audit_of_gradient_is_judged_by_what_places_groups(tmp_path: Path) -> None:
    made = results.whole(results.plan(tmp_path, day=1, dtype="float32"), seed=1)
    store = Store(made)
    cell = made.cell("wint8_afp16-small")
    manifest = json.loads(store.manifest(cell).read_text())
    # The truth has the order of the sensitivities, and the reverse of that per token.
    points = []
    for at, layer in enumerate(results.LAYERS):
        row = manifest["layer_sensitivity"][f"{layer}.quant_recipe"]
        row |= {"sensitivity": 7.0 * (at + 1), "sensitivity_per_token": 100.0 - at}
        points.append(
            Point(
                layer=layer, kind="down", estimate=100.0 - at, standard_error=None, truth=1.0 + at
            )
        )
    store.manifest(cell).write_text(dump_document(manifest))
    older = Audit(
        cell=cell.cell,
        pair=cell.pair,
        granularity=cell.granularity,
        size=cell.size,
        cell_digest=cell.digest,
        method="gradient",
        mode="full",
        samples=16,
        points=tuple(points),
        judgement=judge(points, in_nats=False),
        seconds=1.0,
        device="cpu",
    )
    assert older.judgement.verdict == "do not trust"
    older = older.model_copy(update={"digest": digest_of(older)})
    store.audit(cell).parent.mkdir(parents=True, exist_ok=True)
    data = older.model_dump(mode="json", exclude={"statistic", "measured_kl", "checksum"})
    store.audit(cell).write_text(dump_json({**data, "schema_version": 1}))
    (found,) = find_audits(store)
    assert found.statistic == "sensitivity"
    assert [point.estimate for point in found.points] == [7.0 * (at + 1) for at in range(12)]
    assert [point.truth for point in found.points] == [1.0 + at for at in range(12)]
    assert (found.judgement.rho, found.judgement.verdict) == (1.0, "rank only")
    assert found.digest == digest_of(found) != older.digest
