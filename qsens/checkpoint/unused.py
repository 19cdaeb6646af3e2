"""Which weights of a checkpoint are not scored: the model lacks them, or no format is for them.

Needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qsens.checkpoint.modules import left_alone


def unused_notices(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Say how many weights of the files a model does not hold, and which is the first.

    What transformers leaves out on purpose is said apart, such as layers that predict further
    tokens; not so the tables and masks among it, which a model makes itself.

    Args:
        model: The model, as ``from_pretrained`` returns it.
        shapes: Shape of every tensor of the files, by name.
    """
    on_purpose = _left_out(model)
    unused, skipped = [], []
    for name in sorted(_unused(model, shapes), key=_by_number):
        if on_purpose is None or not on_purpose.search(name):
            unused.append(name)
        elif name.endswith(".weight") and len(shapes[name]) > 1:
            skipped.append(name)
    notices = []
    if unused:
        notices.append(
            f"{len(unused)} of {len(shapes)} weights in the files are not used, the first is "
            f"{unused[0]}: config.json describes a model without them, and they are not scored"
        )
    if skipped:
        notices.append(
            f"{len(skipped)} matrices in the files are left out by transformers on purpose, such "
            f"as layers that predict further tokens; they are not scored, the first is {skipped[0]}"
        )
    return notices


def left_alone_notices(model: nn.Module) -> list[str]:
    """Say how many linear modules and convolutions no format applies to, and which is the first.

    Args:
        model: The model, its traits noted.
    """
    names = left_alone(model)
    if not names:
        return []
    weights = sum(
        parameter.numel()
        for name in names
        for parameter in model.get_submodule(name).parameters(recurse=False)
    )
    return [
        f"{len(names)} modules with {weights} weights stay as they are, such as routers and "
        f"convolutions of single channels: no format is for them; the first is {names[0]}"
    ]


def _unused(model: Any, names: Iterable[str]) -> list[str]:
    """Return the names in files that stand for nothing in the model, renamed as in loading."""
    held = model.state_dict()
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    prefix = model.base_model_prefix

    def is_held(name: str) -> bool:
        renamed, _ = rename_source_key(name, renamings, converters, prefix, held)
        if renamed not in held and name in held:
            renamed, _ = rename_source_key(name, [], [], prefix, held)
        return renamed in held

    return [name for name in names if not is_held(name)]


def _left_out(model: Any) -> re.Pattern[str] | None:
    """Return a pattern of what transformers leaves out on purpose, as its own report does."""
    patterns = list(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    for ending in (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"):
        if any(re.search(ending, name) for name in buffers):
            patterns.append(ending)
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts layer 2 before layer 10."""
    return [(int(part) if part.isdigit() else -1, part) for part in name.split(".")]
