"""Llama 4's experts, each with its own tokens, against its own class."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from qsens.checkpoint.experts import expert_weights, is_experts
from qsens.checkpoint.routed import route_experts
from qsens.checkpoint.twin import build_twin, default_settings
from qsens.errors import UserError


@pytest.fixture
def model() -> Any:
    return build_twin(default_settings("llama4_text"))


def test_a_mixture_gives_what_its_own_class_gives(model: Any) -> None:
    own = copy.deepcopy(model)
    assert any(type(module) is Llama4TextMoe for module in own.modules())
    names = [name for name, _ in own.named_parameters()]
    route_experts(model, "eager")
    assert [name for name, _ in model.named_parameters()] == names
    for before, after in zip(own.modules(), model.modules(), strict=True):
        if isinstance(before, Llama4TextMoe):
            x = torch.randn(3, 17, before.hidden_dim)
            output, logits = before(x)
            found, routed_logits = after(x)
            assert torch.equal(routed_logits, logits)
            torch.testing.assert_close(found, output.view_as(found), rtol=1e-5, atol=1e-6)
            assert len(set(logits.argmax(dim=1).tolist())) > 1
    ids = torch.randint(0, 200, (2, 11))
    torch.testing.assert_close(model(ids).logits, own(ids).logits, rtol=1e-4, atol=1e-5)


def test_weights_are_those_of_the_checkpoint_without_a_copy(model: Any) -> None:
    before = {name: one.data_ptr() for name, one in model.named_parameters()}
    shapes = {name: one.shape for name, one in model.named_parameters()}
    route_experts(model, "eager")
    assert {name: one.data_ptr() for name, one in model.named_parameters()} == before
    mixtures = [(name, one) for name, one in model.named_modules() if is_experts(one)]
    assert mixtures
    for name, experts in mixtures:
        for weight, part in zip(
            expert_weights(experts), ("gate_up_proj", "down_proj"), strict=True
        ):
            count, inputs, outputs = shapes[f"{name}.{part}"]
            assert weight.shape == (count, outputs, inputs)


def test_more_than_one_expert_a_token_is_refused(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, Llama4TextMoe):
            module.top_k = 2
    with pytest.raises(UserError, match="go to 2 experts each"):
        route_experts(model, "eager")
