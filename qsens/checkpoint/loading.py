"""Load a checkpoint: model and tokenizer, from a local directory, safetensors only. Needs torch."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from qsens.checkpoint.components import find_head, find_structure, with_patterns
from qsens.checkpoint.dequantize import lazy_tensors, without_quantization
from qsens.checkpoint.experts import is_experts
from qsens.checkpoint.files import Weights, find_weights, read_config
from qsens.checkpoint.modules import quantizable
from qsens.checkpoint.quantized import Quantization, read_quantization
from qsens.checkpoint.refusals import refusals
from qsens.checkpoint.routed import RoutedExperts, route_experts
from qsens.checkpoint.structure import Traits, head_of, remember_traits
from qsens.checkpoint.templates import read_chat_template
from qsens.config import ModelConfig
from qsens.errors import UserError
from qsens.reading import shown

_ATTENTION = "_attn_implementation"
_INSTALL = (
    "Install a newer transformers, or what it asks for; set model.trust_remote_code=true if the "
    "checkpoint brings its own code and you trust it."
)
log = logging.getLogger(__name__)


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is the first GPU where there is one, else the CPU.

    Raises:
        UserError: A GPU is asked for that is not there.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (
        not available or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise UserError(
            f"there is no device '{name}'",
            where="autoquant.device",
            remedy=f"{torch.cuda.device_count()} CUDA devices are visible; use auto or cpu.",
        )
    return device


def disable_cudnn_attention() -> None:
    """Let no model of this process attend through cuDNN; called before one is made.

    It builds a plan for each shape of a batch, for seconds, and its gradient is NaN where a row is
    masked whole.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def device_name(device: torch.device) -> str:
    """Return a device in words: ``cpu``, or the card's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def load_model(
    config: ModelConfig, device: torch.device, results: Path | None = None, *, move: bool = True
) -> nn.Module:
    """Load the model in evaluation mode, in the data type of its model file.

    Args:
        config: The checkpoint.
        device: Where it is to run.
        results: Results root, see :func:`qsens.checkpoint.components.resolve_components`.
        move: Whether it is moved there; otherwise it stays in host memory.

    Raises:
        UserError: The files are not whole or quantized already in a way that cannot be read, this
            transformers cannot load the architecture, or the patterns of its parts leave a module
            out.
    """
    disable_cudnn_attention()
    weights = find_weights(config.path)
    quantization = read_quantization(config.path, weights.tensors)
    settings = _settings(config)
    _choose_attention(settings)
    # What was hashed is what is read, whatever else lies there.
    settings.transformers_weights = weights.entry
    with refusals(
        f"transformers {transformers.__version__} cannot load it",
        where=f"model.path = {config.path}",
        remedy=_INSTALL,
    ):
        model, report = _from_pretrained(config, settings, weights, quantization)
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, held, wanted = mismatched[0]
        raise UserError(
            f"{len(mismatched)} weights have another shape than config.json says, the first is "
            f"{name}: {tuple(held)} where {tuple(wanted)} is said",
            where=f"model.path = {config.path}",
            remedy="Get the weights and the config.json of one and the same checkpoint.",
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{len(missing)} weights are missing, the first is {missing[0]}",
            where=f"model.path = {config.path}",
            remedy="The score of a randomly filled layer means nothing: get the whole checkpoint.",
        )
    choose_experts(model, device, getattr(torch, config.dtype))
    structure = find_structure(config, results)
    traits = structure.traits if structure is not None else Traits()
    remember_traits(model, traits)
    head = find_head(quantizable(model), with_patterns(config, structure))
    remember_traits(model, replace(traits, head=head))
    module: nn.Module = model.requires_grad_(False).eval()
    return module.to(device) if move else module


def load_packed(path: Path, device: torch.device, dtype: str) -> nn.Module:
    """Load a checkpoint that compressed-tensors packed, its weights unpacked, to run in float32.

    Activations are quantized as it runs, by compressed-tensors' own code.

    Args:
        path: Directory of the checkpoint.
        device: Where it is to run.
        dtype: Data type of its weights, which they are rounded to.

    Raises:
        UserError: transformers cannot load it.
    """
    from transformers.utils.quantization_config import CompressedTensorsConfig

    with refusals(
        f"transformers {transformers.__version__} cannot load it",
        where=f"checkpoint {path}",
        remedy="It needs the extra `export`: pip install 'qsens[export]'.",
    ):
        settings = AutoConfig.from_pretrained(path)
        model = auto_class(settings).from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            quantization_config=CompressedTensorsConfig(run_compressed=False),
        )
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.to(device, torch.float32 if tensor.is_floating_point() else None)
    module: nn.Module = model.requires_grad_(False).eval()
    return module


def _from_pretrained(
    config: ModelConfig, settings: Any, weights: Weights, quantization: Quantization | None
) -> tuple[Any, Any]:
    """Return the model with transformers' report; weights that are quantized are dequantized."""
    dtype = getattr(torch, config.dtype)
    kind = auto_class(settings)
    options: dict[str, Any] = {
        "config": settings,
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # refused by the caller, by name
    }
    if quantization is None:
        options |= {
            "pretrained_model_name_or_path": config.path,
            "use_safetensors": True,
            "local_files_only": True,
            "trust_remote_code": config.trust_remote_code,
        }
    else:
        without_quantization(settings)
        with torch.device("meta"):
            kind = type(kind.from_config(settings, trust_remote_code=config.trust_remote_code))
        options |= {
            "pretrained_model_name_or_path": None,
            "state_dict": lazy_tensors(weights.tensors, quantization, dtype),
        }
    found: tuple[Any, Any] = kind.from_pretrained(**options)
    return found


def auto_class(settings: Any) -> Any:
    """Return transformers' class that makes a model of a configuration: with pictures, if it can.

    Args:
        settings: A configuration of transformers.
    """
    seeing = type(settings) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if seeing else AutoModelForCausalLM


def choose_experts(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Let the experts of a model run by one grouped product where a GPU has it.

    One expert after the other, as ModelOpt lets them run, is a launch each.

    Raises:
        UserError: They are in a layout of their own that cannot be changed.
    """
    fast = device.type == "cuda" and dtype == torch.bfloat16
    implementation = "grouped_mm" if fast else "eager"
    route_experts(model, implementation)
    experts = (module for module in model.modules() if is_experts(module))
    if any(not isinstance(module, RoutedExperts) for module in experts):
        model.set_experts_implementation(implementation)


def has_tied_head(model: nn.Module) -> bool:
    """Return whether the head of a loaded model shares its weight with another module."""
    weight = head_of(model).weight
    names = [name for name, one in model.named_parameters(remove_duplicate=False) if one is weight]
    return len(names) > 1


def load_tokenizer(config: ModelConfig) -> Any:
    """Load the checkpoint's own tokenizer.

    Raises:
        UserError: There is none, or it is broken.
    """
    _settings(config)  # which a tokenizer reads as well: what is wrong with it is said of it
    with refusals(
        "its tokenizer cannot be loaded",
        where=f"model.path = {config.path}",
        remedy="Save the tokenizer beside the weights, and install what it asks for.",
    ):
        tokenizer = AutoTokenizer.from_pretrained(
            config.path, local_files_only=True, trust_remote_code=config.trust_remote_code
        )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = read_chat_template(config.path)
    return tokenizer


def _settings(config: ModelConfig) -> Any:
    kind = read_config(config.path).get("model_type", "unknown")
    with refusals(
        f"transformers {transformers.__version__} cannot load model type '{shown(kind)}'",
        where=f"model.path = {config.path}",
        remedy=_INSTALL,
    ):
        return AutoConfig.from_pretrained(
            config.path, local_files_only=True, trust_remote_code=config.trust_remote_code
        )


def _choose_attention(settings: Any) -> None:
    """Let transformers choose attention that is there, but where a part asks for ``eager``.

    Other kinds need packages that may not be installed, and read no padding masks of ours.
    """
    parts = {"": settings} | {name: getattr(settings, name, None) for name in settings.sub_configs}
    asked = {name: getattr(part, _ATTENTION, None) for name, part in parts.items()}
    others = sorted({str(one) for one in asked.values()} - {"None", "eager", "sdpa"})
    if others:
        log.warning(
            "config.json asks for attention '%s': transformers' own choice is used instead",
            shown(", ".join(others)),
        )
    chosen = {name: one if one == "eager" else None for name, one in asked.items()}
    if settings.sub_configs:
        settings._attn_implementation = chosen
    elif others:  # some configurations take no table
        settings._attn_implementation = chosen[""]
