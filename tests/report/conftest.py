from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qsens.analysis.audit import judge
from qsens.analysis.samples import SampleScores
from qsens.config import DatasetConfig, ModelConfig, PairConfig, Roots, SweepConfig
from qsens.grid import Plan, make_plan
from qsens.identity import CheckpointIdentity, SamplesIdentity
from qsens.report import CellReport, build_cell
from qsens.schema.audit import Audit, Point
from qsens.schema.manifest import Manifest

QUANTIZER = {"num_bits": 8, "axis": 0}


def group(sensitivity: float | None, status: str = "scored", **more: Any) -> dict[str, Any]:
    """Return one row of a manifest: 1 MiB in 8 bits."""
    return {
        "formats": ["INT8(effective-bits: 8.0)", "NONE(effective-bits: 16.0)"],
        "scores": [sensitivity, 0.0],
        "costs": [524288.0, 1048576.0],
        "importance": sensitivity,
        "rank": 1,
        "members": None,
        "kind": "down",
        "depth": 0,
        "status": status,
        "num_bits": 8.0,
        "sensitivity": sensitivity,
        "sensitivity_per_token": None if sensitivity is None else sensitivity / 4,
        "size_cost": 524288.0,
        **more,
    }


def reports(
    manifests: Mapping[str, Manifest], samples: Mapping[str, SampleScores] | None = None
) -> dict[str, CellReport]:
    """Return what there is to say of each cell that has a result."""
    return {
        cell: build_cell(manifest, (samples or {}).get(cell))
        for cell, manifest in manifests.items()
    }


def manifest(rows: dict[str, dict[str, Any]], **more: Any) -> Manifest:
    """Return a manifest of this version with these rows, by name without the suffix."""
    data: dict[str, Any] = {
        "schema_version": 1,
        "cell": "wint8_afp16-small",
        "cell_digest": "ab" * 32,
        "engine": "modelopt",
        "created": "2030-01-02T03:04:05.678+00:00",
        "scheme": {
            "name": "wint8_afp16_autoquant_lm",
            "auto_quantize_bits": 8.5,
            "auto_quantize_method": "gradient",
            "auto_quantize_score_size": 128,
            "coverage_mode": "lm_only",
            "coverage_fraction": 1.0,
            "quant_formats": ["INT8"],
        },
        "model": {"id": "/somewhere/Tiny", "name": "tiny", "digest": "cd" * 32},
        "dataset": {
            "name": "captions",
            "path": "/somewhere/captions.txt",
            "digest": "ef" * 32,
            "modality": "text",
            "size": "small",
            "samples_asked": 16,
            "samples_used": 15,
            "samples_scored": 14,
            "tokens": 300,
            "label_tokens": 280,
            "padding_share": 0.125,
            "truncated": 0,
            "calib_seq_len": 512,
        },
        "quantization": {
            "pair": "wint8_afp16",
            "granularity": "default",
            "experimental": False,
            "effective_bits": 8.0,
            "modelopt_config": {},
        },
        "versions": {
            "qsens": "0.1.0",
            "torch": "2.10.0",
            "transformers": "5.10.0",
            "modelopt": "0.47.0",
            "device": "cpu",
        },
        "num_quantized_layers": len(rows),
        "layers": {name: {"quantized": True, "module_type": "QuantLinear"} for name in rows},
        "autoquant_state": {
            "constraints": {"effective_bits": 8.25},
            "score": 3.0,
            "is_satisfied": True,
        },
        "layer_sensitivity": {f"{name}.quant_recipe": row for name, row in rows.items()},
        "sensitivity_ranking": [],
        **more,
    }
    return Manifest.model_validate(data)


def plan(
    pairs: tuple[str, ...] = ("wint8_afp16", "wfp8_afp8"), lanes: int = 1, **more: Any
) -> Plan:
    """Return a plan of these pairs at the sizes small and medium."""
    dataset = more.pop("dataset", DatasetConfig(size=("small", "medium")))
    config = SweepConfig(
        preset="nightly",
        model=ModelConfig(name="tiny", short_name="tiny"),
        dataset=dataset,
        quant_pair=tuple(
            PairConfig(
                name=name,
                weight=name.split("_")[0][1:],
                activation=name.split("_")[1][1:],
                format="INT8",
                weight_quantizer=QUANTIZER,
                effective_bits=8.0,
            )
            for name in pairs
        ),
        **more,
    )
    sample = SamplesIdentity(path=Path("captions.txt"), digest="ef" * 32, available=512)
    return make_plan(
        config,
        Roots(**{field.name: Path("root") for field in dataclasses.fields(Roots)}),
        checkpoint=CheckpointIdentity(
            path=Path("Tiny"),
            digest="cd" * 32,
            tokenizer_digest="01" * 32,
            architecture="TinyForCausalLM",
            weight_bytes=1,
        ),
        samples={dataset.name: dict.fromkeys(dataset.size, sample)},
        versions={"qsens": "0.1.0"},
        lanes=lanes,
        now=datetime(2030, 1, 2, 3, 4, 5, 678000, tzinfo=UTC),
    )


class Page(HTMLParser):
    """What a browser would see of a page: its tags, its text, its links."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.table_rows: list[int] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "table":
            self.table_rows.append(0)
        if tag == "tr":
            self.table_rows[-1] += 1
        self.attributes |= {name for name, _ in attrs}
        if tag == "script":
            self.scripts.append(dict(attrs).get("src") or "")
            return
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def foreign_scripts(self) -> list[str]:
        """Return what is neither the page's data nor a script of ours beside it."""
        allowed = re.compile(r"((\.\./)*assets/)report-[0-9a-f]{8}\.js")
        return [
            script
            for script in self.scripts
            if not allowed.fullmatch(script) and not isinstance(json.loads(script), dict)
        ]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["script"] or self.cdata_elem is None:
            self.text += data
        else:
            self.scripts[-1] += data


def audit(method: str = "fisher") -> Audit:
    """Return an audit of six groups whose last two are in the wrong order, one of them at 0."""
    numbers = [(8e-3, 1e-2), (4e-3, 4e-3), (2e-3, 2e-3), (1e-3, 1e-3), (4e-4, 0.0), (2e-4, 5e-4)]
    points = tuple(
        Point(layer=f"layers.{at}.<b>", kind="down", estimate=a, standard_error=1e-4, truth=b)
        for at, (a, b) in enumerate(numbers)
    )
    return Audit(
        cell="wint8_afp16-small",
        pair="wint8_afp16",
        granularity="default",
        size="small",
        cell_digest="ab" * 32,
        method=method,
        mode="sample",
        samples=16,
        points=points,
        judgement=judge(points, in_nats=method == "fisher"),
        seconds=1.0,
        device="cpu",
    )


class Make:
    """The builders, as one fixture."""

    audit = staticmethod(audit)
    group = staticmethod(group)
    manifest = staticmethod(manifest)
    plan = staticmethod(plan)
    page = Page


@pytest.fixture
def make() -> type[Make]:
    return Make
