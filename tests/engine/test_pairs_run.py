"""Every shipped format runs on a tiny model, and the new ones give what ModelOpt gives."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from qsens.config import PairConfig, Roots, choices, load_sweep
from qsens.data.samples import Samples, equal_length_batches, nominal_labels
from qsens.engine.candidates import Candidates, Request, distinct
from qsens.engine.scores import PassScores

pytest.importorskip("modelopt")

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from qsens.checkpoint.groups import find_groups
from qsens.engine.amax import calibrate
from qsens.engine.gradient import scorer
from qsens.engine.modelopt import reference

REPO = Path(__file__).resolve().parents[2]
ROOTS = Roots(root=REPO, results=REPO, configs=(REPO / "configs",))
GRANULARITIES = ("w_tensor", "w_channel", "w_group64", "w_group128", "a_tensor", "a_token")
VISION = ["*visual*"]
BATCH_SIZE = 4
# Groups of a layer (q/k/v, o, gate/up, down), and the head.
GROUPS = 4 + 1


def formats(pairs: list[str], granularities: tuple[str, ...]) -> dict[str, PairConfig]:
    """Return every pair at every granularity that makes sense for it, as a sweep has them."""
    config = load_sweep(
        "single",
        [f"quant_pair={','.join(pairs)}", f"quant_granularity={','.join(granularities)}"],
        roots=ROOTS,
    ).config
    return {
        f"{pair.name}+{granularity.name}": pair.with_granularity(granularity)
        for pair in config.quant_pair
        for granularity in config.quant_granularity
        if pair.refusal(granularity) is None
    }


PAIRS = formats(list(choices("quant_pair", ROOTS)), ("default",))
LAID_OVER = formats(["wfp8_afp8", "wint4_aint4"], GRANULARITIES)
SERVED = {
    f"{pair.name}+{granularity.name}": pair.with_granularity(granularity)
    for pair, granularity in load_sweep("serving", roots=ROOTS).config.formats
}


def tiny_model(layers: int = 1) -> Qwen3VLForConditionalGeneration:
    """Return a random model whose weights have outliers, so that granularity shows."""
    torch.manual_seed(7)
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 300,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rope_parameters": {"rope_type": "default", "mrope_section": [6, 5, 5]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 128,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=296,
        video_token_id=297,
        vision_start_token_id=298,
        vision_end_token_id=299,
    )
    model = Qwen3VLForConditionalGeneration(config).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight[:: module.out_features // 4] *= 6
            module.weight[:, ::37] *= 3
    return model


@pytest.fixture(scope="module")
def samples() -> Samples:
    draw = torch.Generator().manual_seed(3)
    lengths = (9, 12, 9, 7, 12, 9)
    ids = tuple(
        tuple(torch.randint(0, 290, (length,), generator=draw).tolist()) for length in lengths
    )
    return Samples(ids=ids, truncated=(False,) * len(ids))


def one_pass(
    cells: dict[str, PairConfig], samples: Samples
) -> tuple[PassScores, Candidates, list[str]]:
    """Score all ``cells`` by the fused engine in one pass, on the batches of the reference."""
    model = tiny_model()
    groups = find_groups(model, VISION)
    candidates = distinct(
        [
            Request(
                cell=name,
                weight=pair.weight_quantizer.cfg(),
                input=pair.input_quantizer.cfg() if pair.input_quantizer else None,
                calibrated=len(samples),
                scored=len(samples),
            )
            for name, pair in cells.items()
        ]
    )
    batches = equal_length_batches(samples, boundaries=[len(samples)], batch_size=BATCH_SIZE)
    amax = {}
    if candidates.calibration_sizes():
        amax = calibrate(
            model,
            samples,
            groups,
            calibration_sizes=candidates.calibration_sizes(),
            batches=batches,
        )
    found = scorer.score(model, samples, groups, candidates, amax, batches=batches)
    return found, candidates, [group.name for group in found.groups]


def sensitivities(
    found: PassScores, candidates: Candidates, cell: str, samples: Samples
) -> list[float]:
    """Return ``sum_i s_i / T_b(i)^2`` of each group."""
    labels = nominal_labels(samples.labels(), BATCH_SIZE)
    weights = torch.tensor(labels, dtype=torch.float64).square()
    per_sample = found.per_sample[:, candidates.of_cell[cell]]
    return [float(value) for value in (per_sample / weights).sum(dim=1)]


def test_there_are_as_many_pairs_as_files() -> None:
    assert len(PAIRS) == 22
    assert len(SERVED) == 17
    assert len(LAID_OVER) == 4 + 4  # FP8: w_channel, two groups, a_token; INT4: all but two


def test_every_format_scores_every_group_in_one_pass(samples: Samples) -> None:
    cells = {**PAIRS, **LAID_OVER, **SERVED}
    found, candidates, names = one_pass(cells, samples)
    assert found.failures.refused == {}
    assert len(names) == GROUPS
    scores = {cell: sensitivities(found, candidates, cell, samples) for cell in cells}
    for cell, values in scores.items():
        assert all(math.isfinite(value) and value > 0 for value in values), cell

    def total(cell: str) -> float:
        return sum(scores[cell])

    # What more bits, smaller blocks and fewer quantized tensors must do on such weights.
    assert total("wint8_afp16+default") < total("wint4_afp16+default") / 10
    assert total("wfp8_afp16+default") < total("wnvfp4_afp16+default") / 10
    assert total("wnvfp4_afp16+default") < total("wfp4_afp16+default")
    assert total("wnvfp4_afp16+default") < total("wnvfp4_anvfp4+default")
    assert total("wint4_afp16+default") < total("wint4_aint4+default")
    assert total("wint4_aint4+default") < total("wint4_aint4+a_tensor")
    assert total("wint4_aint4+w_group64") < total("wint4_aint4+w_tensor")


def test_an_input_that_cannot_be_quantized_fails_every_pair_that_reads_it(
    samples: Samples,
) -> None:
    """Two weight formats share the input, and a third pair beside them goes on."""
    good = PAIRS["wint8_aint8+default"]
    unknown = good.input_quantizer.model_copy(update={"num_bits": (7, 7)})
    cells = {
        "a": good.model_copy(update={"input_quantizer": unknown}),
        "b": PAIRS["wfp8_afp8+default"].model_copy(update={"input_quantizer": unknown}),
        "c": good,
    }
    found, candidates, _ = one_pass(cells, samples)
    failed = {candidate for _, candidate in found.failures.refused}
    assert failed == {candidates.of_cell["a"], candidates.of_cell["b"]}
    assert len(found.failures.refused) == 2 * len(found.groups)
    alone, others, _ = one_pass({"c": good}, samples)
    torch.testing.assert_close(
        found.per_sample[:, candidates.of_cell["c"]], alone.per_sample[:, others.of_cell["c"]]
    )


NEW = [
    *formats(
        [
            "wfp4_aint8",
            "wfp4_aint4",
            "wfp8_aint8",
            "wfp8_aint4",
            "wint8_aint4",
            "wint4_afp16",
            "wint4_afp8",
            "wint4_aint8",
            "wint4_aint4",
            "wnvfp4_afp16",
            "wnvfp4_afp8",
            "wnvfp4_anvfp4",
        ],
        ("default",),
    ).items(),
    *formats(["wfp8_afp8"], ("w_channel", "w_group128", "a_token")).items(),
    *formats(["wint8_afp16"], ("w_tensor", "w_group64")).items(),
    *formats(["wint8_aint8"], ("a_token",)).items(),
    *formats(["wint4_aint4"], ("w_channel", "a_tensor")).items(),
    *formats(["wfp4_aint4"], ("a_tensor",)).items(),
]


@pytest.mark.parametrize(("cell", "pair"), NEW, ids=[cell for cell, _ in NEW])
def test_fused_equals_auto_quantize(cell: str, pair: PairConfig, samples: Samples) -> None:
    found, candidates, names = one_pass({cell: pair}, samples)
    ours = dict(zip(names, sensitivities(found, candidates, cell, samples), strict=True))
    theirs = reference.score_cell(
        tiny_model(),
        samples,
        pair,
        vision=VISION,
        sizes=[len(samples)],
        scored=len(samples),
        batch_size=BATCH_SIZE,
    )
    scored = {entry.group.name: entry.sensitivity for entry in theirs.groups if entry.group.covered}
    assert ours == pytest.approx(scored, rel=1e-3)
