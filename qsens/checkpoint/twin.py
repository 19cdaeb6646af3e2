"""A twin of a model: the same code and layer kinds, shrunk until it runs in milliseconds on a CPU.

Needs torch. Its weights are random. What a model is made of shows when it runs, and meta tensors
cannot choose experts; a twin can. Every size of a configuration is replaced by a rule on its key
(``twin.yaml``), and of the layers so many are kept that every kind of them occurs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qsens.checkpoint.loading import auto_class

_TOKEN = re.compile(r".*(token_ids?|token_index|_index|_id|token_id_list|_ids)\Z")
# A neutral default would hide what becomes of the logits.
_FACTORS = ("logits_scaling", "logit_scale", "lm_head_multiplier")
_CAP = "final_logit_softcapping"
# Weights so large that what a layer gives depends on what it reads.
_SPREADS, _SPREAD = ("initializer_range", "init_std"), 0.1
_DROPOUT = re.compile(r"dropout|layerdrop|pdrop|_drop\Z")
_SPARE_TOKENS = 112
_INITIAL = 0.02


def default_settings(model_type: str) -> Any:
    """Return the shrunk default configuration of a type that transformers knows.

    Args:
        model_type: As ``config.json`` names it.
    """
    more = _rules()["types"].get(model_type, {})
    kind = CONFIG_MAPPING[model_type]
    shrunk = shrink(kind(**more.get("base", {})).to_dict())
    for key in more.get("unset", ()):
        shrunk.pop(key, None)
    return kind(**_merged(shrunk, more.get("set", {})))


def build_twin(settings: Any, *, trust_remote_code: bool = False) -> nn.Module:
    """Return a model of a shrunk configuration, in float32, its weights drawn with a fixed seed.

    Args:
        settings: The configuration; see :func:`shrink`.
        trust_remote_code: Whether the checkpoint's own code runs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_class(settings).from_config(
            settings, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        for parameter in model.parameters():  # some are left as memory was
            if not torch.isfinite(parameter).all() or parameter.abs().max() > 1e4:
                nn.init.normal_(parameter, std=_INITIAL)
    module: nn.Module = model.eval().requires_grad_(False)
    return module


def shrink(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's dictionary with every size replaced, those within it too.

    Args:
        settings: As ``to_dict()`` gives it, or ``config.json`` holds it.
    """
    return _shrunk(settings, {}, top=True)


def _shrunk(given: Mapping[str, Any], tokens: dict[int, int], *, top: bool) -> dict[str, Any]:
    rules = _rules()
    count, kept = _layers(given)
    heads = next(
        (
            given[key]
            for key in ("num_attention_heads", "n_head", "n_heads", "num_heads")
            if isinstance(given.get(key), int)
        ),
        None,
    )
    shrunk: dict[str, Any] = {}
    for key, value in given.items():
        if key in rules["dropped"]:
            continue
        if not isinstance(key, str) or isinstance(value, str):
            shrunk[key] = value
        elif isinstance(value, Mapping):
            shrunk[key] = _shrunk(value, tokens, top=False)
        elif isinstance(value, list | tuple) and count and len(value) == count > 2:
            shrunk[key] = [value[index] for index in kept]
        elif _TOKEN.match(key) and not isinstance(value, bool):
            many = isinstance(value, list | tuple)
            renamed = [_token(each, tokens) for each in (value if many else [value])]
            shrunk[key] = renamed if many else renamed[0]
        else:
            shrunk[key] = _size(key, value, given, heads=heads, layers=len(kept) if count else 0)
    if top and "is_decoder" in shrunk and not shrunk.get("is_encoder_decoder"):
        shrunk["is_decoder"] = True  # an encoder as a causal language model
    _adjust(shrunk, given, top=top)
    return shrunk


def _size(key: str, value: Any, given: Mapping[str, Any], *, heads: Any, layers: int) -> Any:
    """Return what a key gets in place of its value."""
    rules = _rules()
    if key in _SPREADS:
        return _SPREAD
    if _DROPOUT.search(key) and isinstance(value, float):
        return 0.0
    if key in _FACTORS and value in (1, 1.0):
        return 0.5
    if key == _CAP and value is None:
        return 30.0
    if isinstance(value, list | tuple):
        fitting = _matching(key, "sizes")
        return fitting if isinstance(fitting, list) else value
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    patch = given.get("patch_size")
    if key in rules["layer_counts"] and layers:
        return layers
    if key.startswith("vocab_size") or key.endswith(("vocab_size", "vocab")):
        return min(value, rules["vocabulary"])
    if re.fullmatch(rules["key_value_heads"], key):
        return 4 if value == heads else min(value, 2)
    if key == "image_size":
        return 4 * patch if isinstance(patch, int) and patch > 0 else 64
    most = _matching(key, "at_most")
    if most is not None:
        return min(value, most)
    fitting = _matching(key, "sizes")
    return value if fitting is None else fitting


def _layers(given: Mapping[str, Any]) -> tuple[int | None, list[int]]:
    """Return the layers that a configuration has, and the fewest in which all kinds occur."""
    rules = _rules()
    counts = (given.get(key) for key in rules["layer_counts"])
    count = next((each for each in counts if type(each) is int), None)
    if not count:
        return None, []
    if count <= 2:
        return count, list(range(count))
    lists = [
        value
        for key, value in given.items()
        if isinstance(value, list | tuple) and len(value) == count and key not in rules["dropped"]
    ]
    seen: set[str] = set()
    kept = []
    for index in range(count):
        kind = json.dumps([each[index] for each in lists], default=str)
        if kind not in seen:
            seen.add(kind)
            kept.append(index)
    kept += [count - 1] * (2 - len(kept))
    return count, sorted(kept)


def _token(value: Any, tokens: dict[int, int]) -> Any:
    """Return a token's id in a small vocabulary; those beyond it are counted from its end."""
    size: int = _rules()["vocabulary"]
    if not isinstance(value, int) or value < size - _SPARE_TOKENS:
        return value
    return tokens.setdefault(value, size - 1 - len(tokens))


def _adjust(shrunk: dict[str, Any], given: Mapping[str, Any], *, top: bool) -> None:
    """Set what follows from other sizes."""
    if "head_dim" in shrunk and shrunk["head_dim"] is None:
        shrunk["head_dim"] = 16
    rope_width = shrunk.get("qk_rope_head_dim")
    if rope_width and given.get("head_dim") == given.get("qk_rope_head_dim"):
        shrunk["head_dim"] = rope_width
    rope = shrunk.get("rope_parameters") or {}
    inner = [each for each in rope.values() if isinstance(each, dict)]
    if not top and shrunk.get("rope_parameters") is not None and not inner:
        rope.setdefault("mrope_section", [1])  # some classes take it for given
    part = rope.get("partial_rotary_factor") or shrunk.get("partial_rotary_factor") or 1
    half = (rope_width or int((shrunk.get("head_dim") or 16) * part)) // 2
    for each in [rope, *inner]:
        if each.get("mrope_section"):
            each["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
        if each.get("xdrope_section"):
            each["xdrope_section"] = [half - 3 * (half // 4), *[half // 4] * 3]
        for key in ("long_factor", "short_factor"):
            if each.get(key):
                each[key] = [float(at + 1) for at in range(half)]
    if shrunk.get("num_kv_shared_layers"):
        shrunk["num_kv_shared_layers"] = 1


def _matching(key: str, table: str) -> Any:
    return next((size for size, pattern in _rules()[table] if re.fullmatch(pattern, key)), None)


def _merged(given: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in more.items():
        inside = given.get(key)
        both = isinstance(value, Mapping) and isinstance(inside, dict)
        given[key] = _merged(inside, value) if both else value  # type: ignore[arg-type]
    return given


@cache
def _rules() -> Mapping[str, Any]:
    path = Path(__file__).with_name("twin.yaml")
    rules: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return rules


def text_inputs(model: Any, *, samples: int = 2, tokens: int = 12, seed: int = 0) -> torch.Tensor:
    """Return token ids that a twin reads as text, ``(samples, tokens)``, int64."""
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or 300
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(20, min(300, vocabulary), (samples, tokens), generator=generator)
