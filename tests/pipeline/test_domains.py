"""Sweeps of several data sets: each under its own amax, and all together under those of all."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qsens.config import Roots
from qsens.errors import UserError
from qsens.grid import Plan, read_plan
from qsens.pipeline.audit import audit
from qsens.pipeline.cell import calibrate, score
from qsens.pipeline.evaluate_recipe import held_out
from qsens.pipeline.plan import plan_json, plan_sweep
from qsens.pipeline.recipe import write_recipe
from qsens.pipeline.sweep import run_sweep
from qsens.results import read_manifest
from qsens.schema.manifest import Manifest
from qsens.store import Store
from tests.checkpoint.tiny_families import configuration, save

# No word of the one is a word of the other.
SHAPES = ["a", "red", "circle", "left", "of", "blue", "square", "above", "and", "green"]
COUNTS = ["two", "three", "circles", "squares"]
SIZES = {"small": 6, "medium": 20}
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
NAMES = ("shapes", "counts", "chats")
PAIRS = "wfp8_afp8,wint8_afp16"


def texts(words: list[str], seed: int, longest: int = 9) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=rng.randint(3, longest))) for _ in range(24)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with three data sets, and files that choose them."""
    place = tmp_path_factory.mktemp("domains")
    save(configuration("Llama", tied=False), place / "llama")
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place / "llama")
    files = {
        "shapes": [{"text": text} for text in texts(SHAPES, 1)],
        "counts": [{"text": text} for text in texts(COUNTS, 2, longest=5)],
        "chats": [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
            for a, b in zip(texts(SHAPES, 3), texts(COUNTS, 4), strict=True)
        ],
    }
    (place / "configs" / "dataset").mkdir(parents=True)
    for name, records in files.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (place / f"{name}.jsonl").write_text(lines)
        chosen = {
            "name": name,
            "directory": str(place),
            "files": dict.fromkeys(SIZES, f"{name}.jsonl"),
            "sizes": SIZES,
        }
        (place / "configs" / "dataset" / f"{name}.yaml").write_text(yaml.safe_dump(chosen))
    return place


def planned(place: Path, results: Path, datasets: str, *overrides: str) -> Plan:
    roots = Roots.from_environment()
    return plan_sweep(
        "single",
        [
            f"dataset={datasets}",
            f"model.path={place / 'llama'}",
            "model.dtype=float32",
            f"quant_pair={PAIRS}",
            "dataset.size=small,medium",
            "autoquant.device=cpu",
            "autoquant.score_size=10",
            "autoquant.batch_size=4",
            *overrides,
        ],
        roots=Roots(root=roots.root, results=results, configs=(place / "configs", *roots.configs)),
    )


def manifests(plan: Plan) -> dict[str, Manifest]:
    _, errors = run_sweep(plan)
    assert errors == []
    store = Store(plan)
    return {cell.cell: read_manifest(store.manifest(cell)) for cell in plan.cells}


def numbers(manifest: Manifest) -> dict[str, tuple[Any, ...]]:
    return {
        name: (
            group.sensitivity,
            group.sensitivity_per_token,
            group.standard_error,
            group.relative_error,
        )
        for name, group in manifest.layer_sensitivity.items()
    }


@pytest.mark.parametrize("method", ["gradient", "fisher", "kl_div"])
def test_each_data_set_scores_as_in_a_sweep_of_its_own(
    place: Path, tmp_path: Path, method: str
) -> None:
    chosen = f"autoquant.method={method}"
    together = manifests(planned(place, tmp_path / "all", ",".join(NAMES), chosen))
    assert len(together) == 2 * 2 * (len(NAMES) + 1)
    for name in NAMES:
        alone = manifests(planned(place, tmp_path / name, name, chosen))
        for cell, manifest in alone.items():
            pair, size = cell.rsplit("-", 1)
            own = together[f"{pair}-{name}-{size}"]
            found, expected = numbers(own), numbers(manifest)
            assert found.keys() == expected.keys()
            for layer, values in expected.items():
                assert [v is None for v in found[layer]] == [v is None for v in values]
                # More products go through at once, which some processors round otherwise.
                known = [v or 0.0 for v in values]
                assert [v or 0.0 for v in found[layer]] == pytest.approx(known, rel=1e-5)
            assert own.dataset == manifest.dataset


def test_together_they_score_under_the_amax_of_all(place: Path, tmp_path: Path) -> None:
    plan = planned(place, tmp_path, ",".join(NAMES), "autoquant.method=fisher")
    found = manifests(plan)
    store = Store(plan)
    states = {cell.cell: load_file(store.state(cell)) for cell in plan.cells}
    for size in SIZES:
        union = states[f"wfp8_afp8-{size}"]
        parts = [states[f"wfp8_afp8-{name}-{size}"] for name in NAMES]
        amax = [key for key in union if key.startswith("amax.")]
        assert amax
        for key in amax:
            assert union[key] == max(part[key] for part in parts)
        # Weights alone know no amax: the same samples have the same scores.
        union = states[f"wint8_afp16-{size}"]
        parts = [states[f"wint8_afp16-{name}-{size}"] for name in NAMES]
        for key in ("per_sample", "label_tokens", "loss"):
            assert torch.equal(union[key], torch.cat([part[key] for part in parts], dim=-1))
        lengths = [len(part["label_tokens"]) for part in parts]
        assert union["domain"].tolist() == [at for at, n in enumerate(lengths) for _ in range(n)]
        whole = found[f"wint8_afp16-{size}"]
        for layer, group in whole.layer_sensitivity.items():
            assert group.by_domain is not None
            own = {
                name: found[f"wint8_afp16-{name}-{size}"]
                .layer_sensitivity[layer]
                .sensitivity_per_token
                for name in NAMES
            }
            assert group.by_domain == pytest.approx(own, rel=1e-12)
        assert whole.dataset is not None
        assert whole.dataset.name == "shapes+counts+chats"
        assert [part.name for part in whole.dataset.domains] == list(NAMES)
        assert whole.dataset.samples_scored == sum(lengths)


def test_one_data_set_has_the_names_of_before(place: Path, tmp_path: Path) -> None:
    plan = planned(place, tmp_path, "shapes")
    assert [cell.cell for cell in plan.cells][:2] == ["wfp8_afp8-small", "wfp8_afp8-medium"]
    assert {cell.domain for cell in plan.cells} == {None}
    several = planned(place, tmp_path, "shapes,chats")
    directories = {cell.cell: cell.run_dir for cell in several.cells}
    assert directories["wfp8_afp8-shapes-small"] == "llama_autoquant_wfp8_afp8_lm_shapes_small"
    assert directories["wfp8_afp8-small"] == "llama_autoquant_wfp8_afp8_lm_small"
    # What is calibrated on one is what a sweep of it calibrates.
    assert {cell.calibration for cell in several.cells if cell.domain == "shapes"} == {
        cell.calibration for cell in plan.cells
    }


def test_steps_find_what_others_left(place: Path, tmp_path: Path) -> None:
    plan = planned(place, tmp_path / "a", "shapes,chats")
    by_steps: dict[str, Any] = {}
    assert calibrate(plan, "wfp8_afp8-small")["computed"]
    # Those of single data sets were calibrated with it, or on the way of another size.
    for cell in plan.cells:
        calibrate(plan, cell.cell)
    for cell in plan.cells:
        by_steps[cell.cell] = score(plan, cell.cell)["computed"]
    assert list(by_steps.values()).count(True) == 1
    at_once = manifests(planned(place, tmp_path / "b", "shapes,chats"))
    store = Store(plan)
    for cell in plan.cells:
        assert numbers(read_manifest(store.manifest(cell))) == numbers(at_once[cell.cell])


def test_a_plan_is_read_as_it_was_written(place: Path, tmp_path: Path) -> None:
    for names in ("shapes", "shapes,chats"):
        plan = planned(place, tmp_path, names)
        path = tmp_path / "plan.json"
        path.write_text(plan_json(plan))
        assert read_plan(path).cells == plan.cells


@pytest.fixture
def specialist(place: Path, tmp_path: Path) -> Path:
    """A checkpoint whose second MLP does nothing but for words that count."""
    path = tmp_path / "llama"
    model = AutoModelForCausalLM.from_pretrained(place / "llama", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    with torch.no_grad():
        # The first dimension says whether a word counts, in every layer: none writes to it.
        model.model.embed_tokens.weight[:, 0] = 0
        counting = tokenizer.convert_tokens_to_ids(COUNTS)
        model.model.embed_tokens.weight[counting, 0] = 2
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        mlp = model.model.layers[1].mlp
        mlp.up_proj.weight[:, 1:] = 0
        mlp.down_proj.weight *= 6
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_layer_that_serves_one_data_set_is_named(
    place: Path, specialist: Path, tmp_path: Path
) -> None:
    plan = planned(
        place,
        tmp_path / "results",
        "shapes,counts",
        f"model.path={specialist}",
        "autoquant.method=fisher",
        "autoquant.score_size=20",
        "quant_pair=wint8_afp16",
        "output_layout=publish",
    )
    published, errors = run_sweep(plan)
    assert errors == []
    directory = Path(published["index"]).parent
    summary = json.loads((directory / "summary.json").read_text())
    (compared,) = summary["domains_compared"]
    assert (compared["one"], compared["other"], compared["groups"]) == ("shapes", "counts", 9)
    named = {(entry["domain"], entry["layer"]) for entry in summary["alone_in_domain"]}
    assert ("counts", "model.layers.1.mlp.down_proj") in named
    assert ("shapes", "model.layers.1.mlp.down_proj") not in named
    text = (directory / "summary.md").read_text()
    assert "## Data sets against each other" in text
    assert "| counts | model.layers.1.mlp.down_proj | wint8_afp16 |" in text


@pytest.fixture(scope="module")
def swept(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    results = tmp_path_factory.mktemp("results")
    plan = planned(
        place,
        results,
        "shapes,counts",
        "quant_pair=wint8_afp16,wfp4_afp16,wint4_afp16",
        "autoquant.method=fisher",
        "output_layout=publish",
    )
    published, errors = run_sweep(plan)
    assert errors == []
    return plan, Path(published["index"]).parent


def written(swept: tuple[Plan, Path], **options: Any) -> Mapping[str, Any]:
    return write_recipe(str(swept[1]), bits=7, target="json", **options)


def test_a_mix_is_scored_by_its_shares(swept: tuple[Plan, Path]) -> None:
    by_tokens = written(swept)
    alone = {name: written(swept, mix=f"{name}=1") for name in ("shapes", "counts")}
    for name, of_one in alone.items():
        entries = {entry["name"]: entry for entry in of_one["domains"]}
        assert of_one["damage"] == pytest.approx(entries[name]["damage"], rel=1e-9)
        assert entries[name]["damage"] == pytest.approx(entries[name]["best"], rel=1e-9)
        assert all(e["damage"] >= e["best"] * (1 - 1e-9) for e in by_tokens["domains"])
    # Shares are of each other: 3 to 1.
    mix = written(swept, mix="shapes=3, counts=1")
    by_name = {entry["name"]: entry for entry in mix["domains"]}
    assert [by_name[name]["share"] for name in ("shapes", "counts")] == [0.75, 0.25]
    expected = 0.75 * by_name["shapes"]["damage"] + 0.25 * by_name["counts"]["damage"]
    assert mix["damage"] == pytest.approx(expected, rel=1e-9)
    # Its own choice is no worse for it than that of either alone.
    for of_one in alone.values():
        other = {entry["name"]: entry["damage"] for entry in of_one["domains"]}
        assert mix["damage"] <= 0.75 * other["shapes"] + 0.25 * other["counts"] + 1e-12


def test_the_worst_case_is_worst_for_no_data_set(swept: tuple[Plan, Path]) -> None:
    def worst(recipe: Mapping[str, Any]) -> float:
        return max(entry["damage"] / entry["best"] for entry in recipe["domains"])

    least = worst(written(swept, worst_case=True))
    assert least >= 1
    for mix in (None, "shapes=1", "counts=1", "shapes=1,counts=1"):
        assert least <= worst(written(swept, mix=mix)) * (1 + 1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mix": "chats=1"}, "has no data set 'chats'"),
        ({"mix": "shapes"}, "'shapes' is no data set with a share"),
        ({"mix": "shapes=1,shapes=2"}, "'shapes=2' is no data set with a share"),
        ({"mix": "shapes=-1"}, "'shapes=-1' is no data set with a share"),
        ({"mix": "shapes=nan"}, "'shapes=nan' is no data set with a share"),
        ({"mix": "shapes=0"}, "adds up to nothing"),
        ({"mix": "shapes=1", "worst_case": True}, "the worst case does not"),
    ],
)
def test_a_mix_that_is_none(swept: tuple[Plan, Path], options: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        written(swept, **options)


def test_one_data_set_has_no_mix(place: Path, tmp_path: Path) -> None:
    plan = planned(place, tmp_path, "shapes", "autoquant.method=fisher", "output_layout=publish")
    published, _ = run_sweep(plan)
    for options in ({"mix": "shapes=1"}, {"worst_case": True}):
        with pytest.raises(UserError, match="one data set"):
            write_recipe(
                str(Path(published["index"]).parent),
                bits=9,
                target="json",
                **options,  # type: ignore[arg-type]
            )


def test_the_audit_is_of_all_together(place: Path, tmp_path: Path) -> None:
    chosen = ("quant_pair=wfp8_afp8", "dataset.size=small", "autoquant.method=fisher")
    plan = planned(place, tmp_path / "both", "shapes,counts", *chosen)
    manifests(plan)
    (made,) = audit(plan, full=True)["audits"]
    assert made["cell"] == "wfp8_afp8-small"
    # The same divergences, measured by the method that measures them.
    truth = planned(place, tmp_path / "kl", "shapes,counts", *chosen[:2], "autoquant.method=kl_div")
    measured = manifests(truth)["wfp8_afp8-small"].layer_sensitivity
    for point in made["points"]:
        expected = measured[f"{point['layer']}.quant_recipe"].sensitivity_per_token
        assert point["truth"] == pytest.approx(expected, rel=1e-4)


def test_what_is_held_out_is_of_every_data_set(swept: tuple[Plan, Path]) -> None:
    left = held_out(swept[0], "text")
    for name, every in (("shapes", texts(SHAPES, 1)), ("counts", texts(COUNTS, 2, longest=5))):
        unused = [text for text in every[20:] if text not in every[:20]]
        assert [record.caption for record in left[name]] == unused != []


@pytest.mark.parametrize(
    ("datasets", "overrides", "said"),
    [
        ("shapes,shapes", (), "dataset names shapes twice"),
        ("shapes,chats", ("autoquant.engine=modelopt",), "engine=modelopt calibrates"),
        ("shapes,demo", ("dataset.modality=image_text",), "names none"),
        ("shapes,nothing", (), "unknown dataset 'nothing'"),
    ],
)
def test_data_sets_that_do_not_go_together(
    place: Path, tmp_path: Path, datasets: str, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        planned(place, tmp_path, datasets, *overrides)
