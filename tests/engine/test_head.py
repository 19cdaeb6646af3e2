"""What a model makes of its head's outputs: read off running models, held against their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from qsens.data.samples import Samples, make_batch
from qsens.engine.head import Head, LogitFunction, head_input, without_head
from qsens.errors import UserError

_SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SAMPLES = Samples(((5, 9, 4, 77), (8, 3)), (False, False))


def tiny(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**_SIZES | more)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("Llama", {}, LogitFunction()),
        ("Gemma2", {"final_logit_softcapping": 3.0}, LogitFunction(cap=3.0)),
        ("Cohere", {"logit_scale": 0.0625}, LogitFunction(scale=0.0625)),
        ("Granite", {"logits_scaling": 6.0}, LogitFunction(scale=1 / 6)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_those_of_the_model(name, more, expected, dtype):
    model = tiny(name, **more).to(dtype)
    head = Head.of(model)
    assert head.logits == expected
    batch = make_batch(SAMPLES, [0])
    with without_head(head.module):
        hidden = head_input(model, batch)
    logits = model(**batch.inputs(), use_cache=False).logits
    assert torch.allclose(head(hidden), logits, rtol=1e-6 if dtype == torch.float32 else 1e-2)
    assert not torch.allclose(model.lm_head(hidden), logits, rtol=1e-2) or name == "Llama"


@pytest.mark.parametrize("function", [LogitFunction(0.25), LogitFunction(0.5, 2.0)], ids=str)
def test_derivative(function):
    x = torch.linspace(-9, 9, 41, dtype=torch.float64)
    slope = (function(x + 1e-6) - function(x - 1e-6)) / 2e-6
    found = function.derivative(function(x))
    assert torch.allclose(torch.as_tensor(found, dtype=x.dtype).expand_as(x), slope, atol=1e-7)


def test_a_wrapper_that_leaves_the_scale_out():
    """The configuration says 0.0625, the class does not look at it."""
    text = _SIZES | {"logit_scale": 0.0625, "model_type": "cohere2"}
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = transformers.Cohere2VisionConfig(text_config=text, vision_config=vision)
    model = transformers.Cohere2VisionForConditionalGeneration(config).eval()
    assert model.config.get_text_config().logit_scale == 0.0625
    assert Head.of(model).logits == LogitFunction()


class Shifted(transformers.LlamaForCausalLM):
    """Adds to its logits."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(300)
        return output


def test_other_logits_are_refused_by_name():
    model = Shifted(transformers.LlamaConfig(**_SIZES)).eval()
    with pytest.raises(UserError, match="Shifted: its logits are neither scaled nor capped"):
        Head.of(model)


def test_a_head_that_is_no_linear_module_is_refused():
    model = tiny("Llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UserError, match="LlamaForCausalLM: its head is no linear module"):
        Head.of(model)
