"""What each type of transformers is made of: what the package ships as ``structures.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from qsens.checkpoint import structure
from qsens.checkpoint.twin import build_twin, default_settings
from qsens.engine.discovery import discover
from qsens.errors import UserError

TYPES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
FILE = Path(structure.__file__).with_name("structures.json")
_UNBUILT = "transformers builds no model of its default configuration here"


def find(model_type: str) -> dict[str, Any]:
    """Return a type's structure, or why it cannot be scored, as the file holds it."""
    try:
        twin = build_twin(default_settings(model_type))
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {"refused": f"{_UNBUILT}: {first}"}
    try:
        return discover(twin).as_dict()
    except UserError as error:
        return {"refused": error.what}


def write(found: dict[str, dict[str, Any]]) -> None:
    """Write the file: a type a line, so that changes of a release show in a diff."""
    lines = [f'    "{name}": {json.dumps(found[name])}' for name in sorted(found)]
    text = f'{{\n  "transformers": "{transformers.__version__}",\n  "types": {{\n'
    FILE.write_text(text + ",\n".join(lines) + "\n  }\n}\n", encoding="utf-8")
