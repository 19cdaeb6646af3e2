"""Overrides: typed by the field that they name, and no YAML documents."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from qsens.config import Roots, SweepConfig, load_sweep
from qsens.config.overrides import LONGEST
from qsens.errors import UserError

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    return Roots(root=tmp_path, results=tmp_path, configs=(REPO / "configs",))


def loaded(roots: Roots, *overrides: str) -> SweepConfig:
    return load_sweep("demo-text", overrides, roots=roots).config


def value_of(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
        config = config[0] if part == "dataset" else config
    return config


@pytest.mark.parametrize(
    "text",
    [
        *("2024", "on", "No", "null", "1e3", "0x10", "1:30", "2024-01-02", "a: b", "[a]", "{a}"),
        *("'a'", '"a"', "&a", "*a", "- a", "a #b", "!!python/name:os.system", "%", "@", "模型"),
    ],
)
def test_text_is_text_whatever_it_looks_like(text: str, roots: Roots) -> None:
    config = loaded(
        roots, f"model.path={text}", f"dataset.prompt={text}", f"model.hub.revision={text}"
    )
    assert config.model.path == roots.root / text
    assert config.dataset[0].prompt == text
    assert config.model.hub.revision == text


@pytest.mark.parametrize("name", ["on", "2024", "1e3", "null", "true", "0123", "1_000"])
def test_a_name_of_any_look_is_a_name(name: str, roots: Roots) -> None:
    config = loaded(roots, f"model.name={name}", f"dataset.name={name}")
    assert (config.model.name, config.dataset[0].name) == (name, name)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("autoquant.batch_size=4", 4),
        ("autoquant.effective_bits=7", 7.0),
        ("autoquant.effective_bits=7.25", 7.25),
        ("dataset.max_skipped=1e-1", 0.1),
        ("runner.force=true", True),
        ("runner.force=False", False),
        ("dataset.max_calib_samples=7", 7),
        ("dataset.max_calib_samples=null", None),
        ("dataset.images=~", None),
        ("dag.schedule=null", None),
        ("dag.schedule=0 3 * * *", "0 3 * * *"),
        ("dataset.sizes.small=2", 2),
        ("dataset.size=[small, medium]", ("small", "medium")),
        ("model.head_patterns=lm_head,*.head", ("lm_head", "*.head")),
    ],
)
def test_a_field_says_what_its_value_is(override: str, value: Any, roots: Roots) -> None:
    found = value_of(loaded(roots, override), override.partition("=")[0])
    assert found == value
    assert type(found) is type(value)


def test_a_table_is_one_level_deep(roots: Roots) -> None:
    config = loaded(
        roots,
        "dataset.sizes={small: 3, medium: 5}",
        "dataset.files={small: 'a b.txt', medium: c:d.txt}",
    )
    assert (config.dataset[0].sizes["small"], config.dataset[0].sizes["medium"]) == (3, 5)
    assert config.dataset[0].files["small"] == "a b.txt"
    assert config.dataset[0].files["medium"] == "c:d.txt"


BOMB = ", ".join(
    ["l0: &l0 [x,x,x,x,x,x,x,x,x]"]
    + [f"l{at}: &l{at} [{','.join([f'*l{at - 1}'] * 9)}]" for at in range(1, 8)]
)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (f"dataset.sizes={{{BOMB}}}", "dataset.sizes"),
        ("dataset.sizes={small: {a: 1}}", "dataset.sizes"),
        ("dataset.sizes={small: [1]}", "dataset.sizes"),
        ("dataset.sizes=" + "[" * 4000 + "]" * 4000, "dataset.sizes"),
        ("dataset.sizes=7", "dataset.sizes"),
        ("dataset.sizes.small.deep=1", "dataset.sizes.small"),
        ("dataset.sizes.tiny=1", "dataset.sizes.tiny"),
        ("runner={force: true}", "runner"),
        ("dag.notify=[{notifier: a.b}]", "dag.notify"),
        ("dag.notify.notifier=a.b", "dag.notify"),
        ("quant_pair.run_dir=x", "quant_pair.run_dir"),
        ("quant_granularity.name=x", "quant_granularity.name"),
        ("quant_pair.0.name=x", "quant_pair.0"),
        ("model.path.x=y", "model.path"),
        ("model.hub.colour=red", "model.hub.colour"),
        ("autoquant.batch_size=four", "autoquant.batch_size"),
        ("autoquant.batch_size=true", "autoquant.batch_size"),
        ("autoquant.batch_size=null", "autoquant.batch_size"),
        ("autoquant.batch_size=" + "9" * 5000, "autoquant.batch_size"),
        ("autoquant.effective_bits=nan", "autoquant.effective_bits"),
        ("autoquant.memory_gb=inf", "autoquant.memory_gb"),
        ("runner.force=maybe", "runner.force"),
        ("dataset.prompt=", "dataset.prompt"),
        ("model.path=a\0b", "model.path"),
        ("x" * 5000 + "=1", "the command line"),
        ("dataset.prompt=" + "x" * LONGEST, "the command line"),
    ],
)
def test_what_no_key_takes_is_refused_at_once(override: str, key: str, roots: Roots) -> None:
    started = time.process_time()
    with pytest.raises(UserError) as caught:
        loaded(roots, override)
    assert time.process_time() - started < 5
    assert caught.value.exit_code == 2
    assert caught.value.where.startswith(key)
    assert len(str(caught.value).splitlines()) == 2
    assert len(str(caught.value)) < 800
