"""Method ``fisher``: against an enumeration of all labels, and against the true divergence."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from qsens.checkpoint.components import resolve_components
from qsens.checkpoint.groups import find_groups
from qsens.checkpoint.loading import load_model, load_tokenizer
from qsens.config import ModelConfig, load_sweep
from qsens.data.samples import Samples, tokenize
from qsens.engine.amax import calibrate
from qsens.engine.candidates import Request, distinct
from qsens.engine.gradient.fisher import estimate
from qsens.engine.kl.measure import diverge
from qsens.engine.memory import Budget
from qsens.numerics import fake_quantize

INT4 = {"num_bits": 4, "axis": 0}
INT8 = {"num_bits": 8, "axis": 0}
TOKENS = ((1, 4, 2), (3, 3))


_SIZES = {
    "vocab_size": 6,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 16,
    "initializer_range": 0.6,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_MODELS = {
    "plain": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)),
    "capped": lambda: Gemma2ForCausalLM(Gemma2Config(**_SIZES, final_logit_softcapping=1.5)),
    "scaled": lambda: CohereForCausalLM(CohereConfig(**_SIZES, logit_scale=0.5)),
}


@pytest.fixture(scope="module", params=list(_MODELS))
def tiny(request):
    """A language model of six tokens, small enough to enumerate every label."""
    torch.manual_seed(0)
    return _MODELS[request.param]().eval().requires_grad_(False)


def quantized_linear(module, x):
    return torch.nn.functional.linear(x, fake_quantize(module.weight, INT4))


def enumerated(model, tokens, members, changed=quantized_linear):
    """Return ``1/2 E_y[<G_y, dY>^2]`` over all label sequences, by plain autograd.

    The inner product is the derivative of the labels' log-likelihood when the outputs of the
    members are moved along their change, at no distance.
    """
    step = torch.zeros((), requires_grad=True)
    handles = []
    for name in members:

        def move(module, args, output):
            return output + step * (changed(module, *args) - output).detach()

        handles.append(model.get_submodule(name).register_forward_hook(move))
    with torch.enable_grad():
        log_p = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
        grad_output = torch.stack(
            [
                torch.autograd.grad(value, step, retain_graph=True)[0]
                for value in log_p.flatten().unbind()
            ]
        ).view_as(log_p)
    for handle in handles:
        handle.remove()
    total = 0.0
    for labels in itertools.product(range(log_p.shape[1]), repeat=len(tokens)):
        picked = list(zip(range(len(tokens)), labels, strict=True))
        probability = sum(log_p[at] for at in picked).exp()
        total += float(probability * sum(grad_output[at] for at in picked) ** 2 / 2)
    return total


def test_against_an_enumeration_of_all_labels(tiny):
    groups = find_groups(tiny)
    candidates = distinct([Request("cell", INT4, None, 2, 2)])
    samples = Samples(TOKENS, (False, False))
    found = [
        estimate(tiny, samples, groups, candidates, {}, draws=256, seed=seed) for seed in range(8)
    ]
    assert found[0].failures.refused == {}
    draws = torch.cat([each.draws for each in found], dim=-1)[:, 0]
    for position, group in enumerate(found[0].groups):
        for sample, tokens in enumerate(TOKENS):
            expected = enumerated(tiny, tokens, group.members)
            drawn = draws[position, sample].numpy()
            if group.name == "lm_head":
                # The change of the logits is taken whole: where they are capped, it is bent.
                exact = tiny.config.model_type != "gemma2"
                rel = 1e-4 if exact else 0.3
                assert drawn == pytest.approx(np.full(len(drawn), expected), rel=rel)
                continue
            # Strata leave less spread than this allows for.
            error = drawn.std(ddof=1) / np.sqrt(len(drawn))
            assert abs(drawn.mean() - expected) < 3.5 * error, group.name
            assert error < 0.1 * expected
    assert len(found[0].groups) == 2 * 4 + 1


def test_the_head_against_the_divergence_of_logits(tiny):
    """What a small change of the head's weights does to the model's own logits."""
    candidates = distinct([Request("cell", INT8, None, 2, 2)])
    found = estimate(
        tiny, Samples(TOKENS, (False, False)), find_groups(tiny), candidates, {}, draws=1, seed=0
    )
    head = tiny.get_output_embeddings()
    kept = head.weight
    for sample, tokens in enumerate(TOKENS):
        ids = torch.tensor([tokens])
        before = tiny(input_ids=ids).logits[0].double().log_softmax(-1)
        head.weight = torch.nn.Parameter(fake_quantize(kept, INT8), requires_grad=False)
        after = tiny(input_ids=ids).logits[0].double().log_softmax(-1)
        head.weight = kept
        truth = float((before.exp() * (before - after)).sum())
        (position,) = (at for at, group in enumerate(found.groups) if group.name == "lm_head")
        assert float(found.per_sample[position, 0, sample]) == pytest.approx(truth, rel=0.02)


@pytest.fixture(scope="module")
def work(demo_checkpoint, request):
    config = ModelConfig(path=demo_checkpoint.directory, dtype="float32")
    path = request.config.rootpath / "configs/dataset/demo/captions_small.txt"
    captions = path.read_text(encoding="utf-8").splitlines()
    samples = tokenize(captions, load_tokenizer(config), longest=512)
    model = load_model(config, torch.device("cpu"))
    pairs = load_sweep("single", ["quant_pair=wfp8_afp8,wint4_afp16,wint8_aint8"]).config.quant_pair
    candidates = distinct(
        [
            Request(
                pair.name,
                pair.weight_quantizer.cfg(),
                pair.input_quantizer.cfg() if pair.input_quantizer else None,
                16,
                16,
            )
            for pair in pairs
        ]
    )
    groups = find_groups(model, resolve_components(config).vision_patterns)
    amax = calibrate(model, samples, groups, calibration_sizes=candidates.calibration_sizes())
    return model, samples, groups, candidates, amax


@pytest.fixture(scope="module")
def whole(work):
    return estimate(*work, draws=16, seed=3)


def test_it_is_the_divergence(work, whole):
    truth = diverge(*work, boundaries=[16]).per_sample.sum(-1)
    found = whole.per_sample.sum(-1)
    error = (whole.draws.var(-1) / 16).sum(-1).sqrt()
    for candidate in range(3):
        ours, theirs = found[:, candidate].numpy(), truth[:, candidate].numpy()
        assert 0.9 < np.median(ours / theirs) < 1.1
        assert stats.spearmanr(ours, theirs).statistic > 0.9
        # A normal variable is within three of its errors but once in 370 times.
        assert (np.abs(ours - theirs) < 3 * error[:, candidate].numpy()).mean() > 0.85
    head = [group.name for group in whole.groups].index("lm_head")
    assert (found / truth)[head].tolist() == pytest.approx([1.0] * 3, abs=0.02)


def test_draws_belong_to_samples_not_to_batches(work, whole):
    budget = Budget(limit=0, max_tokens=60, predicted=0, keeps_records=True, head_formats=2)
    split = estimate(*work, draws=16, seed=3, budget=budget)
    torch.testing.assert_close(split.draws.sum(2), whole.draws.sum(2), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(split.loss, whole.loss, rtol=1e-5, atol=0)
    again = estimate(*work, draws=16, seed=4)
    assert not torch.allclose(again.draws.sum(2), whole.draws.sum(2), rtol=0.01)


def test_in_bfloat16_no_rounding_of_outputs_is_counted():
    """8-bit integers under powers of two are exact in bfloat16: both models have these weights."""
    gentle = {"num_bits": 8, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    rounds = LlamaForCausalLM(config).eval().requires_grad_(False).bfloat16()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 200, (8, 14), generator=generator).tolist()
    samples = Samples(tuple(map(tuple, ids)), (False,) * 8)
    groups = find_groups(rounds)
    candidates = distinct([Request("cell", gentle, gentle, 8, 8)])
    found, expected = (
        estimate(model, samples, groups, candidates, {}, draws=64, seed=0).per_sample[:, 0].sum(-1)
        for model in (rounds, copy.deepcopy(rounds).float())
    )
    ratios = found / expected
    assert groups[-1].name == "lm_head"
    # What they read differs by the rounding of the processor's own products in bfloat16.
    assert float(ratios[-1]) == pytest.approx(1, abs=0.1)
    assert float(ratios.median()) == pytest.approx(1, abs=0.1)
    assert float(ratios.max()) < 1.4
