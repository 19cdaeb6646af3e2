"""Thirty types that differ in kind, each planned, scored and held against plain autograd."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qsens.checkpoint.structure import Structure, known_types, structure_of
from tests.zoo import structures
from tests.zoo.children import run_all
from tests.zoo.scores import TOLERANCE, check

Results = dict[str, dict[str, Any]]
# One or two of each kind: what is particular about it.
KINDS = {
    "mistral": "plain",
    "qwen2": "biases",
    "gpt2": "transposed linears, fused q, k and v",
    "gpt_neox": "parallel attention, fused q, k and v",
    "falcon": "multi-query, a linear module's own code, outputs changed in place",
    "phi3": "fused gate and up",
    "opt": "rows without samples, projections outside the layers",
    "bert": "an encoder, a tail before the head",
    "roformer": "padding that real tokens see",
    "gemma2": "capped logits",
    "nanochat": "capped logits, no gate",
    "cohere": "scaled logits",
    "granitemoehybrid": "divided logits, experts, Mamba",
    "falcon_h1": "multiplied logits, Mamba beside attention",
    "gemma4_text": "keys and values shared by layers",
    "gemma3n_text": "several streams, modules called twice",
    "mamba": "no attention",
    "mamba2": "no attention",
    "qwen3_next": "gated delta net, shared experts",
    "lfm2_moe": "short convolutions, experts",
    "zamba2": "a block shared by layers",
    "deepseek_v3": "MLA, grouped routers, shared experts, dense first layers",
    "deepseek_v32": "an indexer without a gradient",
    "gpt_oss": "transposed, interleaved, biased experts",
    "nemotron_h": "experts without a gate",
    "mixtral": "experts of their own in files",
    "qwen2_moe": "a gate of the shared expert",
    "llava": "a tower",
    "qwen3_5": "a tower, gated delta net",
    "jetmoe": "refused: a layout of its own",
}


@pytest.fixture(scope="module")
def results() -> Results:
    """Children of one process that has imported everything, two at a time."""
    import modelopt.torch.quantization  # noqa: F401

    return dict(run_all(list(KINDS), check, together=2, seconds=240))


@pytest.mark.parametrize("kind", [kind for kind, said in KINDS.items() if "refused" not in said])
def test_scores_are_those_of_the_reference(
    kind: str, results: dict[str, dict[str, object]]
) -> None:
    found = results[kind]
    assert "error" not in found, found
    assert "refused" not in found, found
    assert "wrong" not in found, found
    assert found["groups"] > 4
    beside = found["modelopt"]
    assert (beside if isinstance(beside, float) else found["gradient"]) < TOLERANCE
    assert found["fisher"] <= 4


def test_a_layout_of_its_own_is_refused(results: Results) -> None:
    assert "JetMoeParallelExperts" in str(results["jetmoe"]["refused"])


def test_the_file_has_every_type() -> None:
    held = json.loads(structures.FILE.read_text(encoding="utf-8"))
    assert list(held["types"]) == structures.TYPES
    assert len(known_types()) >= 195


@pytest.mark.parametrize("kind", ["llama", "qwen3_vl", "gpt_oss", "gemma4_text", "roformer"])
def test_the_file_is_what_is_found(kind: str) -> None:
    shipped = structure_of(kind)
    assert isinstance(shipped, Structure)
    assert Structure.read(structures.find(kind)) == shipped
