"""Whole models under a format, against models that are float32 as a whole."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from qsens.checkpoint.groups import find_groups
from qsens.config import load_sweep
from qsens.engine.kl.whole import WholeModel
from qsens.engine.layer_stream import LayerStream
from qsens.engine.modelopt.end_to_end import EndToEnd
from qsens.numerics import fake_quantize
from tests.engine.kl.test_measure import distributions, nats, text_model, text_samples
from tests.engine.test_layer_stream import dense, mixture, samples


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
            quantized = fake_quantize(weight, pair.weight_quantizer.cfg())
            changed.get_submodule(name).weight.data = quantized.float()
    before, after, rounded = (distributions(each, samples) for each in (whole, changed, model))
    expected = [nats(*rows) for rows in zip(before, after, strict=True)]
    lengths = [len(ids) for ids in samples.ids]
    assert found.divergence == pytest.approx(sum(expected) / sum(lengths), rel=1e-3)
    assert found.scored == pytest.approx(sum(expected[:2]) / sum(lengths[:2]), rel=1e-3)

    floor = sum(nats(*rows) for rows in zip(before, rounded, strict=True)) / sum(lengths)
    assert evaluation.floor() == pytest.approx(floor, rel=0.2)
    assert EndToEnd(whole, groups, (), (), samples, samples).floor() is None


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("make", [dense, mixture])
def test_what_is_quantized_as_it_runs_is_what_modelopt_quantizes_in_a_copy(
    make: Callable[[], nn.Module], streamed: bool
) -> None:
    model = make()
    groups, read = find_groups(model), samples()
    work = {"calibration": read.part(0, 24), "held_out": read.part(24), "scored": 8}
    pairs = load_sweep("single", ["quant_pair=wfp8_afp8,wint8_afp16,wint4_afp16"]).config.quant_pair
    fp8, int8, int4 = pairs
    theirs = EndToEnd(model, groups, (), (), **work)
    expected = [theirs.measure(pair.name, theirs.uniform(pair)) for pair in pairs]
    members = [name for group in groups for name in group.members]
    if streamed:
        LayerStream(model, torch.device("cpu"))
    ours = WholeModel(model, groups, **work)
    for pair, other in zip(pairs, expected, strict=True):
        found = ours.measure(pair.name, dict.fromkeys(members, pair))
        assert found.bits == pytest.approx(other.bits)
        # A quantized activation that rounds the other way for 1e-7 moves a caption by percents.
        rel = 1e-3 if pair.input_quantizer is None else 0.02
        assert found.divergence == pytest.approx(other.divergence, rel=rel)
        assert found.scored == pytest.approx(other.scored, rel=rel)
        if pair.input_quantizer is None:
            assert found.nats == pytest.approx(other.nats, rel=1e-3, abs=1e-7)
            assert found.by_caption == pytest.approx(other.by_caption, rel=1e-3, abs=1e-5)
    # A mixed one lies between its parts, and leaves the model as it is.
    mixed = dict(zip(members, itertools.cycle((fp8, int4)), strict=False)) | {"lm_head": int8}
    found = ours.measure("mixed", mixed)
    assert expected[1].divergence < found.divergence < expected[2].divergence
    assert ours.measure("none", {}).divergence == 0
    assert ours.floor() is None


def test_the_floor_of_both_is_one() -> None:
    model, read = text_model().bfloat16(), text_samples()
    groups = find_groups(model)
    theirs = EndToEnd(model, groups, (), (), read, read)
    assert WholeModel(model, groups, read, read).floor() == pytest.approx(theirs.floor(), rel=1e-3)
