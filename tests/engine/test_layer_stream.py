"""Layers that come and go: the same numbers as those of a model that lies on its device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qsens.checkpoint.groups import find_groups
from qsens.checkpoint.modules import layers_of
from qsens.config.models import AutoquantConfig
from qsens.data.samples import Samples
from qsens.engine.candidates import Request
from qsens.engine.interleave import Interleaved
from qsens.engine.layer_stream import LayerStream, device_of, layer_bytes, stream_of
from qsens.engine.memory import GIB, weight_bytes
from qsens.engine.scoring_pass import ScoringPass, place, run_pass
from qsens.errors import UserError
from tests.engine import pictures

CPU = torch.device("cpu")
FP8 = {"num_bits": (4, 3), "axis": None}
INT8 = {"num_bits": 8, "axis": 0}
REQUESTS = [
    Request("a", FP8, FP8, 24, 24),
    Request("b", INT8, None, 24, 24),
    Request("c", INT8, {"num_bits": 8, "axis": None}, 40, 24),
]


def dense() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def mixture() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    return Qwen3MoeForCausalLM(config).eval().requires_grad_(False)


def samples() -> Samples:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 30, (40,), generator=generator).tolist()
    ids = [torch.randint(0, 300, (length,), generator=generator).tolist() for length in lengths]
    return Samples(tuple(map(tuple, ids)), (False,) * len(ids))


def done(model: nn.Module, method: Any, requests: Sequence[Request] = REQUESTS) -> ScoringPass:
    autoquant = AutoquantConfig(method=method, draws=4)
    return run_pass(model, samples(), find_groups(model), requests, autoquant, boundaries=(8, 24))


@pytest.mark.parametrize("make", [dense, mixture])
@pytest.mark.parametrize("method", ["gradient", "fisher", "kl_div"])
def test_scores_and_amax_are_those_of_a_resident_model(
    make: Callable[[], nn.Module], method: str
) -> None:
    expected = done(make(), method)
    model = make()
    LayerStream(model, CPU)
    found = done(model, method)
    torch.testing.assert_close(found.scores.per_sample, expected.scores.per_sample, rtol=0, atol=0)
    torch.testing.assert_close(found.scores.loss, expected.scores.loss, rtol=0, atol=0)
    assert found.scores.amax.keys() == expected.scores.amax.keys()
    for size, amax in expected.scores.amax.items():
        assert found.scores.amax[size] == amax
    assert not found.scores.failures.refused
    assert (expected.streamed, expected.weights) == (0, weight_bytes(make()))
    assert found.streamed > 0
    assert found.weights < expected.weights


@pytest.mark.parametrize("family", pictures.FAMILIES)
@pytest.mark.parametrize("method", ["gradient", "kl_div"])
def test_with_pictures_layers_of_the_tower_come_and_go_as_well(family: str, method: Any) -> None:
    read, autoquant = pictures.samples(8), AutoquantConfig(method=method)
    requests = [Request("a", FP8, FP8, 8, 8)]
    passes = []
    for streamed in (False, True):
        model = pictures.model(family).requires_grad_(False)
        if streamed:
            LayerStream(model, CPU)
        passes.append(run_pass(model, read, find_groups(model), requests, autoquant, boundaries=()))
    resident, found = (done.scores.per_sample for done in passes)
    torch.testing.assert_close(found, resident, rtol=0, atol=0)
    assert (found.sum(dim=(1, 2)) > 0).sum() > pictures.TOWER[family]


def test_in_bfloat16_too() -> None:
    expected = done(dense().bfloat16(), "fisher").scores.per_sample
    model = dense().bfloat16()
    LayerStream(model, CPU)
    torch.testing.assert_close(done(model, "fisher").scores.per_sample, expected, rtol=0, atol=0)


def test_weights_cross_once_each_way_whatever_the_number_of_batches() -> None:
    model = dense()
    each = layer_bytes(model)
    stream = LayerStream(model, CPU)
    done(model, "gradient", REQUESTS[:2])  # looks at the head as well, once
    before = stream.fetched
    found = done(model, "gradient", REQUESTS[:2])
    assert stream.fetched - before == found.streamed
    # The two that a pass ends with are there already as the next one begins, as are the two that
    # the forward pass ends with when it turns.
    assert found.streamed == 2 * (len(each) - 2) * max(each.values())


def test_two_layers_at_most_are_on_the_device() -> None:
    model = dense()
    layers = layers_of(model)
    held = {name: [w.data_ptr() for w in layer.parameters()] for name, layer in layers.items()}
    stream = LayerStream(model, CPU)
    most = 0

    def look(*_: Any) -> None:
        nonlocal most
        moved = [
            name
            for name, layer in layers.items()
            if any(w.data_ptr() not in held[name] for w in layer.parameters() if w.ndim > 1)
        ]
        most = max(most, len(moved))

    for layer in layers.values():
        layer.register_forward_hook(look)
    done(model, "fisher")
    assert most == 2
    largest = max(layer_bytes(model).values())
    rest = weight_bytes(dense()) - sum(layer_bytes(model).values())
    assert stream.weight_bytes == rest + 2 * largest


def test_a_matrix_of_two_layers_stays() -> None:
    model = dense()
    layers = list(layers_of(model).values())
    layers[3].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    expected = done(model, "gradient").scores.per_sample
    other = dense()
    layers = list(layers_of(other).values())
    layers[3].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    LayerStream(other, CPU)
    torch.testing.assert_close(done(other, "gradient").scores.per_sample, expected, rtol=0, atol=0)


def placed(model: nn.Module, gib: float, method: Any = "gradient") -> bool:
    autoquant = AutoquantConfig(method=method, draws=4, memory_gb=gib)
    place(model, find_groups(model), REQUESTS, autoquant, CPU)
    assert device_of(model) == CPU
    return stream_of(model) is not None


def test_what_fits_is_resident_what_does_not_is_streamed_or_refused_with_what_would_do() -> None:
    assert not placed(dense(), 1.0)
    with pytest.raises(UserError, match=r"a pass needs ([\d.]+) GiB") as refused:
        placed(dense(), 1e-4)
    assert refused.value.where == "autoquant.memory_gb"
    assert "Set autoquant.memory_gb=" in refused.value.remedy
    enough = float(refused.value.remedy.split("memory_gb=")[1].split(",")[0])
    model = dense()
    assert placed(model, enough)
    autoquant = AutoquantConfig(memory_gb=enough)
    found = run_pass(model, samples(), find_groups(model), REQUESTS, autoquant, boundaries=(8, 24))
    assert found.weights + found.budget.predicted <= enough * GIB
    expected = done(dense(), "gradient").scores.per_sample
    torch.testing.assert_close(found.scores.per_sample, expected, rtol=1e-6, atol=0)


def test_an_error_in_one_run_ends_all_and_leaves_the_grad_mode() -> None:
    turns = Interleaved()
    ended: list[int] = []

    def run(index: int) -> int:
        try:
            with torch.set_grad_enabled(index % 2 == 0):
                turns.pause("first")
                assert torch.is_grad_enabled() == (index % 2 == 0)
                if index == 1:
                    raise ValueError("broken")
                turns.pause("second")
                return index
        finally:
            ended.append(index)

    with torch.no_grad(), pytest.raises(ValueError, match="broken"):
        turns.run([lambda i=i: run(i) for i in range(3)], lambda _: None)
    assert sorted(ended) == [0, 1, 2]
    assert torch.is_grad_enabled()


def test_runs_that_part_ways_take_turns_where_they_meet() -> None:
    turns = Interleaved()
    order: list[tuple[int, str]] = []

    def run(index: int) -> int:
        for at in ("a", "b", "c") if index else ("a", "c"):
            turns.pause(at)
            order.append((index, at))
        return index * 10

    assert turns.run([lambda i=i: run(i) for i in range(3)], lambda _: None) == [0, 10, 20]
    assert order == [(0, "a"), (1, "a"), (2, "a"), (0, "c"), *[(i, "b") for i in (1, 2)],
                     (1, "c"), (2, "c")]  # fmt: skip


def test_a_checkpoint_is_read_where_it_lies_in_its_file(tmp_path: Path) -> None:
    dense().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    files = [line for line in maps if "model.safetensors" in line]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in files]
    weights = [w for layer in layers_of(model).values() for w in layer.parameters()]
    inside = [any(low <= w.data_ptr() < high for low, high in spans) for w in weights]
    assert all(inside)
