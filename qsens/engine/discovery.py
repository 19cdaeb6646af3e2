"""What a model is made of, found by running a shrunk twin of it. Needs torch.

Nothing here knows a model by its name. Which modules are the language model, which the tower, which
are routers, whether padding matters and whether layers can be run again one by one shows when the
twin runs; that scores are right, when they are held against plain autograd.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qsens.checkpoint.experts import expert_weights, is_experts
from qsens.checkpoint.groups import find_groups
from qsens.checkpoint.loading import choose_experts, has_tied_head
from qsens.checkpoint.modules import (
    bias_of,
    is_linear,
    is_quantizable,
    layers_of,
    quantizable,
    weight_of,
    with_open_index,
)
from qsens.checkpoint.structure import (
    EXPERT_COUNTS,
    Structure,
    Traits,
    head_of,
    remember_traits,
)
from qsens.checkpoint.twin import text_inputs
from qsens.data.samples import Batch, Samples, make_batch
from qsens.engine.candidates import Request, distinct
from qsens.engine.gradient.scorer import score
from qsens.engine.head import Head, head_input, run, without_head
from qsens.errors import UserError
from qsens.numerics import fake_quantize

# A router's last name, or the one before its last.
_ROUTER = re.compile(r"(^|\.)\w*(router|gate)(\.\w+)?$")
_FORMAT = {"num_bits": 4, "axis": 0}
_TOLERANCE = 1e-3
# Share of the language model's weights that may lie in no module that a format applies to.
_LEFT_OUT = 0.03
_SLIDING = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SAMPLES, _TOKENS, _PADDING = 2, 12, 5


def discover(model: Any) -> Structure:
    """Return the structure of a twin.

    Args:
        model: The twin, see :func:`qsens.checkpoint.twin.build_twin`. Traits are noted of it.

    Raises:
        UserError: It cannot be scored; the message names the cause.
    """
    name = type(model).__name__
    choose_experts(model, torch.device("cpu"), torch.float32)
    ids = text_inputs(model, samples=_SAMPLES, tokens=_TOKENS)
    called = _called(model, ids)
    modules = quantizable(model)
    head = _head_name(model)
    Head.of(model)
    routers = {key for key in modules if key in called and _is_router(model, key, modules[key])}
    _refuse_own_layouts(model, called)
    stacks = _stacks(layer for layer in layers_of(model) if layer in called)
    inside = {key for key in modules if key.startswith(stacks)}
    alone = [key for key in modules if key in called and key not in inside and key != head]
    if not inside and not alone:
        raise _refusal(name, "no linear module of it runs on text")
    rest = [
        key
        for key, module in model.named_modules()
        if key not in called
        and not key.startswith(stacks)
        and key != head
        and any(each.ndim >= 2 for each in module.parameters(recurse=False))
    ]
    tower = rest if _has_tower(model.config) else []
    unused = [] if tower else [key for key in rest if key in modules]
    traits = Traits(
        head=head,
        pads=_pads(model, ids),
        left_alone=tuple(sorted({with_open_index(key) for key in routers})),
    )
    remember_traits(model, traits)
    language = [*inside, *alone, *unused, head]
    return Structure(
        language=(*(f"{stack}*" for stack in stacks), *alone, *unused),
        vision=_both_spellings(_patterns(tower, language, modules)),
        head=(head,),
        traits=_checked(model, ids, traits),
        tied=has_tied_head(model),
    )


def _called(model: Any, ids: torch.Tensor) -> set[str]:
    """Return the names of the modules that run on text."""
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            run(model, {"input_ids": ids})
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _refusal(
            type(model).__name__, f"it does not run as a language model on text: {reason}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return called


def _head_name(model: Any) -> str:
    try:
        head = model.get_output_embeddings()
    except Exception:
        head = None
    names: dict[nn.Module, str] = {module: key for key, module in model.named_modules()}
    name = names.get(head) if head is not None else None
    if head is None or name is None:
        raise _refusal(type(model).__name__, "it names no module that makes its logits")
    return name


def _is_router(model: Any, name: str, module: nn.Module) -> bool:
    """Return whether a linear module chooses experts, or weighs one that all tokens go to."""
    config = model.config.get_text_config()
    counts = {
        value for key in EXPERT_COUNTS if isinstance(value := getattr(config, key, None), int)
    }
    return (
        bool(_ROUTER.search(name)) and is_linear(module) and len(weight_of(module)) in {1, *counts}
    )


def _refuse_own_layouts(model: Any, called: Collection[str]) -> None:
    """Refuse a model much of which lies in matrices that no module of ours multiplies with."""
    held = 0
    outside: dict[str, int] = defaultdict(int)
    embedding = model.get_input_embeddings()
    for name, module in model.named_modules():
        if name not in called or module is embedding or isinstance(module, nn.Embedding):
            continue
        own = sum(each.numel() for each in module.parameters(recurse=False) if each.ndim >= 2)
        held += own
        stacked = any(each.ndim == 3 for each in module.parameters(recurse=False))
        multiplied = isinstance(module, nn.Linear) or (stacked and not isinstance(module, _SLIDING))
        if multiplied and not is_quantizable(module):
            outside[type(module).__name__] += own
    missing = sum(outside.values())
    if missing > _LEFT_OUT * held:
        kinds = ", ".join(sorted(outside))
        raise _refusal(
            type(model).__name__,
            f"{missing / held:.0%} of its weights are in modules of a layout of their own: {kinds}",
        )


def _pads(model: Any, ids: torch.Tensor) -> bool:
    """Return whether padding on the right changes what the head reads of real tokens."""
    padded = F.pad(ids, (0, _PADDING))
    with without_head(head_of(model)), torch.no_grad():
        alone, beside = (head_input(model, _batch(_samples_of(each))) for each in (ids, padded))
    difference = (beside[:, : ids.shape[1]] - alone).norm()
    return bool(difference <= 1e-5 * alone.norm())


def _checked(model: Any, ids: torch.Tensor, traits: Traits) -> Traits:
    """Return the traits under which scores are those of plain autograd.

    Raises:
        UserError: There are none.
    """
    samples = _samples_of(ids)
    groups = find_groups(model)
    candidates = distinct([Request("check", _FORMAT, None, len(ids), len(ids))])
    batches = [_batch(samples)]
    reason, expected = "", None
    for chained, in_place in itertools.product((True, False), (False, True)):
        own = replace(traits, chained=chained, in_place=in_place)
        remember_traits(model, own)
        try:
            if expected is None:
                names = [name for group in groups for name in group.members]
                expected = _plain_scores(model, ids, names)
            found = score(model, samples, groups, candidates, {}, batches=batches)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        failed = [*map(str, found.failures.broken.values()), *found.failures.refused.values()]
        if failed:
            reason = failed[0]
            continue
        wrong = [
            group.name
            for group, scores in zip(groups, found.per_sample[:, 0], strict=True)
            if not torch.allclose(
                scores,
                torch.stack([expected[name] for name in group.members]).sum(dim=0),
                rtol=_TOLERANCE,
                atol=0,
            )
        ]
        if not wrong:
            return own
        reason = f"scores of {len(wrong)} groups are not those of plain autograd, as {wrong[0]}"
    raise _refusal(type(model).__name__, f"its layers do not run as a pass runs them: {reason}")


def _plain_scores(model: Any, ids: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return ``sum((G * dY)^2)`` of each sample by plain autograd, ``(samples,)``, float64."""
    runs: list[tuple[str, tuple[Any, ...], torch.Tensor, torch.Tensor]] = []
    start = torch.zeros((), requires_grad=True)

    def note(name: str, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        output = output + start  # a gradient is wanted wherever it stands in the model
        kept = tuple(each.clone() if torch.is_tensor(each) else each for each in args)
        runs.append((name, kept, output, output.detach().clone()))
        return output.clone()

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: note(name, args, output)
        )
        for name in names
    ]
    try:
        with torch.enable_grad():
            logits = run(model, {"input_ids": ids}).logits
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            )
            reached = [each for each in runs if each[2].requires_grad]
            gradients: Sequence[torch.Tensor | None] = torch.autograd.grad(
                loss, [output for _, _, output, _ in reached], allow_unused=True
            )
    finally:
        for handle in handles:
            handle.remove()
    scores = {name: torch.zeros(len(ids), dtype=torch.float64) for name in names}
    with torch.no_grad():
        for (name, args, _, output), grad in zip(reached, gradients, strict=True):
            if grad is None:
                continue
            changed = _changed(model.get_submodule(name), args).view_as(output)
            squares = (grad * (changed - output)).double().square()
            scores[name] += squares.reshape(len(ids), -1).sum(dim=1)
    return scores


def _changed(module: nn.Module, args: tuple[Any, ...]) -> torch.Tensor:
    """Return what a module gives with its weights quantized, by its own code."""
    if not is_experts(module):
        weight = fake_quantize(weight_of(module).contiguous(), _FORMAT)
        return F.linear(args[0], weight, bias_of(module))
    kept = [weight.clone() for weight in expert_weights(module)]
    for weight in expert_weights(module):
        for own in weight:
            own.copy_(fake_quantize(own.contiguous(), _FORMAT))
    output: torch.Tensor = module(*args)
    for weight, before in zip(expert_weights(module), kept, strict=True):
        weight.copy_(before)
    return output


def _samples_of(ids: torch.Tensor) -> Samples:
    return Samples(tuple(map(tuple, ids.tolist())), (False,) * len(ids))


def _batch(samples: Samples) -> Batch:
    return make_batch(samples, range(len(samples)))


def _has_tower(config: Any) -> bool:
    return any(
        getattr(config, f"{kind}_config", None) is not None
        for kind in ("vision", "audio", "vq", "perceiver")
    )


def _stacks(layers: Iterable[str]) -> tuple[str, ...]:
    """Return what the names of layers begin with: one for each list that they lie in."""
    return tuple(dict.fromkeys(re.sub(r"\d+$", "", layer) for layer in layers))


def _patterns(
    names: Iterable[str], others: Sequence[str], modules: Collection[str]
) -> tuple[str, ...]:
    """Return the shortest patterns that match names, what is in them, and none of the others.

    Args:
        names: Names of modules with weights.
        others: Names of others.
        modules: Those among all to which a format applies: nothing is in them.
    """
    apart = [f"{other}." for other in others]
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            prefix = ".".join(parts[:end])
            if not any(other.startswith(f"{prefix}.") for other in apart):
                whole = end == len(parts) and name in modules
                found[prefix if whole else f"{prefix}.*"] = None
                break
    return tuple(found)


def _both_spellings(patterns: Sequence[str]) -> tuple[str, ...]:
    """Return patterns with those of files that lack the outermost name, as many do."""
    inner = [each.removeprefix("model.") for each in patterns]
    return tuple(dict.fromkeys([*patterns, *inner]))


def _refusal(name: str, what: str) -> UserError:
    return UserError(what, where=name, remedy="docs/zoo.md lists the models that can be scored.")
