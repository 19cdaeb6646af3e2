"""Why two results differ: what went into each, compared by digest, version and setting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qsens.lenient import UNKNOWN
from qsens.schema.manifest import Manifest
from qsens.schema.summary import Cause, Difference

CAUSES: tuple[Cause, ...] = ("checkpoint", "captions", "versions", "configuration")


def inputs(manifest: Manifest) -> dict[tuple[Cause, str], str]:
    """Return all that a manifest records of what went into it, by cause and name.

    A manifest of the older layout records less; its checkpoint has no digest.
    """
    scheme, model = manifest.scheme, manifest.model
    values: dict[tuple[Cause, str], Any] = {
        ("checkpoint", "digest"): model.digest,
        ("checkpoint", "path"): None if model.digest else model.id,
        ("checkpoint", "dtype"): model.dtype,
        ("configuration", "method"): scheme.auto_quantize_method,
        ("configuration", "score size"): scheme.auto_quantize_score_size,
        ("configuration", "target of effective bits"): scheme.auto_quantize_bits,
        ("configuration", "coverage"): scheme.coverage_mode,
        ("configuration", "formats"): ", ".join(scheme.quant_formats),
        ("configuration", "engine"): manifest.engine,
    }
    if (dataset := manifest.dataset) is not None:
        values |= {
            ("captions", "digest"): dataset.digest,
            ("captions", "samples used"): dataset.samples_used,
            ("captions", "samples scored"): dataset.samples_scored,
            ("captions", "longest sample, tokens"): dataset.calib_seq_len,
            ("captions", "modality"): dataset.modality,
            ("captions", "digest of the pictures"): dataset.pictures_digest,
            ("captions", "pixels of a picture at most"): dataset.max_pixels,
            ("captions", "prompt"): dataset.prompt,
        }
    if (quantization := manifest.quantization) is not None:
        values |= {
            ("configuration", "pair"): quantization.pair,
            ("configuration", "granularity"): quantization.granularity,
            ("configuration", "effective bits of the format"): quantization.effective_bits,
            ("configuration", "quantizers"): json.dumps(
                quantization.modelopt_config, sort_keys=True
            ),
        }
    if (versions := manifest.versions) is not None:
        values |= {
            ("versions", "qsens"): versions.qsens,
            ("versions", "torch"): versions.torch,
            ("versions", "transformers"): versions.transformers,
            ("versions", "modelopt"): versions.modelopt,
            ("versions", "device"): versions.device,
        }
    return {key: str(value) for key, value in values.items() if value not in (None, "", UNKNOWN)}


def settings(config: Mapping[str, Any]) -> dict[tuple[Cause, str], str]:
    """Return the settings of a plan's configuration that change numbers, by dotted key.

    Args:
        config: A ``SweepConfig`` as JSON data.
    """
    kept = ("batch_size", "score_size", "seed", "draws", "effective_bits", "method", "engine")
    autoquant = config.get("autoquant", {})
    values = {f"autoquant.{name}": autoquant.get(name) for name in kept}
    given = config.get("dataset", {})
    for one in given if isinstance(given, list) else [given]:
        of = f"dataset.{one['name']}" if isinstance(given, list) else "dataset"
        values |= {f"{of}.sizes.{size}": count for size, count in one["sizes"].items()}
    return {
        ("configuration", name): str(value) for name, value in values.items() if value is not None
    }


def differences(
    before: Mapping[tuple[Cause, str], str], after: Mapping[tuple[Cause, str], str]
) -> tuple[Difference, ...]:
    """Return what differs, by cause, in the order of the first that names it."""
    keys = [*before, *(key for key in after if key not in before)]
    differing = [
        Difference(cause=key[0], what=key[1], before=before.get(key), after=after.get(key))
        for key in keys
        if before.get(key) != after.get(key)
    ]
    return tuple(sorted(differing, key=lambda entry: CAUSES.index(entry.cause)))
