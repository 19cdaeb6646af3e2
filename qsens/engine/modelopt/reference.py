"""The reference engine: one ``mtq.auto_quantize`` a cell. Needs torch and modelopt.

What a user would run by hand, with three differences that make its numbers well defined: batches
hold no padding, each sample's loss is weighted by ``1 / T_b`` of its nominal batch, and the scores
are read before ModelOpt's search clamps them.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.opt.utils import named_hparams
from modelopt.torch.quantization.algorithms import QuantRecipe, QuantRecipeHparam
from torch import nn

from qsens.checkpoint.experts import input_names
from qsens.checkpoint.groups import Group, find_groups
from qsens.checkpoint.modules import left_alone
from qsens.config import PairConfig
from qsens.data.samples import Batch, Samples, equal_length_batches, nominal_labels
from qsens.engine.amax import Amax, prefixed
from qsens.engine.cross_entropy import losses_of
from qsens.engine.modelopt.quantizers import on_cpu, quiet
from qsens.engine.scores import CellScores, GroupScore, Progress, silent
from qsens.errors import UserError
from qsens.names import GROUP_SUFFIX


def score_cell(
    model: nn.Module,
    samples: Samples,
    pair: PairConfig,
    *,
    vision: Sequence[str],
    all_layers: bool = False,
    sizes: Sequence[int],
    scored: int,
    batch_size: int,
    method: str = "gradient",
    progress: Progress = silent,
) -> CellScores:
    """Calibrate and score one cell.

    Args:
        model: The model, fresh from its checkpoint; it is converted, and of no use afterwards.
        samples: All samples of the cell's size.
        pair: The format.
        vision: Module name patterns of the vision tower.
        all_layers: Whether the tower may be quantized as well.
        sizes: Sample counts that no batch crosses: those of the data set's sizes.
        scored: The score uses the first ``scored`` samples.
        batch_size: Samples of a nominal batch, and of a batch at most.
        method: ``gradient`` or ``kl_div``.
        progress: Called as batches go through.
    """
    device = next(model.parameters()).device
    on_a_cpu = device.type == "cpu"
    groups = find_groups(model, vision, all_layers=all_layers)
    check_device(model, groups, pair)
    others = left_alone(model)
    disabled = [*others, *([] if all_layers else vision)]
    batches = equal_length_batches(samples, boundaries=[*sizes, scored], batch_size=batch_size)
    score_steps = sum(batch.samples[0] < scored for batch in batches)
    nominal = nominal_labels(samples.labels(scored), batch_size)
    steps = _Steps(device, nominal, progress, len(batches), score_steps)

    started = time.monotonic()
    with quiet(), _refusal(), torch.enable_grad():
        mtq.auto_quantize(
            model,
            constraints={
                # Always feasible: only the scores are taken from this search.
                "effective_bits": max(8.0, pair.effective_bits),
                "cost": {"excluded_module_name_patterns": disabled},
            },
            quantization_formats=[on_cpu(pair.modelopt()) if on_a_cpu else pair.modelopt()],
            data_loader=batches,
            forward_step=steps.forward,
            loss_func=steps.loss if method == "gradient" else None,
            disabled_layers=disabled,
            num_calib_steps=len(batches),
            num_score_steps=score_steps,
            verbose=False,
            method=method,
        )
    ended = time.monotonic()

    hparams = {
        name.removesuffix(GROUP_SUFFIX): hparam
        for name, hparam in named_hparams(model, unique=True)
        if isinstance(hparam, QuantRecipeHparam)
    }
    searched = _searched(groups, [one for name, one in hparams.items() if name not in others])
    if method != "gradient" and (apart := next((n for n, s in searched.items() if len(s) > 1), "")):
        raise UserError(
            f"ModelOpt measures the modules of {apart} apart, and engines fuse them",
            where="autoquant.engine = modelopt",
            remedy="Use autoquant.engine=fused, or autoquant.method=gradient, whose scores add up.",
        )
    calibrated = steps.calibrated or started
    return CellScores(
        groups=tuple(_score(group, searched[group.name], method) for group in groups),
        module_types={
            name: type(model.get_submodule(name)).__name__
            for group in groups
            for name in group.members
        },
        tensors=prefixed(_amax(model, groups, searched)),
        timings={"calibrate": calibrated - started, "score": ended - calibrated},
        padding_share=0.0,
    )


def check_device(model: nn.Module, groups: Sequence[Group], pair: PairConfig) -> None:
    """Refuse what ModelOpt has no code for on the model's device.

    It computes a convolution in three dimensions with NVFP4 weights and inputs by a kernel of its
    own, whose blocks lie otherwise than in a linear module, on a GPU alone.

    Args:
        model: The model.
        groups: Its groups.
        pair: The format.

    Raises:
        UserError: The model is on a CPU, and the pair covers such a convolution.
    """
    if next(model.parameters()).device.type != "cpu":
        return
    quantizers = (pair.weight_quantizer, pair.input_quantizer)
    if not all(each is not None and each.block_type() == (4, 3) for each in quantizers):
        return
    for name in (name for group in groups if group.covered for name in group.members):
        module = model.get_submodule(name)
        if isinstance(module, nn.Conv3d) and module.groups == 1:
            raise UserError(
                f"ModelOpt computes the convolution {name} in this format on a GPU alone",
                where=f"quant_pair {pair.name} by ModelOpt on a CPU",
                remedy="Take another pair, coverage=lm_only, or a machine with a GPU.",
            )


class _Steps:
    """The callables that ``mtq.auto_quantize`` wants; they tell the two phases apart."""

    def __init__(
        self,
        device: torch.device,
        nominal: list[int],
        progress: Progress,
        calib_steps: int,
        score_steps: int,
    ) -> None:
        self.device = device
        self.nominal = nominal
        self.progress = progress
        self.calib_steps = calib_steps
        self.score_steps = score_steps
        self.forwards = 0
        self.losses = 0
        self.calibrated: float | None = None

    def forward(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        scoring = torch.is_grad_enabled() or torch.is_inference_mode_enabled()
        if not scoring:
            self.forwards += 1
            self.progress("calibrate", min(self.forwards, self.calib_steps), self.calib_steps)
        elif self.calibrated is None:
            self.calibrated = time.monotonic()
        moved = batch.to(self.device)
        output = model(**moved.inputs(), attention_mask=moved.attention_mask, use_cache=False)
        logits: torch.Tensor = output.logits
        return logits

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return ``sum_i loss_i / T_b(i)``, with ``loss_i`` summed over a sample's labels."""
        weights = torch.tensor(
            [1.0 / (self.nominal[index] or 1) for index in batch.samples], device=logits.device
        )
        self.losses += 1
        self.progress("score", self.losses, self.score_steps)
        return (losses_of(logits, batch) * weights).sum()


def _searched(
    groups: Sequence[Group], hparams: Sequence[QuantRecipeHparam]
) -> dict[str, list[QuantRecipeHparam]]:
    """Return what ModelOpt searched for each group, by the group's name.

    That is one group of its own, or several where engines fuse what it keeps apart.
    """
    by_member = {name: hparam for hparam in hparams for name in hparam.quant_module_names}
    searched = {
        group.name: list(dict.fromkeys(by_member[name] for name in group.members))
        for group in groups
        if all(name in by_member for name in group.members)
    }
    ours = {name for group in groups for name in group.members}
    if by_member.keys() != ours or sum(map(len, searched.values())) != len(hparams):
        raise RuntimeError(f"ModelOpt grouped otherwise: {sorted(by_member.keys() ^ ours)[:5]}")
    return searched


def _score(group: Group, hparams: Sequence[QuantRecipeHparam], method: str) -> GroupScore:
    if not group.covered:
        return GroupScore(group, "disabled", "outside the coverage")
    values = []
    for hparam in hparams:
        # get_score() turns a missing score into 0 and the search clamps: both would hide something.
        modules = hparam.score_modules if method == "gradient" else hparam.score_modules[:1]
        values += [hparam._importance_dict[_recipe(hparam)][module] for module in modules]
    if any(value is None for value in values):
        return GroupScore(group, "no_gradient", "no gradient reached it")
    score = math.fsum(float(value) for value in values)
    if not math.isfinite(score):
        return GroupScore(group, "non_finite", f"its score is {score}")
    return GroupScore(group, "scored", sensitivity=score)


def _amax(
    model: nn.Module, groups: Sequence[Group], searched: Mapping[str, Sequence[QuantRecipeHparam]]
) -> Amax:
    """Return the calibrated maximum of every input."""
    amax: Amax = {}
    for group in groups:
        if not group.covered:
            continue
        quantizers = {
            module: held
            for hparam in searched[group.name]
            for module, held in hparam._all_quantizer_choices[_recipe(hparam)].items()
        }
        for name in group.members:
            module = model.get_submodule(name)
            for each in input_names(name, module):
                inner = each.removeprefix(name).removeprefix(".")
                attribute = f"{inner}_input_quantizer" if inner else "input_quantizer"
                largest = getattr(quantizers[module][attribute], "_amax", None)
                if largest is not None:
                    amax[each] = largest.detach().float().cpu()
    return amax


def _recipe(hparam: QuantRecipeHparam) -> QuantRecipe:
    """Return the one format that was searched."""
    (recipe,) = (choice for choice in hparam.choices if choice != QuantRecipe(quant_cfg=None))
    return recipe


@contextlib.contextmanager
def _refusal() -> Iterator[None]:
    """ModelOpt asserts that amax are finite, and its solver takes finite scores alone."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, AssertionError) and type(error).__name__ != "PulpError":
            raise
        raise UserError(
            f"ModelOpt refuses it: {_first_line(error)}",
            where="autoquant.engine=modelopt",
            remedy="autoquant.engine=fused names the groups and samples that are not finite.",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
