"""The DAG's params: generated from the configuration, validated, and read back into overrides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import Param
from airflow.sdk.definitions.param import ParamsDict
from airflow.sdk.exceptions import ParamValidationError

from qsens.config import Roots, load_sweep
from qsens.errors import UserError
from qsens_airflow.params import SweepParams, dag_params
from qsens_airflow.plans import plan_of_run, plans_to_publish

ROOT = Path(__file__).resolve().parents[2]
PAIRS = ["wfp4_afp16", "wfp4_afp8", "wfp8_afp16", "wfp8_afp8"]
PAIRS += ["wint8_afp16", "wint8_afp8", "wint8_aint8"]
SWEEP = "20250102T030405678Z-0123abcd"


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSENS_ROOT", str(ROOT))


@pytest.fixture
def params() -> dict[str, Param]:
    return dag_params("nightly")


def validated(params: dict[str, Param], conf: dict[str, Any]) -> dict[str, Any]:
    """Do what Airflow does with the conf of a run."""
    given = ParamsDict(params)
    given.update(conf)
    return given.validate()


def test_defaults_are_valid_and_mean_the_preset(params: dict[str, Param]) -> None:
    defaults = validated(params, {})
    read = SweepParams.read(defaults)
    assert (read.preset, read.mode, read.as_overrides()) == ("nightly", "full", [])


def test_choices_are_those_of_the_configuration(params: dict[str, Param]) -> None:
    assert set(params["quant_pair"].schema["items"]["enum"]) >= set(PAIRS)
    assert params["quant_pair"].schema["examples"] == params["quant_pair"].schema["items"]["enum"]
    assert params["size"].schema["items"]["enum"] == ["small", "medium", "large"]
    assert params["size"].schema["values_display"]["medium"] == "medium · 128 samples"
    assert set(params["quant_pair"].schema["values_display"]) >= set(PAIRS)
    presets = {"demo", "nightly", "single", "int8-3phase", "fp8-all-layers"}
    assert presets <= set(params["preset"].schema["enum"])
    assert None in params["model"].schema["enum"]
    assert params["mode"].schema["enum"] == ["full", "report_only"]


def test_a_file_of_the_users_own_becomes_a_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quant_pair").mkdir()
    (tmp_path / "quant_pair" / "wint4_afp16.yaml").write_text("name: wint4_afp16\n")
    monkeypatch.setenv("QSENS_CONFIG_DIR", str(tmp_path))
    assert "wint4_afp16" in dag_params("nightly")["quant_pair"].schema["items"]["enum"]


@pytest.mark.parametrize(
    "conf",
    [
        {"quant_pair": ["wfp8_afp8", "wint8_afp16"]},
        {"size": ["small"], "model": "tiny_qwen3_vl"},
        {"quant_granularity": ["default"], "force": True, "overrides": None},
        {"mode": "report_only", "sweep": SWEEP},
        {"sweep": ""},
        {
            "preset": "demo-text",
            "overrides": "autoquant.score_size=64\ndataset.max_calib_samples=8",
        },
    ],
)
def test_good_values_pass(params: dict[str, Param], conf: dict[str, Any]) -> None:
    SweepParams.read(validated(params, conf))


@pytest.mark.parametrize(
    "conf",
    [
        {"quant_pair": ["wfp9_afp9"]},
        {"quant_pair": "wfp8_afp8"},
        {"quant_pair": ["wfp8_afp8", "wfp8_afp8"]},
        {"size": ["tiny"]},
        {"model": "llama"},
        {"mode": "report"},
        {"force": "yes"},
        {"preset": None},
        {"sweep": "../../etc"},
        {"overrides": "dataset.name=" + "x" * 20_000},
    ],
)
def test_bad_values_are_refused_by_airflow_before_the_run(
    params: dict[str, Param], conf: dict[str, Any]
) -> None:
    with pytest.raises(ParamValidationError):
        validated(params, conf)


def test_a_key_that_no_param_has_is_refused(params: dict[str, Param]) -> None:
    # Airflow itself lets it pass.
    with pytest.raises(UserError, match="quant_pairs"):
        SweepParams.read(validated(params, {"quant_pairs": ["wfp8_afp8"]}))


def test_params_become_overrides_that_the_configuration_takes() -> None:
    read = SweepParams.read(
        {
            "preset": "nightly",
            "model": "tiny_qwen3_vl",
            "quant_pair": ["wint8_afp16", "wfp8_afp8"],
            "size": ["large", "small"],
            "dataset": ["demo", "demo_dialogues"],
            "force": True,
            "overrides": "\n autoquant.score_size=64 'model.path=/a b/c'",
        }
    )
    config = load_sweep(read.preset, read.as_overrides()).config
    assert [pair.name for pair in config.quant_pair] == ["wint8_afp16", "wfp8_afp8"]
    assert config.dataset[0].size == ("small", "large")
    assert [one.name for one in config.dataset] == ["demo_captions", "demo_dialogues"]
    assert config.autoquant.score_size == 64
    assert config.runner.force
    assert config.model.path == Path("/a b/c")


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"overrides": "quant_pair=wfp8_afp8"}, "param quant_pair"),
        ({"overrides": "runner.report_only=true"}, "param mode"),
        ({"overrides": "model.path='/a"}, "quotes"),
        ({"mode": "report_only", "size": ["small"]}, "param size"),
        ({"mode": "report_only", "force": True}, "param force"),
        ({"sweep": SWEEP}, "param sweep"),
        ({"sweep": "../x"}, "param sweep"),
        ({"overrides": "dataset.name=" + "x" * 20_000}, "param overrides"),
    ],
)
def test_contradictions_are_refused(given: dict[str, Any], names: str) -> None:
    with pytest.raises(UserError, match=names):
        SweepParams.read({"preset": "nightly"} | given).as_overrides()


def test_overrides_of_the_form_are_typed_by_their_fields() -> None:
    words = "model.path=2024\nmodel.name=on 'dataset.prompt=Question: describe it.' dag.lanes=null"
    read = SweepParams.read({"preset": "demo-text", "overrides": words})
    config = load_sweep(read.preset, read.as_overrides()).config
    assert (config.model.path, config.model.name) == (ROOT / "2024", "on")
    assert config.dataset[0].prompt == "Question: describe it."
    assert config.dag.lanes is None


def test_the_plan_of_a_run_stays_below_the_results(tmp_path: Path) -> None:
    roots = Roots(root=tmp_path, results=tmp_path / "results", configs=())
    ids = ["manual__2025-01-01T00:00:00+00:00", "manual__2025-01-01T00_00_00_00_00", "..", "a/../b"]
    found = [plan_of_run(roots, run_id) for run_id in ids]
    assert len(set(found)) == len(ids)
    for path in found:
        assert path.parent.parent == tmp_path / "results" / ".plans"
        assert ".." not in path.parts


def sweeps_in(directory: Path, *names: str) -> list[Path]:
    plans = [directory / name / "plan.json" for name in names]
    for plan in plans:
        plan.parent.mkdir(parents=True)
        plan.write_text("{}")
    return plans


def test_report_only_takes_the_sweep_named_or_all_that_cells_show(tmp_path: Path) -> None:
    roots = Roots(root=ROOT, results=tmp_path, configs=(ROOT / "configs",))
    config = load_sweep("demo-text", roots=roots).config
    analysis = tmp_path / "models" / "tiny_qwen3_vl" / "layer-analysis"
    with pytest.raises(UserError, match="tiny_qwen3_vl"):
        plans_to_publish(config, roots, None)
    names = [f"2025010{day}T030405678Z-0123abcd" for day in (2, 3, 4, 5)]
    plans = sweeps_in(analysis / "sweeps", *names)
    (analysis / "sweeps" / "20250109T030405678Z-broken").mkdir()
    # Cells show the first and the third; the second was replaced, the last added no cell.
    for pair, name in (("weight-a-act-b", names[2]), ("weight-a-act-b/w_group64", names[0])):
        mark = analysis / pair / "run" / ".sweep"
        mark.parent.mkdir(parents=True)
        mark.write_text(name)
    assert plans_to_publish(config, roots, None) == [plans[0], plans[2], plans[3]]
    assert plans_to_publish(config, roots, "") == [plans[0], plans[2], plans[3]]
    assert plans_to_publish(config, roots, names[1]) == [plans[1]]
    with pytest.raises(UserError, match="20250109"):
        plans_to_publish(config, roots, "20250109T030405678Z-0123abcd")


def of_model(name: str, *plans: Path, **more: Any) -> None:
    for plan in plans:
        plan.write_text(json.dumps({"config": {"model": {"name": name}}, **more}))


def test_report_only_in_the_layout_tmp_takes_the_newest_of_its_model(tmp_path: Path) -> None:
    roots = Roots(root=ROOT, results=tmp_path, configs=(ROOT / "configs",))
    config = load_sweep("single", roots=roots).config
    first, second, foreign, broken = sweeps_in(
        tmp_path / "tmp",
        SWEEP,
        *(f"2025010{day}T030405678Z-0123abcd" for day in (3, 4, 5)),
    )
    of_model("tiny_qwen3_vl", first, second)
    of_model("another", foreign)
    broken.write_text("{")
    assert plans_to_publish(config, roots, None) == [second]
    assert plans_to_publish(config, roots, SWEEP) == [first]
    for sweep in (foreign, broken):
        with pytest.raises(UserError, match="of the model 'tiny_qwen3_vl' has been published"):
            plans_to_publish(config, roots, sweep.parent.name)
    # One whose clock was wrong hides nothing that was published after it.
    of_model("tiny_qwen3_vl", first, published=2)
    of_model("tiny_qwen3_vl", second, published=1)
    assert plans_to_publish(config, roots, None) == [first]


def test_report_only_publishes_no_other_model_from_any_layout(tmp_path: Path) -> None:
    roots = Roots(root=ROOT, results=tmp_path, configs=(ROOT / "configs",))
    out = tmp_path / "out"
    words = [f"runner.output_dir={out}"]
    config = load_sweep("demo-text", words, roots=roots).config
    (own,) = sweeps_in(tmp_path, "out")
    of_model("tiny_qwen3_vl", own)
    assert plans_to_publish(config, roots, None) == [own]
    of_model("another", own)
    with pytest.raises(UserError, match="tiny_qwen3_vl"):
        plans_to_publish(config, roots, None)
    config = load_sweep("demo-text", roots=roots).config
    sweeps = tmp_path / "models/tiny_qwen3_vl/layer-analysis/sweeps"
    own, foreign = sweeps_in(sweeps, SWEEP, "20250103T030405678Z-0123abcd")
    of_model("tiny_qwen3_vl", own)
    of_model("another", foreign)
    assert plans_to_publish(config, roots, None) == [own]
    with pytest.raises(UserError, match="tiny_qwen3_vl"):
        plans_to_publish(config, roots, foreign.parent.name)
