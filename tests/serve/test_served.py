"""What a real vLLM serves, against what it was given, through the command line.

A fixture stands between recipes and packed checkpoints: ``exported``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qsens.schema.recipe import read_recipe
from tests.serve.packed import emulated, pack
from tests.serve.vllm import MODEL, MOST, PYTHON, ROOT, Vllm
from tests.tools.served_by_hand import by_hand

CHECKPOINT = ROOT / ".cache" / "smollm2"
CAPTIONS = ROOT / "configs" / "dataset" / "demo" / "captions_large.txt"
COUNT = 32
# Nats a token that rounding to bfloat16 may cost SmolLM2-135M, whole.
BFLOAT16 = 0.008
# Pair, granularity, method, bits (the head stays at 16). With every group at 4 bits, what `fisher`
# predicts is far above what is measured.
FORMATS = {
    "W8A8-INT8": ("wint8_aint8", "a_token", "fisher", 9.7),
    "W4A16": ("wint4_afp16", "w_group64", "kl_div", 6.75),
}
# Of both, vLLM's kernels for CPUs take activations in 16 bits alone.
DTYPE = "bfloat16"

pytestmark = [
    pytest.mark.skipif(not PYTHON.is_file(), reason="vLLM is not there: make test-serve"),
    pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="no .cache/smollm2: make test-serve"),
]
Found = dict[str, Any]


def qsens(results: Path, *words: str) -> Found:
    done = subprocess.run(
        [sys.executable, "-m", "qsens", *words, "--json"],
        env={**os.environ, "QSENS_ROOT": str(ROOT), "QSENS_RESULTS": str(results)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found: Found = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions that no sweep of size small reads."""
    path = tmp_path_factory.mktemp("samples") / "captions.txt"
    path.write_text("\n".join(CAPTIONS.read_text().splitlines()[-COUNT:]))
    return path


@pytest.fixture(scope="module")
def texts(samples: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    return [tokenizer(line)["input_ids"] for line in samples.read_text().splitlines()]


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def recipe_of(results: Path) -> Callable[[str], Path]:
    """Returns the recipe of a format's name: from a sweep of that format alone."""

    def chosen(name: str) -> Path:
        pair, granularity, method, bits = FORMATS[name]
        swept = qsens(
            results,
            "sweep",
            "demo-text",
            f"model.path={CHECKPOINT}",
            "model.dtype=float32",
            f"quant_pair={pair}",
            f"quant_granularity={granularity}",
            "dataset.size=small",
            f"autoquant.method={method}",
        )
        path = results / f"{name}.json"
        words = (swept["sweep_id"], "--bits", str(bits), "--to", "json", "--out", str(path))
        qsens(results, "recipe", *words)
        return path

    return chosen


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Returns a packed checkpoint of a recipe."""

    def packed(recipe: Path) -> Path:
        directory = tmp_path_factory.mktemp("packed") / recipe.stem
        return pack(read_recipe(recipe), CHECKPOINT, directory)

    return packed


@pytest.fixture(scope="module")
def floor(results: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What vLLM in bfloat16 makes of the unquantized checkpoint."""
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with Vllm(CHECKPOINT, DTYPE, log) as server:
        return checked(server, results, samples)


def checked(server: Vllm, results: Path, samples: Path, *words: str) -> Found:
    found = qsens(
        results,
        "check-server",
        server.url,
        "--reference",
        str(CHECKPOINT),
        "--samples",
        str(samples),
        "--top-k",
        str(MOST),
        *words,
    )
    print({name: value for name, value in found.items() if name != "notices"})
    assert (found["model"], found["api"], found["samples"]) == (MODEL, "vLLM", COUNT)
    return found


def test_in_float32_the_checkpoint_is_served_as_it_is(
    results: Path, samples: Path, texts: list[list[int]], tmp_path: Path
) -> None:
    with Vllm(CHECKPOINT, "float32", tmp_path / "vllm.log") as server:
        found = checked(server, results, samples)
    assert 0 <= found["divergence"] < 1e-7
    assert abs(found["loss"]) < 1e-4
    assert found["tokens"] == sum(map(len, texts))
    assert found["labels"] == found["tokens"] - COUNT


def test_bfloat16_costs_what_rounding_does(floor: Found) -> None:
    assert 0.001 < floor["divergence"] < BFLOAT16


@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_checkpoint_is_served_as_it_is_packed(
    name: str,
    recipe_of: Callable[[str], Path],
    exported: Callable[[Path], Path],
    results: Path,
    samples: Path,
    texts: list[list[int]],
    reference: Any,
    floor: Found,
    tmp_path: Path,
) -> None:
    path = recipe_of(name)
    recipe = read_recipe(path)
    with Vllm(exported(path), DTYPE, tmp_path / "vllm.log") as server:
        found = checked(server, results, samples, "--recipe", str(path))
    wanted = by_hand(reference, emulated(recipe, reference), texts, MOST)
    print({"emulated": wanted, "bits": recipe.bits, "predicted": recipe.damage})
    slack = 2 * floor["divergence"]
    for measured in ("divergence", "loss"):
        value = wanted[measured]
        assert found[measured] == pytest.approx(value, abs=0.1 * abs(value) + slack)
    assert found["divergence"] < wanted["full"] * 1.1 + slack
    # How good a sum over groups is as a prediction is no matter of the server.
    assert found["predicted"] == recipe.damage > 0
