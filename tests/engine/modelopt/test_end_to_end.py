"""Whole models under a format, against models that are float32 as a whole."""

from __future__ import annotations

import copy

import pytest

from qsens.checkpoint.groups import find_groups
from qsens.config import load_sweep
from qsens.engine.modelopt.end_to_end import EndToEnd
from qsens.numerics import fake_quantize
from tests.engine.kl.test_measure import distributions, nats, text_model, text_samples


def test_rounding_to_bfloat16_is_no_part_of_it() -> None:
    model, samples = text_model().bfloat16(), text_samples()
    groups = find_groups(model)
    (pair,) = load_sweep("single", ["quant_pair=wint8_afp16"]).config.quant_pair
    evaluation = EndToEnd(model, groups, (), (), calibration=samples, held_out=samples, scored=2)
    found = evaluation.measure("all", evaluation.uniform(pair))

    whole, changed = copy.deepcopy(model).float(), copy.deepcopy(model).float()
    for group in groups:
        for name in group.members:
            weight = model.get_submodule(name).weight.data
            quantized = fake_quantize(weight, pair.weight_quantizer.modelopt())
            changed.get_submodule(name).weight.data = quantized.float()
    before, after, rounded = (distributions(each, samples) for each in (whole, changed, model))
    expected = [nats(*rows) for rows in zip(before, after, strict=True)]
    lengths = [len(ids) for ids in samples.ids]
    assert found.divergence == pytest.approx(sum(expected) / sum(lengths), rel=1e-3)
    assert found.scored == pytest.approx(sum(expected[:2]) / sum(lengths[:2]), rel=1e-3)

    floor = sum(nats(*rows) for rows in zip(before, rounded, strict=True)) / sum(lengths)
    assert evaluation.floor() == pytest.approx(floor, rel=0.2)
    assert EndToEnd(whole, groups, (), (), samples, samples).floor() is None
