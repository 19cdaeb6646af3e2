"""Digests name results on disk: the same input has the digest that the first version gave it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from qsens.checkpoint.structure import known_types
from qsens.config import ModelConfig, PairConfig, Roots, SweepConfig, choices, load_sweep
from qsens.config.models import AutoquantConfig, DatasetConfig
from qsens.config.pairs import QuantizerConfig
from qsens.grid import SWEEP_ID, Plan, make_plan
from qsens.identity import (
    PATTERNS,
    CheckpointIdentity,
    PicturesIdentity,
    SamplesIdentity,
    Skipped,
    cell_identity,
    engine_version,
    identify_patterns,
    measured_kl_version,
)

REPO = Path(__file__).resolve().parents[1]
ROOTS = Roots(root=REPO, results=REPO, configs=(REPO / "configs",))
NOW = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
QWEN = (("model.visual.*", "visual.*"), ("lm_head",))
GEMMA = (
    (
        "model.vision_tower.*",
        "model.multi_modal_projector.*",
        "vision_tower.*",
        "multi_modal_projector.*",
    ),
    ("lm_head",),
)
DENSE: tuple[tuple[str, ...], tuple[str, ...]] = ((), ("lm_head",))
OWN = (("tower.*",), ("out",))
# Computed by the version before digests had a module of their own.
GOLDEN = {
    (
        "demo-text",
        "quant_pair=wfp8_afp8",
        QWEN,
    ): (
        "wfp8_afp8-small",
        "aa93bec3137b28773834deff0e6c215e4b4f32a912371222d1cfbdc6431809b5",
        "4dece78582ccae87abf36b2eb10d12aec72a772451a08e1621a4e30a7556c393",
    ),
    (
        "demo-text",
        "quant_pair=wint4_aint4",
        DENSE,
    ): (
        "wint4_aint4-medium",
        "175c01fdbcb8472733fd9b4adadca4eff9fc5526674c9b322c4332573a49b708",
        "7f4ad694b3f6c62c56d9273f7499d3959897941d7db3efa6c97aa2f4cbdcb995",
    ),
    (
        "nightly",
        "quant_pair=wnvfp4_anvfp4 autoquant.method=gradient model.dtype=bfloat16",
        GEMMA,
    ): (
        "wnvfp4_anvfp4-large",
        "61f0ad1d05bde3ea14d1d4512216bad6d8d9800fc3568634c0f0655a347b23e9",
        "8b8baaff29fd35016bdf044dad475cd797633c6473298771767696060629538e",
    ),
    (
        "demo-text",
        "quant_pair=wfp4_afp8 autoquant.method=fisher autoquant.draws=16 autoquant.seed=7",
        QWEN,
    ): (
        "wfp4_afp8-small",
        "0e06237f74106be41b9364121a4b17ddd9180e8736e1bd6a32693f7cca077617",
        "4dece78582ccae87abf36b2eb10d12aec72a772451a08e1621a4e30a7556c393",
    ),
    (
        "demo-text",
        "quant_pair=wint8_aint8 autoquant.method=kl_div dataset.size=small",
        OWN,
    ): (
        "wint8_aint8-small",
        "8c3492ea6d6944294964ecf44029981521bfad036e747974c20ea9a2b5651f2e",
        "00de780c54822acb8416152084674e0b660fa2c245420cdf8fb9d61c42ee3df7",
    ),
    (
        "demo-text",
        "quant_pair=wint8_afp16 autoquant.engine=modelopt dataset.size=small",
        QWEN,
    ): (
        "wint8_afp16-small",
        "2eec70cc3ccad113c29580928ce51f4f06a795ffe71161a2b315b2093ab737e8",
        "4dece78582ccae87abf36b2eb10d12aec72a772451a08e1621a4e30a7556c393",
    ),
    (
        "demo-text",
        "quant_pair=wint8_afp16 quant_granularity=w_group64 dataset.max_calib_samples=10",
        DENSE,
    ): (
        "wint8_afp16-w_group64-small",
        "c7d1508a04b65fb628e5a572f8bfaf58e624ffb49f620bfa0e495a7071155481",
        "da67c20da344306aaa16f778e78d5a9abf23a6b37b7590a07870627a1f1b9877",
    ),
    (
        "fp8-all-layers",
        "quant_pair=wfp8_afp8 dataset=demo_drawings dataset.size=small",
        QWEN,
    ): (
        "wfp8_afp8-all_layers-small",
        "679c9c82a151d84646d201b07491db152d3fae35d4a6efd22a217d9f22a4f575",
        "03936d6199fbcb41b7e2e94fcdd544d2eb2d4ee6b3f221b1c18e6e233737a1aa",
    ),
    (
        "demo-text",
        "quant_pair=wint8_aint4 "
        "quant_granularity=w_tensor "
        "dataset=demo_drawings "
        "dataset.modality=image_text "
        "dataset.size=small",
        QWEN,
    ): (
        "wint8_aint4-w_tensor-image_text-small",
        "de84512650d516ed6eb920cf6902e2872cbf190508155a8df9b3cb6abdb8bc3a",
        "7e9d79e7a1aa3372e4e2d22a9a7de9e7d7f91ff16dbd305d02785ffe848b5b64",
    ),
    (
        "demo-text",
        "quant_pair=wfp8_afp8 runner.force=true dataset.size=small",
        DENSE,
    ): (
        "wfp8_afp8-small",
        "7fad72b5127ed8e3f675db0083ff5d2dbfb8b6d403a059ef3a97be89674f2424",
        "2f44fd494981277f9cdbcf607af2e9f6a1432e72704c1f202e41d27b72ebb5f7",
    ),
}


def plan(
    preset: str, words: str, patterns: tuple[tuple[str, ...], tuple[str, ...]], now: datetime = NOW
) -> Plan:
    config = load_sweep(preset, words.split(), roots=ROOTS).config
    model = config.model.model_copy(
        update={"vision_patterns": patterns[0], "head_patterns": patterns[1]}
    )
    config = config.model_copy(update={"model": model})
    skipped = [Skipped(sample=3, image="a.png", reason="torn")]
    sample = SamplesIdentity(
        path=REPO / "s",
        digest="s" * 64,
        available=512,
        pictures=PicturesIdentity(digest="p" * 64, skipped=skipped),
    )
    return make_plan(
        config,
        ROOTS,
        checkpoint=CheckpointIdentity(
            path=REPO,
            digest="c" * 64,
            tokenizer_digest="t" * 64,
            architecture="A",
            weight_bytes=1,
            processor_digest="d" * 64,
        ),
        samples={one.name: dict.fromkeys(one.size, sample) for one in config.dataset},
        versions={
            "qsens": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.14.1",
            "nvidia-modelopt": "0.47.0",
        },
        now=now,
    )


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_digests(case: tuple[str, str, Any]) -> None:
    cell_id, cell_digest, calibration = GOLDEN[case]
    made = plan(*case)
    cell = made.cell(cell_id)
    assert cell.digest == cell_digest
    assert cell.calibration == calibration


def test_two_plans_of_one_grid_within_a_millisecond_are_two_sweeps() -> None:
    case = next(iter(GOLDEN))
    one, two = plan(*case), plan(*case, now=NOW + timedelta(microseconds=1))
    assert one.sweep_id == f"20260102T030405678000Z-{one.digest[:8]}"
    assert two.sweep_id == f"20260102T030405678001Z-{one.digest[:8]}"
    assert SWEEP_ID.fullmatch(two.sweep_id)


def test_what_a_new_field_means_for_digests_is_decided_here() -> None:
    """A field that is in no list is new: put it into the identity, where it is not its default."""
    assert set(PairConfig.model_fields) == {
        "name", "weight", "activation", "format", "weight_quantizer", "input_quantizer",
        "algorithm", "effective_bits", "experimental", "scheme", "run_dir", "all_layers_scheme",
        "all_layers_run_dir",
    }  # fmt: skip
    assert set(QuantizerConfig.model_fields) == {
        "axis", "block_sizes", "type", "num_bits", "reference", "symmetric",
    }  # fmt: skip
    in_digest = {
        ModelConfig: {
            "name", "short_name", "dtype", "trust_remote_code", "vision_patterns", "head_patterns",
        },
        DatasetConfig: {
            "name", "modality", "sizes", "size", "max_calib_samples", "calib_seq_len",
            "max_pixels", "max_skipped", "prompt", "loss", "turns",
        },
        AutoquantConfig: {
            "method", "draws", "engine", "effective_bits", "score_size", "batch_size", "seed",
        },
    }  # fmt: skip
    outside = {
        # Files enter by their content, and by what their records are found to be.
        ModelConfig: {"path", "language_patterns", "hub"},
        DatasetConfig: {"directory", "files", "images", "format"},
        AutoquantConfig: {"audit", "memory_gb", "device", "devices"},
    }
    for model, inside in in_digest.items():
        assert set(model.model_fields) == inside | outside[model]


def test_a_new_field_enters_no_digest_by_itself() -> None:
    class Newer(PairConfig):
        rotation: str = "none"

    made = plan("demo-text", "quant_pair=wfp8_afp8 dataset.size=small", QWEN)
    (pair,) = made.config.quant_pair
    newer = Newer.model_validate(pair.model_dump())
    config: SweepConfig = made.config.model_copy(update={"quant_pair": (newer,)})
    before, after = (
        cell_identity(made.config, each, "lm_only", "small", made.versions)
        for each in (pair, newer)
    )
    assert before == after == cell_identity(config, newer, "lm_only", "small", made.versions)


@pytest.mark.parametrize(
    ("method", "engine", "dtype", "version"),
    [
        ("gradient", "fused", "float32", 2),
        ("gradient", "fused", "bfloat16", 2),
        ("fisher", "fused", "float32", 2),
        ("fisher", "fused", "bfloat16", 3),
        ("kl_div", "fused", "float32", 2),
        ("kl_div", "fused", "float16", 3),
        ("gradient", "modelopt", "bfloat16", 2),
    ],
)
def test_engine_versions_are_by_method(method: Any, engine: Any, dtype: Any, version: int) -> None:
    assert engine_version(AutoquantConfig(method=method, engine=engine), dtype) == version


def test_measured_divergences_have_a_version_of_their_own() -> None:
    found = [measured_kl_version(dtype) for dtype in ("float32", "bfloat16", "float16")]
    assert found == [1, 2, 2]


def quantized(**weights: Any) -> PairConfig:
    return PairConfig(
        name="p",
        weight="w",
        activation="fp16",
        format="P",
        weight_quantizer=QuantizerConfig(num_bits=8, **weights),
        effective_bits=8,
    )


@pytest.mark.parametrize(
    ("scales", "engine", "changed"),
    [
        ({"axis": 0}, "fused", False),
        ({"axis": None}, "fused", False),
        ({"block_sizes": {"-1": 128}}, "fused", False),
        ({"axis": 1}, "fused", True),
        ({"axis": 1}, "modelopt", False),
        ({"axis": (0, 1)}, "fused", True),
        ({"block_sizes": {"-1": 128, "-2": 128}}, "fused", True),
        ({"block_sizes": {"0": 128}}, "fused", True),
    ],
)
def test_scales_over_rows_are_a_key_of_their_own(scales: Any, engine: Any, changed: bool) -> None:
    config = SweepConfig(quant_pair=(quantized(axis=0),), autoquant={"engine": engine})
    found = cell_identity(config, quantized(**scales), "lm_only", "small", {})
    assert ("scales" in found) is changed


def test_no_shipped_pair_has_scales_over_rows() -> None:
    pairs = ",".join(choices("quant_pair", ROOTS))
    config = load_sweep("demo-text", [f"quant_pair={pairs}"], roots=ROOTS).config
    assert len(config.quant_pair) == 22
    for pair in config.quant_pair:
        assert "scales" not in cell_identity(config, pair, "lm_only", "small", {})


WEIGHTS = [
    "model.layers.0.mlp.down_proj.weight",
    "visual.blocks.0.attn.qkv.weight",
    "bridge.proj.weight",
    "lm_head.weight",
]


def patterns(now: tuple[str, ...], given: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the tower's patterns as they enter digests, the table of families saying ``now``."""
    resolved = ModelConfig(vision_patterns=given or now, head_patterns=("lm_head",))
    return identify_patterns(
        ModelConfig(vision_patterns=given), resolved, "qwen3_vl", WEIGHTS
    ).vision


def test_another_table_that_covers_the_same_changes_no_digest() -> None:
    first = ("model.visual.*", "visual.*")
    assert patterns(first) == first
    assert patterns((*first, "model.vision.*")) == first
    assert patterns(("vis*",)) == first
    # One that covers something else does.
    assert patterns((*first, "bridge.*")) == (*first, "bridge.*")
    # And what a model file says enters as it is.
    assert patterns(first, given=("vis*",)) == ("vis*",)


def test_the_first_types_have_their_first_patterns_written_down() -> None:
    assert set(PATTERNS) <= set(known_types())
    assert (PATTERNS["qwen3_vl"], PATTERNS["llama"], PATTERNS["gemma3"]) == (QWEN, DENSE, GEMMA)


def test_a_copy_of_a_plan_resolves_its_own_cells() -> None:
    made = plan("single", "", QWEN)
    before = made.cells[0]
    autoquant = made.config.autoquant.model_copy(update={"score_size": 1})
    copied = made.model_copy(
        update={"config": made.config.model_copy(update={"autoquant": autoquant})}
    )
    assert (before.scored > 1, copied.cells[0].scored) == (True, 1)
    assert made.cells[0] is before


def test_resolved_cells_are_not_in_the_plan_file() -> None:
    made = plan("single", "", QWEN)
    keys = {field.alias or name for name, field in Plan.model_fields.items()}
    assert made.model_dump(mode="json").keys() == keys
    assert made.cells
    assert made.model_dump(mode="json").keys() == keys
