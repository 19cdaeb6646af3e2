"""However a pass goes about its work, it finds the same numbers."""

from __future__ import annotations

import pytest
import torch

from qsens.checkpoint.components import resolve_components
from qsens.checkpoint.groups import find_groups
from qsens.checkpoint.loading import load_model, load_tokenizer
from qsens.config import ModelConfig, load_sweep
from qsens.data.samples import tokenize
from qsens.engine.amax import calibrate
from qsens.engine.batching import calibrates
from qsens.engine.candidates import Request, distinct
from qsens.engine.gradient import scorer
from qsens.engine.memory import Budget

SIZES = [4, 16, 24]
SCORED = 16


@pytest.fixture(scope="module")
def work(demo_checkpoint, request):
    config = ModelConfig(path=demo_checkpoint.directory, dtype="float32")
    path = request.config.rootpath / "configs/dataset/demo/captions_medium.txt"
    captions = path.read_text(encoding="utf-8").splitlines()[: SIZES[-1]]
    samples = tokenize(captions, load_tokenizer(config), longest=512)
    model = load_model(config, torch.device("cpu"))
    pairs = "quant_pair=wfp8_afp8,wint8_aint8,wint4_afp16,wfp4_afp8"
    requests = [
        Request(
            f"{pair.name}-{size}",
            pair.weight_quantizer.cfg(),
            pair.input_quantizer.cfg() if pair.input_quantizer else None,
            size,
            min(size, SCORED),
        )
        for pair in load_sweep("single", [pairs]).config.quant_pair
        for size in SIZES
    ]
    return (
        model,
        samples,
        find_groups(model, resolve_components(config).vision_patterns),
        distinct(requests),
    )


@pytest.fixture(scope="module")
def amax(work):
    model, samples, groups, candidates = work
    return calibrate(
        model,
        samples,
        groups,
        calibration_sizes=candidates.calibration_sizes(),
        boundaries=SIZES,
        max_tokens=100,
    )


@pytest.fixture(scope="module")
def expected(work, amax):
    return scorer.score(*work, amax, boundaries=SIZES)


@pytest.mark.parametrize(
    "budget",
    [
        Budget(limit=0, max_tokens=16384, predicted=0, keeps_records=True, head_formats=1),
        Budget(limit=0, max_tokens=16384, predicted=0, keeps_records=False, head_formats=3),
        Budget(limit=0, max_tokens=70, predicted=0, keeps_records=True, head_formats=2),
    ],
    ids=["records kept", "heads held", "several waves"],
)
def test_budgets(work, amax, expected, budget):
    found = scorer.score(*work, amax, boundaries=SIZES, budget=budget)
    assert found.failures.refused == {}
    assert all(found.reached)
    # A batch of another shape rounds its products another way, sample by sample.
    torch.testing.assert_close(found.per_sample, expected.per_sample, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(
        found.per_sample.sum(-1), expected.per_sample.sum(-1), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-5, atol=0)


def test_maxima_found_on_the_way(work, amax, expected):
    model, samples, _, candidates = work
    budget = Budget(limit=0, max_tokens=16384, predicted=0)
    assert calibrates(model, samples, candidates, boundaries=SIZES, budget=budget)
    found = scorer.score(*work, None, boundaries=SIZES, budget=budget)
    assert found.amax.keys() == set(SIZES)
    for count in SIZES:
        torch.testing.assert_close(found.amax[count], amax[count], rtol=1e-5, atol=0)
    sums = found.per_sample.sum(-1)
    torch.testing.assert_close(sums, expected.per_sample.sum(-1), rtol=1e-3, atol=0)
    split = Budget(limit=0, max_tokens=70, predicted=0)
    assert not calibrates(model, samples, candidates, boundaries=SIZES, budget=split)
