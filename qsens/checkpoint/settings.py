"""Whether transformers can build a checkpoint's model, told by ``config.json``, without torch.

Of the families in the table of :mod:`qsens.checkpoint.structure` alone: what other classes take,
only they know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qsens.checkpoint.files import read_config
from qsens.checkpoint.quantized import shapes
from qsens.config import ModelConfig
from qsens.errors import UserError
from qsens.reading import shown

# Those of transformers, and the name that older files of Qwen-VL give theirs.
ROPE_TYPES = {
    "default",
    "dynamic",
    "linear",
    "llama3",
    "longrope",
    "mrope",
    "proportional",
    "yarn",
}
# Model types whose heads share out the hidden size, whatever head_dim says.
HEADS_DIVIDE = {"gemma3_text", "llama"}
_ROPE = ("rope_parameters", "rope_scaling")
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# A tensor a layer is the least that files hold: no more than these are built without a look.
_LAYERS = 1000
# Types whose keys are all of these.
_CHECKED = (
    "gemma3",
    "gemma3_text",
    "llama",
    "qwen2_5_vl",
    "qwen3",
    "qwen3_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
)


def check_settings(config: ModelConfig) -> None:
    """Refuse a checkpoint whose ``config.json`` transformers cannot build a model of.

    Args:
        config: The checkpoint.

    Raises:
        UserError: It cannot; the message names the key.
    """
    described = read_config(config.path)
    kind = str(described.get("model_type"))
    if kind not in _CHECKED or config.trust_remote_code:
        return
    for section, values, model_type in _sections(described, kind):
        fault = _fault(values, model_type)
        if fault is None and values.get("num_hidden_layers", 0) > _LAYERS:
            held = len(shapes(config.path))
            if values["num_hidden_layers"] > held:
                fault = f"num_hidden_layers is more than the {held} tensors of the files"
        if fault is not None:
            raise UserError(
                f"transformers cannot build its model: {section}{fault}",
                where=str(config.path / "config.json"),
                remedy="Get the config.json of the checkpoint again, or one that transformers has "
                "converted.",
            )


def _sections(
    described: Mapping[str, Any], kind: str
) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Yield what describes a language model: name as a prefix, settings, model type."""
    yield "", described, kind
    text = described.get("text_config")
    if isinstance(text, dict):
        yield "text_config.", text, str(text.get("model_type", f"{kind}_text"))


def _fault(values: Mapping[str, Any], kind: str) -> str | None:
    """Return in words what is wrong with the settings of a language model."""
    for key in _COUNTS:
        value = values.get(key, 1)
        if type(value) is not int or not 0 < value < 1 << 31:
            return f"{key} is {shown(value)}"
    heads, size = values.get("num_attention_heads", 1), values.get("hidden_size", 0)
    if kind in HEADS_DIVIDE and size % heads:
        return f"hidden_size {size} is no multiple of num_attention_heads {heads}"
    for key in _ROPE:
        for rope in _ropes(values.get(key)):
            rope_type = rope.get("rope_type", rope.get("type", "default"))
            if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
                known = ", ".join(sorted(ROPE_TYPES))
                return f"{key} is of type {shown(rope_type)}, and known are {known}"
    return None


def _ropes(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield descriptions of rotary embeddings: one, or one a type of layer."""
    if isinstance(value, dict):
        inner = [one for one in value.values() if isinstance(one, dict)]
        yield from inner or [value]
