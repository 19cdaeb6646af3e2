"""What a real vLLM serves of exported checkpoints, against what transformers reads in them."""

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
from transformers.utils.quantization_config import CompressedTensorsConfig

from qsens.schema.recipe import read_recipe
from tests.serve.vllm import MODEL, MOST, PYTHON, ROOT, Vllm
from tests.tools.served_by_hand import by_hand

CHECKPOINT = ROOT / ".cache" / "smollm2"
CAPTIONS = ROOT / "configs" / "dataset" / "demo" / "captions_large.txt"
COUNT = 32
# Nats a token that rounding to bfloat16 may cost SmolLM2-135M, whole.
BFLOAT16 = 0.008
# Formats that vLLM's build for CPUs has kernels for, and bits; the head stays at 16. (Of FP8 it
# loads some, and takes minutes for a request.)
FORMATS = {
    "INT8": ("wint8_aint8-ct_token", 9.7),
    "INT4": ("wint4_afp16-ct_group64", 6.75),
    "mixed": ("wint8_aint8-ct_token,wint4_afp16-ct_group64", 7.5),
}
# Of all of them, vLLM's kernels for CPUs take activations in 16 bits alone.
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
def swept(results: Path) -> str:
    """The id of a sweep of all formats."""
    formats = ",".join(name for name, _ in FORMATS.values() if "," not in name)
    # Scales are stored in the data type that they are served in.
    words = (f"model.path={CHECKPOINT}", f"model.dtype={DTYPE}", "dataset.size=small")
    found = qsens(
        results, "sweep", "demo-text", *words, f"quant_pair={formats}", "autoquant.method=fisher"
    )
    sweep: str = found["sweep_id"]
    return sweep


@pytest.fixture(scope="module")
def recipe_of(results: Path, swept: str) -> Callable[[str], Path]:
    """Returns a recipe from the formats of a name."""

    def chosen(name: str) -> Path:
        formats, bits = FORMATS[name]
        path = results / f"{name}.json"
        words = ("--bits", str(bits), "--pairs", formats, "--to", "json", "--out", str(path))
        qsens(results, "recipe", swept, *words)
        return path

    return chosen


@pytest.fixture(scope="module")
def exported(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Returns a packed checkpoint of a recipe."""

    def packed(recipe: Path) -> Path:
        directory = tmp_path_factory.mktemp("packed") / recipe.stem
        qsens(results, "export", str(recipe), str(directory))
        return directory

    return packed


@pytest.fixture(scope="module")
def floor(results: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What vLLM in bfloat16 makes of the unquantized checkpoint."""
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with Vllm(CHECKPOINT, DTYPE, log) as server:
        return checked(server, results, samples)


def as_kernels_do(model: Any) -> None:
    """Let INT8 activations be what vLLM's kernels make of them: a token's amax lands on 127.

    compressed-tensors' own code has it land on 127.5, which it clips.
    """

    def quantized(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        step = inputs[0].abs().amax(-1, keepdim=True) / 127
        return ((inputs[0] / step).round() * step,)

    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        given = scheme.input_activations if scheme is not None else None
        if given is not None and str(given.type) == "int":
            assert (given.num_bits, given.strategy, given.dynamic) == (8, "token", True)
            module.quantization_scheme = scheme.model_copy(update={"input_activations": None})
            module.register_forward_pre_hook(quantized)


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
    directory = exported(path)
    with Vllm(directory, DTYPE, tmp_path / "vllm.log") as server:
        found = checked(server, results, samples, "--recipe", str(path))
    unpacked = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(run_compressed=False),
    )
    as_kernels_do(unpacked)
    wanted = by_hand(reference, unpacked, texts, MOST)
    print({"unpacked": wanted, "bits": recipe.bits, "predicted": recipe.damage})
    slack = 2 * floor["divergence"]
    amplifies = any(pair.input_quantizer is not None for pair in recipe.formats.values())
    for measured in ("divergence", "loss"):
        value = wanted[measured]
        # Quantized activations make tenths of a nat of 1e-7, by chance of either sign.
        noise = 2 * found["loss_error"] if amplifies and measured == "loss" else 0.0
        assert found[measured] == pytest.approx(value, abs=0.1 * abs(value) + slack + noise)
    assert found["divergence"] < wanted["full"] * 1.2 + slack
    # How good a sum over groups is as a prediction is no matter of the server.
    assert found["predicted"] == recipe.damage > 0
