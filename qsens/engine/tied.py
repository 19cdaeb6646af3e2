"""Whether a checkpoint's head is its embedding, told by its files, without torch.

As transformers loads it: where ``config.json`` ties the two and the files hold both, they are one
weight only if they are equal; whichever of them is missing is the other.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qsens.engine.headers import Tensor

# What transformers takes where config.json is silent, whatever its text_config says.
TIED_BY_DEFAULT = {
    "gemma3": True,
    "gemma3_text": True,
    "llama": False,
    "qwen2_5_vl": False,
    "qwen3": False,
    "qwen3_moe": False,
    "qwen3_vl": False,
    "qwen3_vl_moe": False,
}
_KEY = "tie_word_embeddings"
_HEADS = ("lm_head", "output_layer")


def has_tied_head(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    heads: Sequence[str],
    equal: Callable[[Tensor, Tensor], bool],
) -> bool:
    """Return whether the head is loaded as the embedding's weight.

    Args:
        config: The checkpoint's ``config.json``.
        tensors: Its tensors, by name.
        heads: Patterns (fnmatch) of the head's module name.
        equal: Says whether two tensors hold the same bytes.
    """
    said = is_said_to_be_tied(config)
    name = _head(tensors, (*heads, *_HEADS))
    if said is False or name is None:
        return said is not False  # what lacks a head without a tie is not loaded
    head = tensors[name]
    alike = [
        tensor for other, tensor in tensors.items() if other != name and tensor.shape == head.shape
    ]
    if not alike:
        return said is True
    return any(tensor.dtype == head.dtype and equal(tensor, head) for tensor in alike)


def is_said_to_be_tied(config: Mapping[str, Any]) -> bool | None:
    """Return whether ``config.json`` ties the head to the embedding.

    None where it is silent, and of a model type whose default is not known here.
    """
    if _KEY in config:
        return bool(config[_KEY])
    text = config.get("text_config")
    inner = text.get(_KEY) if isinstance(text, dict) else None
    return TIED_BY_DEFAULT.get(str(config.get("model_type")), inner)


def _head(tensors: Mapping[str, Tensor], patterns: Sequence[str]) -> str | None:
    """Return the name of the head's weight; in files, it may lie deeper than in the model."""
    for pattern in patterns:
        for wanted in (f"{pattern}.weight", f"*.{pattern}.weight"):
            found = next((name for name in tensors if fnmatch.fnmatchcase(name, wanted)), None)
            if found is not None:
                return found
    return None
