"""Method ``kl_div``: against whole models with one group quantized, each run alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qsens.checkpoint.groups import Group, find_groups
from qsens.data.samples import Samples
from qsens.engine.amax import calibrate
from qsens.engine.candidates import Request, distinct
from qsens.engine.kl import divergence, perturbed_forward
from qsens.engine.kl.divergence import divergences
from qsens.engine.kl.measure import diverge
from qsens.engine.memory import Budget
from qsens.numerics import fake_quantize
from tests.engine import pictures

INT4 = {"num_bits": 4, "axis": 0}
INT8 = {"num_bits": 8, "axis": None}
_NEEDS_GPU = pytest.mark.skipif(
    divergence.triton is None or not torch.cuda.is_available(), reason="needs a GPU and Triton"
)
CANDIDATES = distinct([Request("w4", INT4, None, 4, 4), Request("w4a8", INT4, INT8, 4, 4)])


def text_model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def text_samples() -> Samples:
    generator = torch.Generator().manual_seed(0)
    ids = tuple(
        tuple(torch.randint(0, 50, (length,), generator=generator).tolist())
        for length in (5, 9, 3, 7)
    )
    return Samples(ids, (False,) * 4)


def seen_inputs(samples: Samples, index: int) -> dict[str, torch.Tensor]:
    """Return what a model is called with for one sample, made here anew."""
    ids = torch.tensor([samples.ids[index]])
    given = {"input_ids": ids}
    if samples.pictures:
        picture = samples.pictures[index]
        given["pixel_values"] = picture.tensors["pixel_values"]
        given["image_grid_thw"] = picture.tensors["image_grid_thw"]
        given["mm_token_type_ids"] = (ids == pictures.IMAGE).long()
    return given


def distributions(model: nn.Module, samples: Samples) -> list[torch.Tensor]:
    return [
        model(**seen_inputs(samples, at), use_cache=False).logits[0].double().log_softmax(-1)
        for at in range(4)
    ]


def alone(
    model: nn.Module, samples: Samples, group: Group, amax: Callable[[str], torch.Tensor] | None
) -> list[float]:
    """Return the divergence of each sample when a group's weights are replaced, and its inputs."""
    before = distributions(model, samples)
    kept, handles = {}, []
    for name in group.members:
        module = model.get_submodule(name)
        kept[name] = module.weight.data
        module.weight.data = fake_quantize(module.weight.data, INT4)
        if amax is not None:
            largest = amax(name)

            def quantized(module, args, largest=largest):
                return (fake_quantize(args[0], INT8, largest),)

            handles.append(module.register_forward_pre_hook(quantized))
    after = distributions(model, samples)
    for handle in handles:
        handle.remove()
    for name, weight in kept.items():
        model.get_submodule(name).weight.data = weight
    found = []
    for at, (log_p, log_q) in enumerate(zip(before, after, strict=True)):
        tokens = (log_p.exp() * (log_p - log_q)).sum(-1)
        if samples.spans:
            ((start, end),) = samples.spans[at]
            tokens = tokens[start - 1 : end - 1]
        found.append(float(tokens.sum()))
    return found


@pytest.mark.parametrize("takes_images", [False, True], ids=["text", "pictures"])
@pytest.mark.parametrize("tokens", [16384, 1], ids=["together", "one at a time"])
def test_every_group_alone(takes_images: bool, tokens: int) -> None:
    model = pictures.model() if takes_images else text_model()
    samples = pictures.samples(4) if takes_images else text_samples()
    groups = find_groups(model, ("model.visual.*",), all_layers=True)
    amax = calibrate(model, samples, groups, calibration_sizes=[4])
    budget = Budget(limit=0, max_tokens=tokens, predicted=0)
    found = diverge(model, samples, groups, CANDIDATES, amax, boundaries=[2], budget=budget)
    assert found.failures.refused == {}
    assert len(found.groups) == (19 + 13 if takes_images else 13)
    for at, group in enumerate(found.groups):
        for candidate, of in ((0, None), (1, amax[4].__getitem__)):
            expected = alone(model, samples, group, of)
            # Maxima of this batch and of a sample alone may round to neighbouring integers.
            assert found.per_sample[at, candidate].tolist() == pytest.approx(
                expected, rel=2e-3, abs=1e-9
            ), (group.name, candidate)
    losses = []
    for at, log_p in enumerate(distributions(model, samples)):
        ids = torch.tensor(samples.ids[at])
        ((start, end),) = samples.spans[at] if takes_images else ((1, len(ids)),)
        losses.append(float(-log_p[start - 1 : end - 1].gather(1, ids[start:end, None]).sum()))
    assert found.loss.tolist() == pytest.approx(losses, rel=1e-5)


def test_only_what_is_asked_for() -> None:
    model, samples = text_model(), text_samples()
    groups = find_groups(model)
    amax = calibrate(model, samples, groups, calibration_sizes=[4])
    every = diverge(model, samples, groups, CANDIDATES, amax, boundaries=[]).per_sample
    chosen = {("lm_head", 1), ("model.layers.1.mlp.down_proj", 0)}
    some = diverge(model, samples, groups, CANDIDATES, amax, boundaries=[], only=chosen)
    for at, group in enumerate(some.groups):
        for candidate in range(2):
            if (group.name, candidate) in chosen:
                torch.testing.assert_close(some.per_sample[at, candidate], every[at, candidate])
            else:
                assert not some.per_sample[at, candidate].any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=_NEEDS_GPU)])
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 20.0])
def test_divergences_of_rows(device: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    p = 4 * torch.randn(7, 10000, generator=generator)
    q = torch.stack([p + scale * torch.randn(p.shape, generator=generator) for _ in range(3)])
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p.double()),
        torch.distributions.Categorical(logits=q.double()),
    )
    found = divergences(p.to(device), q.flatten(0, 1).to(device)).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert torch.equal(divergences(p, p), torch.zeros(1, 7, dtype=torch.float64))


def test_a_model_in_bfloat16_is_measured_as_if_nothing_rounded() -> None:
    """A gentle format moves a model by far less than rounding its activations does."""
    model, samples = text_model().bfloat16(), text_samples()
    groups = find_groups(model)
    gentle = {"num_bits": 8, "axis": 0}
    candidates = distinct([Request("cell", gentle, None, 4, 4)])
    found = diverge(model, samples, groups, candidates, {}, boundaries=[2])

    stored = copy.deepcopy(model)
    whole = copy.deepcopy(model).float()
    before = distributions(whole, samples)
    for at, group in enumerate(found.groups):
        changed = copy.deepcopy(whole)
        for name in group.members:
            weight = fake_quantize(stored.get_submodule(name).weight.data, gentle)
            changed.get_submodule(name).weight.data = weight.float()
        after = distributions(changed, samples)
        expected = [nats(*pair) for pair in zip(before, after, strict=True)]
        assert found.per_sample[at, 0].tolist() == pytest.approx(expected, rel=1e-2), group.name

    rounded = distributions(stored, samples)
    floor = [nats(*pair) for pair in zip(before, rounded, strict=True)]
    assert found.floor is not None
    # Rounding depends on what a sample is batched with.
    assert float(found.floor.sum()) == pytest.approx(sum(floor), rel=0.2)
    assert sum(floor) > 3 * float(found.per_sample[:, 0].sum(dim=-1).median())
    assert diverge(whole, samples, groups, candidates, {}, boundaries=[]).floor is None


def nats(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    return float((log_p.exp() * (log_p - log_q)).sum())


def test_a_passing_fault_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk under a compiler's cache, say, in one format; the others are measured."""
    model, samples = text_model(), text_samples()
    groups = find_groups(model)
    quantize_weight = perturbed_forward.quantize_weight

    def fails(weight: torch.Tensor, cfg: Mapping[str, Any], amax: Any) -> torch.Tensor:
        if cfg["num_bits"] == 8:
            raise OSError(28, "No space left on device")
        return quantize_weight(weight, cfg, amax)

    monkeypatch.setattr(perturbed_forward, "quantize_weight", fails)
    candidates = distinct([Request("4", INT4, None, 4, 4), Request("8", INT8, None, 4, 4)])
    found = diverge(model, samples, groups, candidates, {}, boundaries=[])
    assert found.failures.refused == {}
    assert list(found.failures.broken) == [1]
    assert found.failures.fault(0, "4") is None
    fault = found.failures.fault(1, "8")
    assert "No space left" in str(fault)
    assert fault.exit_code == 1
    assert bool((found.per_sample[:, 0] > 0).all())
