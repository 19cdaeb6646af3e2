"""Mixtures of experts: against ModelOpt, and each expert against all others left alone."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qsens.checkpoint.groups import find_groups
from qsens.config import PairConfig, load_sweep
from qsens.data.samples import Samples, equal_length_batches, nominal_labels
from qsens.engine.amax import calibrate
from qsens.engine.candidates import Candidates, Request, distinct
from qsens.engine.gradient import scorer
from qsens.engine.gradient.fisher import estimate
from qsens.engine.kl.measure import diverge
from qsens.engine.memory import Budget
from qsens.engine.modelopt import reference
from qsens.engine.scores import PassScores
from qsens.numerics import fake_quantize
from tests.engine import mixtures
from tests.engine.gradient.test_fisher import enumerated

BATCH_SIZE = 4
NAMES = [
    "wint8_aint8",
    "wint8_afp16",
    "wfp8_afp8",
    "wfp8_afp16",
    "wfp4_afp8",
    "wint4_afp16",
    "wint4_aint4",
    "wnvfp4_afp16",
    "wnvfp4_anvfp4",
]
LAYERS = [f"model.layers.{depth}.mlp.experts" for depth in range(2)]


@pytest.fixture(scope="module")
def pairs() -> dict[str, PairConfig]:
    found = load_sweep("single", [f"quant_pair={','.join(NAMES)}"]).config.quant_pair
    return {pair.name: pair for pair in found}


@pytest.fixture(scope="module")
def samples() -> Samples:
    return mixtures.samples()


@pytest.fixture(scope="module")
def work(pairs: dict[str, PairConfig], samples: Samples) -> tuple[Any, ...]:
    """Return what a pass takes: all pairs, at the sizes 4 and 6."""
    model = mixtures.model()
    candidates = distinct(
        [
            Request(
                f"{pair.name}-{size}",
                pair.weight_quantizer.cfg(),
                pair.input_quantizer.cfg() if pair.input_quantizer else None,
                size,
                size,
            )
            for pair in pairs.values()
            for size in (4, 6)
        ]
    )
    groups = find_groups(model)
    batches = equal_length_batches(samples, boundaries=[4, 6], batch_size=BATCH_SIZE)
    amax = calibrate(
        model, samples, groups, calibration_sizes=candidates.calibration_sizes(), batches=batches
    )
    return model, samples, groups, candidates, amax


@pytest.fixture(scope="module")
def found(work: tuple[Any, ...]) -> PassScores:
    return scorer.score(*work, boundaries=[4, 6])


def of_cell(found: PassScores, candidates: Candidates, cell: str, scored: int) -> dict[str, float]:
    """Return ``sum_i s_i / T_b(i)^2`` of each group."""
    labels = nominal_labels(mixtures.samples().labels(scored), BATCH_SIZE)
    weights = torch.tensor(labels, dtype=torch.float64).square()
    per_sample = found.per_sample[:, candidates.of_cell[cell], :scored]
    names = [group.name for group in found.groups]
    return dict(zip(names, (per_sample / weights).sum(dim=1).tolist(), strict=True))


def test_a_layer_of_experts_is_one_group(work: tuple[Any, ...]) -> None:
    groups = [group for group in work[2] if group.kind == "experts"]
    assert [group.name for group in groups] == LAYERS
    assert [group.members for group in groups] == [(name,) for name in LAYERS]
    # Per expert: gate and up of 96 rows each and down, all of 64 by 96.
    assert [group.weights for group in groups] == [6 * 3 * 96 * 64] * 2
    # Routers are no groups, as in ModelOpt.
    assert not any("gate" in name for group in work[2] for name in group.members)


@pytest.mark.parametrize("name", NAMES)
def test_fused_equals_auto_quantize(
    name: str, work: tuple[Any, ...], found: PassScores, pairs: dict[str, PairConfig]
) -> None:
    assert found.failures.refused == {}
    theirs = reference.score_cell(
        mixtures.model(),
        mixtures.samples(),
        pairs[name],
        vision=[],
        sizes=[4, 6],
        scored=6,
        batch_size=BATCH_SIZE,
    )
    expected = {entry.group.name: entry.sensitivity for entry in theirs.groups}
    assert set(LAYERS) < expected.keys()
    assert all(expected.values())
    assert of_cell(found, work[3], f"{name}-6", 6) == pytest.approx(expected, rel=1e-3)
    calibration_size = work[4][6]
    for key, value in theirs.tensors.items():
        assert float(calibration_size[key.removeprefix("amax.input.")]) == pytest.approx(
            float(value), rel=1e-5
        )
    if name == "wint8_aint8":  # both inputs of experts are calibrated
        assert {f"amax.input.{LAYERS[0]}.{part}" for part in ("gate_up_proj", "down_proj")} < set(
            theirs.tensors
        )


def by_modelopt(model: Any, samples: Samples, pair: PairConfig) -> dict[str, float | None]:
    """Return the scores of the six samples by the reference engine."""
    theirs = reference.score_cell(
        model, samples, pair, vision=[], sizes=[6], scored=6, batch_size=BATCH_SIZE
    )
    return {entry.group.name: entry.sensitivity for entry in theirs.groups}


def test_bfloat16(pairs: dict[str, PairConfig], samples: Samples) -> None:
    """The rounding of outputs, expert by expert, is part of the number."""
    pair = pairs["wfp8_afp8"]
    model = mixtures.model().bfloat16()
    cfg = pair.input_quantizer.cfg() if pair.input_quantizer else None
    candidates = distinct([Request("cell-6", pair.weight_quantizer.cfg(), cfg, 6, 6)])
    groups = find_groups(model)
    batches = equal_length_batches(samples, boundaries=[6], batch_size=BATCH_SIZE)
    amax = calibrate(model, samples, groups, calibration_sizes=[6], batches=batches)
    ours = scorer.score(model, samples, groups, candidates, amax, batches=batches)
    assert ours.failures.refused == {}
    expected = by_modelopt(mixtures.model().bfloat16(), samples, pair)
    assert of_cell(ours, candidates, "cell-6", 6) == pytest.approx(expected, rel=2e-2)


def test_layers_without_experts_beside(pairs: dict[str, PairConfig], samples: Samples) -> None:
    """A checkpoint may keep some of its layers dense."""
    pair = pairs["wint8_aint8"]
    model = mixtures.model(mlp_only_layers=[0])
    cfg = pair.input_quantizer.cfg() if pair.input_quantizer else None
    candidates = distinct([Request("cell", pair.weight_quantizer.cfg(), cfg, 6, 6)])
    groups = find_groups(model)
    assert [group.kind for group in groups] == [
        "qkv",
        "o",
        "gate_up",
        "down",
        "qkv",
        "o",
        "experts",
        "head",
    ]
    batches = equal_length_batches(samples, boundaries=[6], batch_size=BATCH_SIZE)
    ours = scorer.score(model, samples, groups, candidates, None, batches=batches)
    expected = by_modelopt(mixtures.model(mlp_only_layers=[0]), samples, pair)
    assert of_cell(ours, candidates, "cell", 6) == pytest.approx(expected, rel=1e-3)
    assert list(ours.experts) == [LAYERS[1]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", ["gradient", "fisher"])
def test_a_gpu_finds_the_same(method: str, work: tuple[Any, ...]) -> None:
    model, samples, groups, candidates, amax = work
    more: dict[str, Any] = {"draws": 2, "seed": 5} if method == "fisher" else {}
    measure = estimate if method == "fisher" else scorer.score
    expected = measure(*work, boundaries=[4, 6], **more)
    there = copy.deepcopy(model).cuda()
    found = measure(there, samples, groups, candidates, amax, boundaries=[4, 6], **more)
    assert found.failures.refused == {}
    torch.testing.assert_close(
        found.per_sample.sum(-1), expected.per_sample.sum(-1), rtol=5e-3, atol=1e-9
    )
    for name in LAYERS:
        assert torch.equal(found.experts[name].tokens, expected.experts[name].tokens)
        torch.testing.assert_close(
            found.experts[name].per_sample.sum(-1),
            expected.experts[name].per_sample.sum(-1),
            rtol=5e-3,
            atol=1e-9,
        )
    again = measure(there, samples, groups, candidates, amax, boundaries=[4, 6], **more)
    assert torch.equal(again.per_sample, found.per_sample)
    assert all(
        torch.equal(again.experts[name].per_sample, found.experts[name].per_sample)
        for name in LAYERS
    )


def test_tokens_of_each_expert(work: tuple[Any, ...], found: PassScores) -> None:
    model, samples = work[:2]
    for name, idle in zip(LAYERS, mixtures.IDLE, strict=True):
        counted: list[Counter[int]] = []
        handle = model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, counted=counted: counted.append(
                Counter(args[1].flatten().tolist())
            )
        )
        for ids in samples.ids:
            model(input_ids=torch.tensor([ids]))
        handle.remove()
        expected = [[each[expert] for each in counted] for expert in range(mixtures.EXPERTS)]
        assert found.experts[name].tokens.tolist() == expected
        assert sum(expected[idle]) == 0
        assert sum(map(sum, expected)) == 2 * samples.tokens()


def alone(
    experts: Any,
    x: torch.Tensor,
    chosen: torch.Tensor,
    gates: torch.Tensor,
    expert: int,
    weight: Any,
    given: Any,
    amax: tuple[Any, Any],
) -> torch.Tensor:
    """Return by how much the output moves when one expert alone is quantized, token by token."""

    def quantized(value: torch.Tensor, amax: Any) -> torch.Tensor:
        return value if given is None else fake_quantize(value, given, amax)

    def output(first: torch.Tensor, second: torch.Tensor, apply: Any) -> torch.Tensor:
        gate, up = (apply(x, amax[0]) @ first.T).chunk(2, dim=-1)
        return apply(F.silu(gate) * up, amax[1]) @ second.T

    plain = (experts.gate_up_proj[expert], experts.down_proj[expert])
    changed = output(*(fake_quantize(each, weight) for each in plain), quantized)
    change = changed - output(*plain, lambda value, amax: value)
    return change * ((chosen == expert) * gates).sum(dim=1, keepdim=True)


@pytest.mark.parametrize("cell", ["wint8_aint8-4", "wfp8_afp8-6", "wint4_afp16-6", "wint4_aint4-4"])
def test_each_expert_with_all_others_left_alone(
    cell: str, work: tuple[Any, ...], found: PassScores
) -> None:
    model, samples, _, candidates, amax = work
    index = candidates.of_cell[cell]
    weight, entry = candidates.pairs[index]
    chosen_input = candidates.inputs[entry]
    for name, idle in zip(LAYERS, mixtures.IDLE, strict=True):
        experts = model.get_submodule(name)
        ranges: tuple[Any, Any] = (None, None)
        if chosen_input.calibration_size is not None:
            known = amax[chosen_input.calibration_size]
            ranges = (known[f"{name}.gate_up_proj"], known[f"{name}.down_proj"])
        expected = torch.zeros(mixtures.EXPERTS, len(samples))
        for sample, ids in enumerate(samples.ids[: candidates.scored[index]]):
            read: list[Any] = []

            def keep(module: Any, args: Any, output: torch.Tensor, read: list[Any] = read) -> Any:
                read += [*args, output.detach().requires_grad_()]
                return read[-1]

            handle = experts.register_forward_hook(keep)
            tokens = torch.tensor([ids])
            with torch.enable_grad():
                logits = model(input_ids=tokens, use_cache=False).logits
                F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum").backward()
            handle.remove()
            *routed, output = read
            for expert in range(mixtures.EXPERTS):
                change = alone(
                    experts,
                    *routed,
                    expert,
                    candidates.weights[weight],
                    chosen_input.cfg,
                    ranges,
                )
                expected[expert, sample] = (output.grad * change).square().sum()
        ours = found.experts[name].per_sample[:, index]
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-10)
        assert ours[idle].sum() == 0
        tokens = found.experts[name].tokens[:, : candidates.scored[index]].sum(dim=1)
        assert torch.equal(ours.sum(dim=1) > 0, tokens > 0)


@pytest.mark.parametrize(
    "budget",
    [
        Budget(limit=0, max_tokens=16384, predicted=0, keeps_records=True),
        Budget(limit=0, max_tokens=16384, predicted=0, keeps_records=False),
        Budget(limit=0, max_tokens=10, predicted=0, keeps_records=True),
    ],
    ids=["records kept", "layers run again", "several waves"],
)
@pytest.mark.parametrize("method", ["gradient", "fisher"])
def test_budgets(method: str, budget: Budget, work: tuple[Any, ...]) -> None:
    """Padded, cut, or one sample at a time: the numbers are the samples' own."""
    more: dict[str, Any] = {"draws": 2, "seed": 5} if method == "fisher" else {}
    measure = estimate if method == "fisher" else scorer.score
    single = equal_length_batches(work[1], boundaries=[4, 6], batch_size=1)
    expected = measure(*work, batches=single, **more)
    split = measure(*work, boundaries=[4, 6], budget=budget, **more)
    assert split.failures.refused == {}
    torch.testing.assert_close(split.per_sample, expected.per_sample, rtol=1e-3, atol=1e-9)
    for name in LAYERS:
        ours, theirs = split.experts[name], expected.experts[name]
        assert torch.equal(ours.tokens, theirs.tokens)
        torch.testing.assert_close(ours.per_sample, theirs.per_sample, rtol=1e-3, atol=1e-9)


def test_maxima_found_on_the_way(work: tuple[Any, ...], found: PassScores) -> None:
    model, samples, groups, candidates, amax = work
    passing = scorer.score(model, samples, groups, candidates, None, boundaries=[4, 6])
    for count in (4, 6):
        torch.testing.assert_close(passing.amax[count], amax[count], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        passing.per_sample.sum(-1), found.per_sample.sum(-1), rtol=1e-3, atol=0
    )


def test_one_format_that_fails_leaves_the_others(work: tuple[Any, ...]) -> None:
    model, samples, groups, _, _ = work
    good = {"num_bits": 8, "axis": 0}
    candidates = distinct(
        [Request("good", good, None, 6, 6), Request("bad", {"num_bits": 8, "axis": 2}, None, 6, 6)]
    )
    passed = scorer.score(model, samples, groups, candidates, {})
    bad = candidates.of_cell["bad"]
    assert {candidate for _, candidate in passed.failures.refused} == {bad}
    position = [group.name for group in passed.groups].index(LAYERS[0])
    assert passed.failures.refused[position, bad].startswith(f"{LAYERS[0]}: ")
    lone = scorer.score(model, samples, groups, distinct([Request("good", good, None, 6, 6)]), {})
    torch.testing.assert_close(
        passed.experts[LAYERS[0]].per_sample[:, candidates.of_cell["good"]],
        lone.experts[LAYERS[0]].per_sample[:, 0],
    )


def test_fisher_against_an_enumeration_of_all_labels() -> None:
    """The mixture, and an expert alone: a mixture of which the others are left as they are."""
    model = mixtures.model(
        vocab_size=6, hidden_size=16, moe_intermediate_size=8, initializer_range=0.6
    )
    int4 = {"num_bits": 4, "axis": 0}
    ids = ((1, 4, 2), (3, 3))
    found = [
        estimate(
            model,
            Samples(ids, (False, False)),
            find_groups(model),
            distinct([Request("cell", int4, None, 2, 2)]),
            {},
            draws=256,
            seed=seed,
        )
        for seed in range(4)
    ]

    def quantized(only: int | None = None) -> Any:
        def forward(module: Any, *args: torch.Tensor) -> torch.Tensor:
            other = copy.deepcopy(module)
            for expert in range(mixtures.EXPERTS):
                if only in (None, expert):
                    for weight in (other.gate_up_proj, other.down_proj):
                        weight[expert] = fake_quantize(weight[expert], int4)
            other._forward_hooks.clear()
            return other(*args)

        return forward

    for name in LAYERS:
        at = [group.name for group in found[0].groups].index(name)
        for sample, tokens in enumerate(ids):
            draws = torch.cat([each.draws[at, 0, sample] for each in found]).numpy()
            expected = enumerated(model, tokens, [name], quantized())
            error = draws.std(ddof=1) / len(draws) ** 0.5
            assert abs(draws.mean() - expected) < 3.5 * error
            assert error < 0.1 * expected
            for expert in range(mixtures.EXPERTS):
                expected = enumerated(model, tokens, [name], quantized(expert))
                ours = [float(each.experts[name].per_sample[expert, 0, sample]) for each in found]
                assert sum(ours) / len(ours) == pytest.approx(expected, rel=0.2, abs=1e-12)


def test_divergence_equals_auto_quantize(
    work: tuple[Any, ...], pairs: dict[str, PairConfig]
) -> None:
    """ModelOpt's own KL divergence, and copies of a batch beside one at a time."""
    truth = diverge(*work, boundaries=[4, 6])
    assert truth.failures.refused == {}
    assert all(truth.reached)
    split = diverge(*work, boundaries=[4, 6], budget=Budget(limit=0, max_tokens=1, predicted=0))
    torch.testing.assert_close(split.per_sample, truth.per_sample, rtol=1e-4, atol=1e-8)
    names = [group.name for group in truth.groups]
    for name in ("wint8_aint8", "wnvfp4_afp16"):
        theirs = reference.score_cell(
            mixtures.model(),
            mixtures.samples(),
            pairs[name],
            vision=[],
            sizes=[4, 6],
            scored=6,
            batch_size=BATCH_SIZE,
            method="kl_div",
        )
        sums = truth.per_sample[:, work[3].of_cell[f"{name}-6"]].sum(dim=1).tolist()
        expected = {entry.group.name: entry.sensitivity for entry in theirs.groups}
        for layer in LAYERS:
            assert dict(zip(names, sums, strict=True))[layer] == pytest.approx(
                expected[layer], rel=5e-3
            )


def test_fisher_is_the_divergence(work: tuple[Any, ...]) -> None:
    """Where a change is small, the second order is enough."""
    truth = diverge(*work, boundaries=[4, 6])
    found = estimate(*work, draws=64, seed=1)
    candidates = work[3]
    for at, group in enumerate(found.groups):
        if group.name in LAYERS:
            for name in ("wint8_afp16-6", "wint8_aint8-6"):
                index = candidates.of_cell[name]
                ratio = found.per_sample[at, index].sum() / truth.per_sample[at, index].sum()
                assert 0.75 < float(ratio) < 1.33, (group.name, name)


def test_bfloat16_rounds_nothing_that_fisher_measures(samples: Samples) -> None:
    """INT8 changes a weight by about what bfloat16 rounds an output by."""
    narrow = mixtures.model().bfloat16()
    wide = copy.deepcopy(narrow).float()
    candidates = distinct([Request("cell", {"num_bits": 8, "axis": 0}, None, 6, 6)])
    found, expected = (
        estimate(model, samples, find_groups(model), candidates, {}, draws=64, seed=1)
        for model in (narrow, wide)
    )
    names = [group.name for group in found.groups]
    for name in LAYERS:
        at = names.index(name)
        ours, theirs = (each.per_sample[at, 0].sum() for each in (found, expected))
        assert float(ours) == pytest.approx(float(theirs), rel=0.1)
