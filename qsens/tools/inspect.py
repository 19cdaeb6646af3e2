"""What a checkpoint is made of, found by running a shrunk twin of it, and kept. Needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig

from qsens.checkpoint.components import inspection
from qsens.checkpoint.files import read_config
from qsens.checkpoint.refusals import refusals
from qsens.checkpoint.structure import Structure
from qsens.checkpoint.twin import build_twin, shrink
from qsens.config import ModelConfig
from qsens.documents import dump_json
from qsens.engine.discovery import discover
from qsens.errors import UserError
from qsens.writing import write_text


def inspect(config: ModelConfig, results: Path) -> tuple[Structure, Path]:
    """Find what a checkpoint is made of; plans of it read what is kept here.

    Its weights are not read: ``config.json`` says what is run, and what it leaves open is random.

    Args:
        config: The checkpoint.
        results: Results root.

    Returns:
        The structure, and the file that keeps it.

    Raises:
        UserError: transformers cannot build it, or it cannot be scored: that is kept as well.
    """
    file, where = inspection(config, results), f"model.path = {config.path}"
    read_config(config.path)
    with refusals(
        f"transformers {transformers.__version__} builds no small model of its configuration",
        where=where,
        remedy="Install a newer transformers, or what it asks for; set "
        "model.trust_remote_code=true if the checkpoint brings its own code and you trust it.",
    ):
        twin = build_twin(_shrunk(config), trust_remote_code=config.trust_remote_code)
    try:
        structure = discover(twin)
    except UserError as error:
        write_text(file, dump_json({"refused": error.what}))
        raise
    write_text(file, dump_json(structure.as_dict()))
    return structure, file


def _shrunk(config: ModelConfig) -> Any:
    settings = AutoConfig.from_pretrained(
        config.path, local_files_only=True, trust_remote_code=config.trust_remote_code
    )
    small = type(settings)(**shrink(settings.to_dict()))
    if hasattr(settings, "auto_map"):
        small.auto_map, small._name_or_path = settings.auto_map, str(config.path)
    return small
