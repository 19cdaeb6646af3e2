"""A tiny checkpoint of a type: planned, scored, and held against a reference and ModelOpt."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qsens.checkpoint.twin import build_twin, default_settings
from qsens.config import Roots
from qsens.data.samples import Samples
from qsens.engine.scores import silent
from qsens.engine.scoring_pass import ScoringPass, run_pass
from qsens.errors import UserError
from qsens.grid import Plan
from qsens.pipeline.loading import groups_of, load_checkpoint, request_of
from qsens.pipeline.plan import plan_sweep
from tests.zoo.reference import Format, Reference

PAIRS = ("wfp8_afp8", "wint8_aint8", "wfp4_afp16")
TOLERANCE = 1e-3
# What the head differs by, whose change of the logits is taken whole.
BENT = 5e-3
# What float32 leaves of a derivative, as a share of the largest score.
NOISE = 1e-6
DRAWS = 64
_SAMPLES, _TOKENS = 4, 12
# Ids of words: none has a meaning to a configuration whose vocabulary is shrunk.
_FIRST, _WORDS = 20, 200


def check(model_type: str) -> dict[str, Any]:
    """Return what became of a type.

    Returns:
        ``refused`` with a reason, or ``gradient`` and ``fisher``: the largest relative difference
        from the reference, and by how many standard errors; ``modelopt``: the largest relative
        difference from ModelOpt, or why there is none; ``wrong`` where one is too large.
    """
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        try:
            plan = _plan(model_type, root)
        except UserError as error:
            return {"refused": f"{error.what}"}
        return _compare(plan)


def save(model_type: str, path: Path) -> Path:
    """Save a tiny checkpoint of a type, with a tokenizer of words."""
    build_twin(default_settings(model_type)).save_pretrained(path)
    words = {f"w{at}": at for at in range(_FIRST + _WORDS)}
    inner = Tokenizer(models.WordLevel(words, "w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(path)
    return path


def _plan(model_type: str, root: Path) -> Plan:
    try:
        checkpoint = save(model_type, root / "checkpoint")
    except Exception:  # it cannot be built here: its configuration alone is planned
        checkpoint = root / "checkpoint"
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
        save_file({"nothing": torch.zeros(1)}, checkpoint / "model.safetensors")
    lines = [" ".join(f"w{token}" for token in row) for row in _ids().tolist()]
    (root / "captions_small.txt").write_text("\n".join(lines) + "\n")
    roots = Roots.from_environment()
    return plan_sweep(
        "single",
        [
            f"model.path={checkpoint}",
            "model.dtype=float32",
            f"dataset.directory={root}",
            f"dataset.sizes.small={_SAMPLES}",
            f"quant_pair={','.join(PAIRS)}",
            "autoquant.device=cpu",
            f"autoquant.draws={DRAWS}",
        ],
        roots=Roots(root=roots.root, results=root / "results", configs=roots.configs),
    )


def _ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(_FIRST, _FIRST + _WORDS, (_SAMPLES, _TOKENS), generator=generator)


def _compare(plan: Plan) -> dict[str, Any]:
    cell = plan.cells[0]
    model = load_checkpoint(plan, silent).model
    # Not read from the file: some types make a tokenizer of their own kind of any vocabulary.
    samples = Samples(tuple(map(tuple, _ids().tolist())), (False,) * _SAMPLES)
    groups = groups_of(plan, cell, model)
    requests = [request_of(each) for each in plan.cells]

    def scored(**settings: Any) -> ScoringPass:
        autoquant = plan.config.autoquant.model_copy(update=settings)
        return run_pass(
            model, samples, groups, requests, autoquant, boundaries=cell.sets[0].boundaries
        )

    passes = {method: scored(method=method) for method in ("gradient", "fisher")}
    for failures in (each.scores.failures for each in passes.values()):
        if failures.broken or failures.refused:
            reasons = [*map(str, failures.broken.values()), *failures.refused.values()]
            return {"wrong": reasons[0]}
    covered = [group for group in groups if group.covered]
    reference = Reference(model, _ids(), [group.members for group in covered])
    result: dict[str, Any] = {"groups": len(covered), "gradient": 0.0, "fisher": 0.0}
    for request in requests:
        form = Format(request.weight, request.input)
        ours = passes["gradient"].scores.per_sample
        own = ours[:, passes["gradient"].candidates.of_cell[request.cell]]
        difference = _largest(own, reference.gradient(form))
        result["gradient"] = max(result["gradient"], difference)
        exact = reference.fisher(form)
        away = _errors_away(passes["fisher"], request.cell, exact)
        if away > 4:  # of some thousands, a few are by chance: other draws, and more, decide
            more = scored(method="fisher", draws=8 * DRAWS, seed=1)
            away = _errors_away(more, request.cell, exact)
        result["fisher"] = max(result["fisher"], away)
    result["modelopt"] = _beside_modelopt(plan, model, samples, passes["gradient"])
    # Where ModelOpt runs, it decides: an input near a tie may round otherwise in the reference.
    beside = result["modelopt"]
    if (beside if isinstance(beside, float) else result["gradient"]) > TOLERANCE:
        result["wrong"] = "other scores than " + (
            "ModelOpt" if isinstance(beside, float) else "autograd"
        )
    elif result["fisher"] > 4:
        result["wrong"] = "another divergence than the exact one"
    return result


def _errors_away(found: ScoringPass, cell: str, exact: torch.Tensor) -> float:
    """Return by how many standard errors, at most, estimates are away from exact values."""
    draws = found.scores.draws
    assert draws is not None
    drawn = draws[:, found.candidates.of_cell[cell]].sum(dim=1)
    errors = drawn.std(dim=1) / drawn.shape[1] ** 0.5
    away = (drawn.mean(dim=1) - exact).abs() - BENT * exact - NOISE * exact.max()
    return float((away.clamp_min(0) / (errors + 1e-30)).max())


def _beside_modelopt(plan: Plan, model: Any, samples: Any, found: Any) -> float | str:
    """Return the largest difference from ``mtq.auto_quantize`` on the same batch, if it runs."""
    from qsens.engine.modelopt import reference

    largest = 0.0
    labels = sum(samples.labels())
    for cell, request in ((cell, request_of(cell)) for cell in plan.cells):
        try:
            theirs = reference.score_cell(
                copy.deepcopy(model),
                samples,
                cell.precision,
                vision=plan.config.model.vision_patterns,
                sizes=cell.sets[0].boundaries,
                scored=cell.scored,
                batch_size=_SAMPLES,
            )
        except Exception as error:
            first = (str(error).strip() or "no message").splitlines()[0]
            return f"{type(error).__name__}: {first}"[:100]
        scores: Mapping[str, float | None] = {
            each.group.name: each.sensitivity for each in theirs.groups
        }
        own = (
            found.scores.per_sample[:, found.candidates.of_cell[request.cell]].sum(dim=1)
            / labels**2
        )
        for group, score in zip(found.scores.groups, own.tolist(), strict=True):
            expected = scores.get(group.name)
            if expected:
                largest = max(largest, abs(score - expected) / expected)
    return largest


def _largest(own: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of scores, relative to each group's own."""
    return float(((own - expected).abs().sum(1) / expected.sum(1).clamp_min(1e-30)).max())
