"""Samples with pictures: every module of a vision tower, against a plain ``mtq.auto_quantize``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from qsens.checkpoint.groups import find_groups
from qsens.config import load_sweep
from qsens.data.samples import Samples
from qsens.engine.amax import calibrate
from qsens.engine.candidates import Candidates, Request, distinct
from qsens.engine.gradient import fisher, scorer
from qsens.engine.kl.measure import diverge
from qsens.engine.memory import Budget
from qsens.engine.modelopt.quantizers import on_cpu
from qsens.engine.scores import PassScores
from tests.engine import pictures

COUNT, SCORED, BATCH = 12, 8, 4


@pytest.fixture(scope="module")
def samples() -> Samples:
    return pictures.samples(COUNT)


def pair(name: str) -> Any:
    (config,) = load_sweep("single", [f"quant_pair={name}"]).config.quant_pair
    return config


def one(name: str) -> Candidates:
    config = pair(name)
    given = config.input_quantizer
    return distinct(
        [
            Request(
                cell=name,
                weight=config.weight_quantizer.cfg(),
                input=given.cfg() if given else None,
                calibrated=COUNT,
                scored=SCORED,
            )
        ]
    )


def run(
    family: str, name: str, samples: Samples, budget: Budget | None = None
) -> tuple[list[str], PassScores]:
    candidates, model = one(name), pictures.model(family)
    groups = find_groups(model)
    amax = {}
    if candidates.calibration_sizes():
        amax = calibrate(model, samples, groups, calibration_sizes=[COUNT])
    found = scorer.score(model, samples, groups, candidates, amax, budget=budget)
    assert found.failures.refused == {}
    return [group.name for group in groups], found


def modelopt(family: str, name: str, samples: Samples) -> dict[str, float]:
    """Return ModelOpt's scores with one sample a batch, each weighted by its nominal batch."""
    import modelopt.torch.quantization as mtq

    lengths = [end - start for ((start, end),) in samples.spans]
    totals = [sum(lengths[at : at + BATCH]) for at in range(0, COUNT, BATCH)]
    loader = []
    for index in range(COUNT):
        ids = torch.tensor([samples.ids[index]])
        labels = torch.full_like(ids, -100)
        ((start, end),) = samples.spans[index]
        labels[0, start:end] = ids[0, start:end]
        picture = samples.pictures[index]
        loader.append(
            {
                "input_ids": ids,
                "pixel_values": picture.tensors["pixel_values"],
                "image_grid_thw": picture.tensors["image_grid_thw"],
                "mm_token_type_ids": (ids == pictures.IMAGE).long(),
                "labels": labels,
                "weight": 1 / totals[index // BATCH],
            }
        )

    def forward(model: Any, batch: dict[str, Any]) -> Any:
        given = {key: value for key, value in batch.items() if key not in ("labels", "weight")}
        return model(**given, use_cache=False)

    def loss(output: Any, batch: dict[str, Any]) -> torch.Tensor:
        each = F.cross_entropy(
            output.logits[0, :-1].float(), batch["labels"][0, 1:], reduction="sum"
        )
        return each * batch["weight"]

    with torch.enable_grad():
        _, state = mtq.auto_quantize(
            pictures.model(family),
            constraints={"effective_bits": 8.0},
            quantization_formats=[on_cpu(pair(name).modelopt())],
            data_loader=loader,
            forward_step=forward,
            loss_func=loss,
            num_calib_steps=COUNT,
            num_score_steps=SCORED,
            verbose=False,
        )
    return {
        key.removesuffix(".quant_recipe"): stats["scores"][0]
        for key, stats in state["candidate_stats"].items()
    }


@pytest.mark.parametrize("family", pictures.FAMILIES)
@pytest.mark.parametrize("name", ["wfp8_afp8", "wint8_aint8", "wfp4_afp8"])
def test_every_group_equals_modelopt(family: str, name: str, samples: Samples) -> None:
    theirs = modelopt(family, name, samples)
    names, found = run(family, name, samples)
    lengths = [end - start for ((start, end),) in samples.spans]
    nominal = torch.tensor(
        [
            float(sum(lengths[at : at + BATCH]))
            for at in range(0, SCORED, BATCH)
            for _ in range(BATCH)
        ]
    )
    ours = (found.per_sample[:, 0] / nominal.double().square()).sum(dim=1).tolist()
    # Batches of both engines differ, so an input that lies between two integers may be rounded to
    # the one by ours and to the other by theirs: which processors do it, differs.
    rel = 1e-3 if name == "wint8_aint8" else 1e-4
    assert dict(zip(names, ours, strict=True)) == pytest.approx(theirs, rel=rel)
    tower = [name for name in names if "visual" in name]
    assert len(tower) == pictures.TOWER[family]
    assert all(theirs[name] > 0 for name in tower)


def alone(samples: Samples, index: int) -> Samples:
    """Return one of the samples."""
    return Samples(
        samples.ids[index : index + 1],
        samples.truncated[index : index + 1],
        samples.spans[index : index + 1],
        samples.pictures[index : index + 1],
    )


@pytest.mark.parametrize("family", pictures.FAMILIES)
def test_a_sample_scores_what_it_scores_alone(family: str, samples: Samples) -> None:
    """Rows of the tower go to the sample of their picture, in whatever order they are."""
    candidates, model = one("wint8_aint8"), pictures.model(family)
    groups = find_groups(model)
    amax = calibrate(model, samples, groups, calibration_sizes=[COUNT])
    together = scorer.score(model, samples, groups, candidates, amax).per_sample
    truth = diverge(model, samples, groups, candidates, amax, boundaries=[]).per_sample
    for index in range(SCORED):
        single = alone(samples, index)
        found = scorer.score(model, single, groups, candidates, amax).per_sample
        torch.testing.assert_close(found[..., 0], together[..., index], rtol=1e-3, atol=0)
        found = diverge(model, single, groups, candidates, amax, boundaries=[]).per_sample
        torch.testing.assert_close(found[..., 0], truth[..., index], rtol=1e-3, atol=1e-9)
    # The draws of a sample hang on its index: one sample at a time, but of the same samples.
    budget = Budget(limit=0, max_tokens=1, predicted=0)
    given = (model, samples, groups, candidates, amax)
    drawn = fisher.estimate(*given, draws=8, seed=0).per_sample
    split = fisher.estimate(*given, draws=8, seed=0, budget=budget).per_sample
    torch.testing.assert_close(split, drawn, rtol=1e-3, atol=1e-12)
    spread = together.std(dim=-1) / together.mean(dim=-1)
    assert float(spread.min()) > 0.1  # a mixed up order would show


@pytest.mark.parametrize("family", pictures.FAMILIES)
def test_small_batches_and_kept_records_change_nothing(family: str, samples: Samples) -> None:
    _, whole = run(family, "wint8_aint8", samples)
    for keeps in (False, True):
        budget = Budget(limit=0, max_tokens=30, predicted=0, keeps_records=keeps)
        _, split = run(family, "wint8_aint8", samples, budget)
        torch.testing.assert_close(split.per_sample, whole.per_sample, rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", pictures.FAMILIES)
def test_fisher_estimates_the_divergence_of_the_captions(family: str, samples: Samples) -> None:
    candidates, model = one("wint8_afp16"), pictures.model(family)
    groups = find_groups(model)
    truth = diverge(model, samples, groups, candidates, {}, boundaries=[])
    found = fisher.estimate(model, samples, groups, candidates, {}, draws=64, seed=0)
    ratio = found.per_sample[:, 0].sum(dim=1) / truth.per_sample[:, 0].sum(dim=1)
    assert 0.95 < float(ratio.median()) < 1.05
    assert float(ratio.min()) > 0.7
    assert float(ratio.max()) < 1.3


@pytest.mark.parametrize("family", pictures.FAMILIES)
def test_labels_are_the_caption_alone(family: str, samples: Samples) -> None:
    model = pictures.model(family)
    groups = find_groups(model)
    found = scorer.score(model, samples, groups, one("wint8_afp16"), {})
    for index in range(SCORED):
        ids = torch.tensor([samples.ids[index]])
        picture = samples.pictures[index]
        with torch.no_grad():
            logits = model(
                input_ids=ids,
                pixel_values=picture.tensors["pixel_values"],
                image_grid_thw=picture.tensors["image_grid_thw"],
                mm_token_type_ids=(ids == pictures.IMAGE).long(),
            ).logits[0]
        ((start, end),) = samples.spans[index]
        log_p = torch.log_softmax(logits.double(), dim=-1)
        loss = -sum(log_p[at - 1, samples.ids[index][at]] for at in range(start, end))
        assert float(found.loss[index]) == pytest.approx(float(loss), rel=1e-5)
