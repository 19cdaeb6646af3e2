from __future__ import annotations

import torch

from qsens.data.samples import Samples, make_batch
from qsens.engine.candidates import Request, distinct
from qsens.engine.gradient.buffers import layout_of
from qsens.engine.gradient.quantized_inputs import InputQuantizer, QuantizedInputs
from qsens.numerics import fake_quantize

FP8 = {"num_bits": (4, 3), "axis": None}
INT8 = {"num_bits": 8, "axis": None}
WIDE = {"num_bits": 8, "axis": 0}
CPU = torch.device("cpu")


def requests(*inputs):
    """Cells of two weight formats: one for every ``(weight, input, samples)``."""
    return [
        Request(str(index), weight, given, count, count)
        for index, (weight, given, count) in enumerate(inputs)
    ]


def laid_out(candidates):
    samples = Samples(((1, 2), (3, 4, 5), (6,)), (False,) * 3)
    batches = [make_batch(samples, [0]), make_batch(samples, [1, 2])]
    return layout_of(batches, candidates, CPU, "tokens")


def build(candidates, amax, failed=None):
    inputs = InputQuantizer(
        candidates, CPU, {"m": (8,)}, {"m": ("m",)}, lambda *what: failed.append(what)
    )
    inputs.calibrate({count: {"m": torch.tensor(value)} for count, value in amax.items()})
    rows = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
    layout = laid_out(candidates)
    return rows, layout, inputs.stack("m", rows, layout)


def test_each_candidate_reads_its_first_rows():
    candidates = distinct(requests((FP8, FP8, 1), (FP8, FP8, 3), (FP8, None, 3), (INT8, INT8, 3)))
    rows, layout, stack = build(candidates, {1: 1.0, 3: 2.0})
    expected = {
        0: fake_quantize(rows[:2], FP8, torch.tensor(1.0)),
        1: fake_quantize(rows, FP8, torch.tensor(2.0)),
        2: rows,
        3: fake_quantize(rows, INT8, torch.tensor(2.0)),
    }
    for row_ranges in layout.row_ranges.values():
        given, spans = stack.select(row_ranges)
        for row_range, (start, to, count) in zip(row_ranges, spans, strict=True):
            assert to == row_range.start
            assert torch.equal(given[start : start + count], expected[row_range.candidate])
    assert len(stack.rows) == 2 + 6 + 6 + 6


def test_snapshots_with_one_maximum_are_quantized_once():
    candidates = distinct(requests((FP8, FP8, 1), (FP8, FP8, 3), (FP8, INT8, 3)))
    rows, layout, stack = build(candidates, {1: 2.0, 3: 2.0})
    assert len(stack.rows) == 6 + 6
    given, spans = stack.select(layout.row_ranges[0])
    assert len(given) == 12
    starts = {
        row_range.candidate: start
        for row_range, (start, _, _) in zip(layout.row_ranges[0], spans, strict=True)
    }
    assert starts[0] == starts[1] != starts[2]
    assert torch.equal(given[starts[0] :][:2], fake_quantize(rows[:2], FP8, torch.tensor(2.0)))


def test_rows_that_lie_apart_are_joined():
    rows = torch.arange(6.0)[:, None]
    stack = QuantizedInputs(rows, {0: 0, 1: 2, 2: 5}, {0: 2, 1: 3, 2: 1})
    candidates = distinct(requests((FP8, FP8, 1), (FP8, INT8, 1), (FP8, None, 1)))
    first, _, last = laid_out(candidates).row_ranges[0]
    given, spans = stack.select([first, last])
    assert given.flatten().tolist() == [0.0, 1.0, 5.0]
    assert [(start, count) for start, _, count in spans] == [(0, 2), (2, 2)]


def test_an_input_that_cannot_be_quantized_fails_its_candidates_alone():
    wrong = {"num_bits": 8, "axis": 7}
    candidates = distinct(requests((FP8, wrong, 3), (INT8, wrong, 3), (FP8, FP8, 3)))
    failed = []
    build(candidates, {3: 2.0}, failed)
    ((name, which, error),) = failed
    assert (name, sorted(which)) == ("m", [0, 1])
    assert "dimensions (7,)" in str(error)
