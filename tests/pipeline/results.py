"""Results written by hand: what publishing, drift and comparisons read."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from qsens.cells import Cell
from qsens.config import DatasetConfig, ModelConfig, PairConfig, Roots, SweepConfig
from qsens.config.models import AutoquantConfig
from qsens.documents import dump_json
from qsens.grid import Plan, make_plan
from qsens.identity import CheckpointIdentity, SamplesIdentity
from qsens.schema.manifest import Manifest
from qsens.store import Store

LAYERS = [f"model.layers.{depth}.mlp.down_proj" for depth in range(12)]


def plan(
    root: Path,
    *,
    day: int,
    checkpoint: str = "a",
    captions: str = "c",
    dtype: str = "bfloat16",
    **auto: Any,
) -> Plan:
    """Return a plan of one pair at two sizes, made on that day of a month."""
    config = SweepConfig(
        preset="nightly",
        model=ModelConfig(name="tiny", short_name="tiny", dtype=dtype),
        dataset=(DatasetConfig(size=("small", "medium")),),
        quant_pair=(
            PairConfig(
                name="wint8_afp16",
                weight="int8",
                activation="fp16",
                format="INT8",
                weight_quantizer={"num_bits": 8, "axis": 0},
                effective_bits=8.0,
            ),
        ),
        autoquant=AutoquantConfig(**auto),
        output_layout="publish",
    )
    sample = SamplesIdentity(path=root / "captions.txt", digest=captions * 64, available=512)
    return make_plan(
        config,
        Roots(**{field.name: root for field in dataclasses.fields(Roots)}),
        checkpoint=CheckpointIdentity(
            path=root / "Tiny",
            digest=checkpoint * 64,
            tokenizer_digest="0" * 64,
            architecture="Tiny",
            weight_bytes=1,
        ),
        samples={config.dataset[0].name: {"small": sample, "medium": sample}},
        versions={"qsens": "0.1.0", "torch": "2.10.0", "transformers": "5.10.0"},
        now=datetime(2030, 1, day, tzinfo=UTC),
    )


def result(
    made: Plan,
    cell: Cell,
    seed: int,
    factors: dict[str, float] | None = None,
    *,
    verified: bool = True,
) -> None:
    """Write the result of a cell: skewed scores of every sample, a layer's times its factor.

    One that is not verified is as the version before checksums wrote it.
    """
    store = Store(made)
    count = cell.scored
    rng = np.random.default_rng(seed)
    hardness = rng.lognormal(sigma=0.6, size=count)
    per_sample = np.stack(
        [
            (factors or {}).get(layer, 1.0)
            * 10.0 ** (-0.3 * depth)
            * hardness
            * rng.lognormal(sigma=0.6, size=count)
            for depth, layer in enumerate(LAYERS)
        ]
    )
    labels = np.full(count, 10)
    found = manifest(made, cell, per_sample)

    state = save(
        {"per_sample": per_sample, "label_tokens": labels},
        metadata={"cell": cell.cell, "groups": "\n".join(LAYERS)},
    )
    if verified:
        store.write_result(cell, found.model_copy(update={"schema_version": 2}), state)
        return
    store.result_dir(cell).mkdir(parents=True, exist_ok=True)
    store.state(cell).write_bytes(state)
    newer = {"checksum", "state_digest"}
    text = dump_json(found.model_dump(mode="json", exclude=newer))
    store.manifest(cell).write_text(text, encoding="utf-8")


def manifest(made: Plan, cell: Cell, per_sample: Any) -> Manifest:
    """Return the manifest that these scores belong to."""
    count = per_sample.shape[1]
    rows = {
        f"{layer}.quant_recipe": {
            "formats": ["INT8(effective-bits: 8.0)", "NONE(effective-bits: 16.0)"],
            "scores": [float(scores.sum()) / 100, 0.0],
            "costs": [1.0, 2.0],
            "importance": float(scores.sum()) / 100,
            "rank": 1,
            "members": [layer],
            "kind": "down",
            "depth": depth,
            "status": "scored",
            "num_bits": 8.0,
            "sensitivity": float(scores.sum()) / 100,
            "sensitivity_per_token": float(scores.sum()) / (10 * count),
            "size_cost": 1.0,
        }
        for depth, (layer, scores) in enumerate(zip(LAYERS, per_sample, strict=True))
    }
    data = {
        "schema_version": 1,
        "cell": cell.cell,
        "cell_digest": cell.digest,
        "engine": "fused",
        "created": made.created,
        "scheme": {
            "name": cell.scheme,
            "auto_quantize_bits": 8.0,
            "auto_quantize_method": made.config.autoquant.method,
            "auto_quantize_score_size": made.config.autoquant.score_size,
            "coverage_mode": "lm_only",
            "coverage_fraction": 1.0,
            "quant_formats": ["INT8"],
        },
        "model": {"id": "Tiny", "name": "tiny", "digest": made.checkpoint.digest},
        "dataset": {
            "name": "captions",
            "path": "captions.txt",
            "digest": made.samples[made.config.dataset[0].name][cell.size].digest,
            "modality": "text",
            "size": cell.size,
            "samples_asked": cell.used,
            "samples_used": cell.used,
            "samples_scored": count,
            "tokens": 11 * count,
            "label_tokens": 10 * count,
            "padding_share": 0.0,
            "truncated": 0,
            "calib_seq_len": 512,
        },
        "versions": {
            "qsens": "0.1.0",
            "torch": made.versions["torch"],
            "transformers": "5.10.0",
            "modelopt": None,
            "device": "cpu",
        },
        "num_quantized_layers": len(rows),
        "layers": {name: {"quantized": True, "module_type": "QuantLinear"} for name in LAYERS},
        "autoquant_state": {
            "constraints": {"effective_bits": 8.0},
            "score": 1.0,
            "is_satisfied": True,
        },
        "layer_sensitivity": rows,
        "sensitivity_ranking": [],
    }
    return Manifest.model_validate(data)


def whole(made: Plan, seed: int, factors: dict[str, float] | None = None) -> Plan:
    """Write the results of all cells of a plan, the same samples at the head of every size."""
    for cell in made.cells:
        result(made, cell, seed + cell.scored, factors)
    return made
