"""Float32 with weights as they are stored: against models that are float32 as a whole."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qsens.checkpoint.experts import is_experts
from qsens.engine import float32
from qsens.engine.float32 import exact_products, in_float32, split
from qsens.engine.kl.divergence import divergences
from qsens.errors import UserError
from tests.engine import mixtures, pictures

_NEEDS_GPU = pytest.mark.skipif(
    float32.triton is None or not torch.cuda.is_available(), reason="needs a GPU and Triton"
)
DEVICES = ["cpu", pytest.param("cuda", marks=_NEEDS_GPU)]


def llama(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        attention_bias=True,
        **settings,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def given_to(kind: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return a model in bfloat16 with what it is called with."""
    generator = torch.Generator().manual_seed(0)
    if kind == "pictures":
        model, samples = pictures.model().bfloat16(), pictures.samples(1)
        ids = torch.tensor([samples.ids[0]])
        picture = samples.pictures[0]
        return model, {
            "input_ids": ids,
            "pixel_values": picture.tensors["pixel_values"].bfloat16(),
            "image_grid_thw": picture.tensors["image_grid_thw"],
            "mm_token_type_ids": (ids == pictures.IMAGE).long(),
        }
    model = mixtures.model() if kind == "mixture" else llama(tie_word_embeddings=kind == "tied")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (3, 11), generator=generator)
    return model.bfloat16(), {"input_ids": ids}


def moved(given: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in given.items()}


@pytest.mark.parametrize("device", DEVICES)
def test_three_parts_are_the_whole(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-90, 120, (1000, 7), generator=generator)
    x = torch.randn(1000, 7, generator=generator) * 2.0**exponents
    parts = split(x.to(device))
    assert [part.dtype for part in parts] == [torch.bfloat16] * 3
    total = sum(part.cpu().double() for part in parts)
    assert torch.equal(total, x.double())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("read", [torch.bfloat16, torch.float32])
def test_a_product_rounds_neither_operand(
    stored: torch.dtype, read: torch.dtype, device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 512, generator=generator).to(device, read)
    weight = torch.randn(40, 512, generator=generator).to(device, stored)
    bias = torch.randn(40, generator=generator).to(device, stored)
    expected = x.double() @ weight.double().t() + bias.double()
    with exact_products():
        found = F.linear(x, weight, bias)
    assert (found.dtype, found.shape) == (torch.float32, (2, 9, 40))
    # On a GPU 16 bits of a float32 input are taken.
    assert float((found.double() - expected).abs().max()) < (5e-4 if device == "cuda" else 5e-5)
    # What this is for: a plain product in bfloat16 is off by a hundred times as much, or more.
    rounded = F.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert float((rounded.double() - expected).abs().max()) > 2e-2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["plain", "tied", "pictures", "mixture"])
@torch.no_grad()
def test_a_model_gives_what_it_gives_as_float32(kind: str, device: str) -> None:
    model, given = given_to(kind)
    whole = copy.deepcopy(model).float()
    model, given = model.to(device), moved(given, device)
    held = dict(model.named_parameters())
    before = model(**given, use_cache=False).logits
    expected = whole(
        **{
            name: tensor.cpu().float() if tensor.is_floating_point() else tensor.cpu()
            for name, tensor in given.items()
        },
        use_cache=False,
    ).logits
    with in_float32(model):
        found = model(**given, use_cache=False).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
    assert float((before.cpu().float() - expected).abs().max()) > 1e-2
    # Nothing of it stays behind.
    assert all(held[name] is parameter for name, parameter in model.named_parameters())
    assert torch.equal(model(**given, use_cache=False).logits, before)


def test_the_mixture_is_one() -> None:
    assert any(map(is_experts, given_to("mixture")[0].modules()))


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_a_model_is_itself_under_another_batching(device: str) -> None:
    model, given = given_to("tied")
    model, ids = model.to(device), given["input_ids"].to(device)

    padded = F.pad(ids, (0, 21))
    rows = torch.cat([padded, padded.flip(0)])
    with in_float32(model):
        together = model(input_ids=ids, use_cache=False).logits
        apart = model(input_ids=rows, use_cache=False).logits[:3, : ids.shape[1]]
    found = divergences(together.flatten(0, 1), apart.reshape(-1, together.shape[-1]))
    assert float(found.mean()) < 2e-8


@torch.no_grad()
def test_a_model_that_rounds_by_itself_is_refused() -> None:
    model = llama().bfloat16()
    layer = model.model.layers[1].mlp
    forward = layer.forward
    layer.forward = lambda x: forward(x.bfloat16())
    with in_float32(model), pytest.raises(UserError, match="rounds activations to bfloat16"):
        model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)


@torch.no_grad()
def test_a_model_in_float32_is_left_alone() -> None:
    model = llama()
    ids = torch.tensor([[1, 2, 3]])
    before = model(input_ids=ids, use_cache=False).logits
    with in_float32(model):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
