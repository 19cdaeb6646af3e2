"""Whether a served model is as far from the unquantized one as its recipe predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qsens.checkpoint.components import resolve_components
from qsens.checkpoint.loading import load_model, load_tokenizer, resolve_device
from qsens.config import DatasetConfig, ModelConfig, Roots
from qsens.data.captions import read_samples
from qsens.data.records import Record
from qsens.data.samples import Samples, refuse_unknown_tokens
from qsens.data.text import text_samples
from qsens.engine.kl.served import PromptLogprobs, ServedDivergence, compare_served
from qsens.engine.placement import require_room
from qsens.errors import UserError
from qsens.grid import Plan
from qsens.pipeline.evaluate_recipe import held_out
from qsens.pipeline.plan import identify_checkpoint
from qsens.published import find_sweep, read_sweep
from qsens.schema.recipe import Recipe, read_recipe
from qsens.tools.openai_api import OpenAiApi
from qsens.tools.served_model import ServedModel

# Prompts of one request, which a server computes together, and samples whose log-probabilities are
# held at once: with many tokens a position they are gigabytes.
_PROMPTS, _SAMPLES = 8, 64
# Beside a sample's own tokens: one behind its last, at which the distribution after it is given,
# and the one that a server generates.
_BEYOND = 2
# Share of tokens whose texts may differ: those of a part of a character have none of their own.
_STRANGE = 0.1
# What a tokenizer writes for a part of a character.
_PART = "\ufffd"


def check_server(
    url: str,
    *,
    recipe: Path | None = None,
    samples: Path | None = None,
    model: str | None = None,
    reference: Path | None = None,
    top_k: int = 20,
    device: str = "auto",
    roots: Roots | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Measure how far a served model is from the unquantized one.

    The latter is computed here, in float32, its weights as they are stored. The server gives the
    log-probabilities of the ``top_k`` likeliest tokens at each position and of the label: the
    divergence is a lower bound, see :mod:`qsens.engine.kl.lumped`.

    Args:
        url: Address of the server, with or without ``/v1``.
        recipe: What ``qsens recipe --to json`` wrote; its sweep says what the reference and the
            samples are, where it is found. Without one, nothing is predicted.
        samples: File of captions or conversations; those that no cell of the sweep used when not
            given.
        model: What the server calls the model; its only one when not given.
        reference: Directory of the unquantized checkpoint; that of the sweep when not given.
        top_k: Tokens that the server is asked for at each position.
        device: Where the reference is computed.
        roots: Where things lie; from the environment when not given.
        progress: Called with a phase, and how many of how many of its steps are done.

    Returns:
        ``{server, model, api, reference, samples, tokens, labels, top_k, divergence,
        divergence_error, outside: {reference, served}, loss, loss_error, predicted, notices}``:
        the lower bound of the KL divergence in nats a token, with its standard error over samples;
        the probability of what the server did not name, under each model; the increase of the loss
        in nats a label; and the recipe's prediction, none where there is none in nats.

    Raises:
        TryAgain: The server does not answer.
        UserError: It refuses, serves another model, or gives no log-probabilities; samples do not
            fit; or the reference is not the checkpoint of the recipe.
    """
    roots = roots or Roots.from_environment()
    wanted = read_recipe(recipe) if recipe is not None else None
    api = OpenAiApi(
        url,
        where=f"server {url}",
        remedy="Check the address, and the server's log.",
        again="Start the server, wait until it has loaded the model, and run it again.",
    )
    served = ServedModel(api, model)
    plan = _plan_of(wanted, roots) if wanted is not None else None
    config = _reference(plan, reference, roots, wanted)
    if wanted is not None:
        _refuse_another(config, wanted, roots)
    tokenizer = load_tokenizer(config)
    measured = _samples(plan, samples, tokenizer)
    _refuse_too_long(measured, served)
    windows = [measured.part(at, at + _SAMPLES) for at in range(0, len(measured), _SAMPLES)]
    said = _ask(served, windows[0], top_k)  # before the model is loaded: it may be refused
    _refuse_another_tokenizer(served, tokenizer, api)
    where = resolve_device(device)
    loaded = load_model(config, where, roots.results, move=False)
    rows = loaded.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    refuse_unknown_tokens(measured, rows)
    require_room(loaded, where, None)
    loaded.to(where)
    parts = []
    for number, window in enumerate(windows):
        said = _ask(served, window, top_k) if number else said
        _refuse_another_vocabulary(said, loaded.get_output_embeddings().weight.shape[0], api)  # type: ignore[operator]
        parts.append(compare_served(loaded, window, said))
        progress("samples", min((number + 1) * _SAMPLES, len(measured)), len(measured))
    compared = ServedDivergence.joined(parts)
    return {
        "server": url,
        "model": served.name,
        "api": served.kind,
        "reference": str(config.path),
        "top_k": top_k,
        **compared.numbers(),
        "predicted": wanted.damage
        if wanted is not None and wanted.damage_unit == "nats a token"
        else None,
        "notices": [*_notices(plan, wanted), *measured.notices],
    }


def _plan_of(recipe: Recipe, roots: Roots) -> Plan | None:
    """Return the plan of the sweep that a recipe was chosen from; none where it is not here."""
    try:
        return read_sweep(find_sweep(recipe.sweep_id, roots.results))[1]
    except UserError:
        return None


def _reference(
    plan: Plan | None, path: Path | None, roots: Roots, recipe: Recipe | None
) -> ModelConfig:
    """Return the unquantized checkpoint."""
    if plan is not None:
        given = plan.config.model
        return given if path is None else given.model_copy(update={"path": path.resolve()})
    if path is None:
        raise UserError(
            f"the recipe's sweep {recipe.sweep_id} is not below {roots.results}"
            if recipe is not None
            else "neither a recipe nor a checkpoint says what to compare with",
            where="the unquantized model",
            remedy="Name its directory with --reference, and samples with --samples.",
        )
    config = ModelConfig(path=path.resolve(), dtype="float32")
    return resolve_components(config, roots.results)


def _refuse_another(config: ModelConfig, recipe: Recipe, roots: Roots) -> None:
    results = roots.results if roots.results.is_dir() else None
    if identify_checkpoint(config, results).digest != recipe.checkpoint_digest:
        raise UserError(
            "is not the checkpoint that the recipe was made for: its files are others",
            where=str(config.path),
            remedy=f"Name the one that sweep {recipe.sweep_id} scored with --reference.",
        )


def _samples(plan: Plan | None, path: Path | None, tokenizer: Any) -> Samples:
    """Return what is measured on: samples of text that no cell of the sweep used."""
    if plan is not None:
        left = held_out(plan, "text", path)
        parts = [
            _read(left[dataset.name], tokenizer, dataset)
            for dataset in plan.config.dataset
            if dataset.name in left
        ]
        return Samples.joined(parts)
    if path is None:
        raise UserError(
            "there is no sweep whose unused samples could be taken",
            where="--samples",
            remedy="Name a file of captions or conversations.",
        )
    return _read(read_samples((path,)), tokenizer, DatasetConfig())


def _read(records: Sequence[Record], tokenizer: Any, dataset: DatasetConfig) -> Samples:
    alone = [record for record in records if not (record.fault or record.needs_pictures)]
    if not alone:
        raise UserError(
            "no sample can be read as text",
            where=f"data set {dataset.name}",
            remedy="Name a file of captions or conversations with --samples.",
        )
    return text_samples(alone, tokenizer, dataset)


def _refuse_too_long(samples: Samples, served: ServedModel) -> None:
    lengths = [len(ids) for ids in samples.ids]
    longest = max(lengths)
    if served.longest is not None and longest + _BEYOND > served.longest:
        raise UserError(
            f"sample {lengths.index(longest) + 1} has {longest} tokens and needs "
            f"{longest + _BEYOND}, of which the server takes {served.longest}",
            where=f"model {served.name}",
            remedy=f"Serve it with a context of {longest + _BEYOND} tokens (vLLM: "
            "--max-model-len), or name shorter samples with --samples.",
        )


def _ask(served: ServedModel, samples: Samples, top_k: int) -> list[PromptLogprobs]:
    prompts = [(*ids, ids[-1]) for ids in samples.ids]
    return [
        one
        for first in range(0, len(prompts), _PROMPTS)
        for one in served.logprobs(prompts[first : first + _PROMPTS], top_k)
    ]


def _refuse_another_tokenizer(served: ServedModel, tokenizer: Any, api: OpenAiApi) -> None:
    """Refuse a server whose tokens have other texts than those of the reference."""
    texts = {token: text.strip() for token, text in served.texts.items() if _PART not in text}
    ours = {token: str(tokenizer.decode([token])).strip() for token in texts if texts[token]}
    other = [token for token, text in ours.items() if text != texts[token]]
    if len(other) > _STRANGE * len(ours):
        raise api.refusal(
            f"has another tokenizer: token {other[0]} is {texts[other[0]]!r} there and "
            f"{ours[other[0]]!r} in the reference, {len(other)} of {len(ours)} differ",
            "Serve the checkpoint with its own tokenizer, or name its reference with --reference.",
        )


def _refuse_another_vocabulary(said: Sequence[PromptLogprobs], rows: int, api: OpenAiApi) -> None:
    highest = max(int(one.ids.max()) for one in said)
    if highest >= rows:
        raise api.refusal(
            f"has another vocabulary: it names token {highest}, and the reference has {rows}",
            "Serve a checkpoint made of the reference, or name its reference with --reference.",
        )


def _notices(plan: Plan | None, recipe: Recipe | None) -> list[str]:
    notices = []
    if recipe is not None and recipe.damage_unit != "nats a token":
        notices.append(
            f"the recipe's total is a {recipe.damage_unit} and no KL divergence: nothing is "
            "predicted"
        )
    if plan is not None and any(cell.modality == "image_text" for cell in plan.cells):
        notices.append("the sweep read pictures; the server is asked for text alone")
    return notices
