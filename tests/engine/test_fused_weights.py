"""Weights that servers fuse: one scale for a tensor is that of the largest of them."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qsens.checkpoint.groups import find_groups
from qsens.config import PairConfig, load_sweep
from qsens.data.samples import Samples
from qsens.engine.candidates import Request, distinct
from qsens.engine.fused_weights import FusedWeights
from qsens.engine.gradient import scorer
from qsens.engine.kl.measure import diverge
from qsens.engine.kl.whole import WholeModel

TENSOR = {"num_bits": (4, 3), "axis": None, "reference": "compressed-tensors"}
CHANNEL = {**TENSOR, "axis": 0}
MODELOPT = {"num_bits": (4, 3), "axis": None}
NVFP4 = {
    "num_bits": (2, 1),
    "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
    "reference": "compressed-tensors",
}


@pytest.fixture
def model() -> nn.Module:
    """Return a model whose keys are a hundred times as large as what they are fused with."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    made: nn.Module = LlamaForCausalLM(config).eval().requires_grad_(False)
    with torch.no_grad():
        for name, module in made.named_modules():
            if name.endswith("k_proj"):
                module.weight *= 100
    return made


def test_only_one_scale_for_a_whole_weight_is_shared(model: nn.Module) -> None:
    groups = find_groups(model)
    fused = FusedWeights(model, groups)
    for group in groups:
        weights = [model.get_submodule(name).weight for name in group.members]
        largest = max(float(weight.abs().max()) for weight in weights)
        for name in group.members:
            for cfg in (CHANNEL, MODELOPT):
                assert fused.amax(name, cfg) is None
            for cfg in (TENSOR, NVFP4):
                found = fused.amax(name, cfg)
                if len(group.members) == 1:
                    assert found is None
                else:
                    assert found is not None
                    assert float(found) == largest


def faked(weight: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    step = amax / 448
    return (weight / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step


def pair(name: str) -> PairConfig:
    own, granularity = next(load_sweep("single", [f"quant_pair={name}"]).config.formats)
    return own.with_granularity(granularity)


def samples() -> Samples:
    ids = torch.randint(0, 60, (6, 9), generator=torch.Generator().manual_seed(5))
    return Samples(tuple(map(tuple, ids.tolist())), (False,) * 6)


def kl(model: nn.Module, given: Samples, weights: dict[str, torch.Tensor]) -> float:
    """Return the KL divergence from the model, nats a token, with other weights in some modules."""
    ids = torch.tensor(given.ids)
    with torch.no_grad():
        before = model(ids).logits.double().log_softmax(-1)
        kept = {name: model.get_submodule(name).weight.data for name in weights}
        for name, weight in weights.items():
            model.get_submodule(name).weight.data = weight
        after = model(ids).logits.double().log_softmax(-1)
        for name, weight in kept.items():
            model.get_submodule(name).weight.data = weight
    return float((before.exp() * (before - after)).sum(-1).mean())


def by_hand(model: nn.Module, given: Samples, weights: dict[str, torch.Tensor]) -> list[float]:
    """Return each sample's score: the gradient of its loss times the error of outputs, squared."""
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str, _: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        output.retain_grad()
        kept[name] = (args[0].detach(), output)

    hooks = [
        model.get_submodule(name).register_forward_hook(functools.partial(keep, name))
        for name in weights
    ]
    found = []
    for sample in given.ids:
        ids = torch.tensor([sample])
        embedded = model.get_input_embeddings()(ids).requires_grad_(True)
        logits = model(inputs_embeds=embedded).logits[0, :-1]
        nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
        total = 0.0
        for name, weight in weights.items():
            x, output = kept[name]
            assert output.grad is not None
            error = x @ (weight - model.get_submodule(name).weight).T
            total += float((output.grad * error).square().sum())
        found.append(total)
    for hook in hooks:
        hook.remove()
    return found


def test_scores_and_measurements_are_under_the_shared_scale(model: nn.Module) -> None:
    """Measured KL of the group, of the whole, and fisher's estimate, against weights made here."""
    groups, given = find_groups(model), samples()
    at = next(i for i, g in enumerate(groups) if "k_proj" in " ".join(g.members))
    members = groups[at].members
    weights = {name: model.get_submodule(name).weight for name in members}
    largest = torch.stack([weight.abs().max() for weight in weights.values()]).max()
    fused = {name: faked(weight, largest) for name, weight in weights.items()}
    apart = {name: faked(weight, weight.abs().max()) for name, weight in weights.items()}
    expected, otherwise = kl(model, given, fused), kl(model, given, apart)
    assert expected > 1.3 * otherwise

    format_ = pair("wfp8_afp16-ct")
    request = Request("c", format_.weight_quantizer.cfg(), None, 6, 6)
    found = diverge(model, given, groups, distinct([request]), {}, boundaries=[])
    measured = float(found.per_sample[at, 0].sum()) / (6 * 9)
    assert measured == pytest.approx(expected, rel=1e-3)

    whole = WholeModel(model, groups, given, given)
    assert whole.measure("q/k/v", dict.fromkeys(members, format_)).divergence == pytest.approx(
        expected, rel=1e-3
    )
    scored = scorer.score(model, given, groups, distinct([request]), {})
    assert scored.per_sample[at, 0].tolist() == pytest.approx(
        by_hand(model, given, fused), rel=1e-4
    )
