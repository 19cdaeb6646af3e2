"""Served models against their reference, over HTTP, with figures from full logits by numpy."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from qsens.cli import app
from qsens.config import Roots
from qsens.errors import Damaged, QsensError, TryAgain, UserError
from qsens.pipeline.recipe import write_recipe
from qsens.pipeline.sweep import run_sweep
from qsens.schema.recipe import Recipe
from qsens.tools.check_server import check_server
from tests.checkpoint.hostile import plan_of
from tests.checkpoint.tiny_families import CAPTIONS, VOCABULARY, configuration, save
from tests.tools.logprob_server import Fake, serving
from tests.tools.served_by_hand import by_hand

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
TOP = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save(configuration("Llama", tied=False), tmp_path_factory.mktemp("c") / "llama")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def other(reference: Any) -> Any:
    """The same model with other weights: what quantization might have made of it."""
    changed = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in changed.parameters():
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
    return changed


@pytest.fixture
def fake(other: Any, checkpoint: Path) -> Fake:
    return Fake(other, AutoTokenizer.from_pretrained(checkpoint))


@pytest.fixture
def url(fake: Fake) -> Iterator[str]:
    with serving(fake) as address:
        yield address


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "captions.txt"
    path.write_text("".join(f"{caption}\n" for caption in CAPTIONS))
    return path


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    found = Roots.from_environment()
    return Roots(root=found.root, results=tmp_path / "results", configs=found.configs)


def tokens(checkpoint: Path, text: str) -> list[int]:
    found: list[int] = AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"]
    return found


def matches(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert (found["tokens"], found["labels"]) == (wanted["tokens"], wanted["labels"])
    assert found["divergence"] == pytest.approx(wanted["divergence"], rel=1e-4)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4, abs=1e-6)
    assert found["outside"]["reference"] == pytest.approx(wanted["outside"], rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_figures_are_those_of_the_full_logits(
    api: str,
    fake: Fake,
    url: str,
    checkpoint: Path,
    samples: Path,
    roots: Roots,
    reference: Any,
    other: Any,
) -> None:
    fake.api = api
    found = check_server(url, samples=samples, reference=checkpoint, top_k=TOP, roots=roots)
    texts = [tokens(checkpoint, caption) for caption in CAPTIONS]
    wanted = by_hand(reference, other, texts, TOP)
    matches(found, wanted)
    assert 0.001 < found["divergence"] < wanted["full"]
    assert wanted["tokens"] == sum(map(len, texts)) == wanted["labels"] + len(texts)
    assert found["samples"] == len(CAPTIONS)
    assert (found["model"], found["api"].lower(), found["predicted"]) == ("tiny", api, None)
    assert found["divergence_error"] > 0
    # The whole vocabulary bounds nothing: it is the divergence itself.
    fake.most = VOCABULARY
    whole = check_server(url, samples=samples, reference=checkpoint, top_k=VOCABULARY, roots=roots)
    assert whole["divergence"] == pytest.approx(wanted["full"], rel=1e-4)
    assert whole["outside"] == {"reference": 0.0, "served": 0.0}


def test_windows_of_samples_change_nothing(
    fake: Fake,
    url: str,
    checkpoint: Path,
    samples: Path,
    roots: Roots,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = check_server(url, samples=samples, reference=checkpoint, roots=roots)
    monkeypatch.setattr("qsens.tools.check_server._SAMPLES", 3)
    steps: list[tuple[str, int, int]] = []
    found = check_server(
        url,
        samples=samples,
        reference=checkpoint,
        roots=roots,
        progress=lambda *step: steps.append(step),
    )
    assert [len(body["prompt"]) for body in fake.asked] == [4, 3, 1]
    assert steps == [("samples", 3, 4), ("samples", 4, 4)]
    for name, value in whole.items():
        if isinstance(value, float):
            assert found[name] == pytest.approx(value, rel=1e-4)


def test_the_model_itself_is_at_0(
    fake: Fake, url: str, checkpoint: Path, samples: Path, roots: Roots, reference: Any
) -> None:
    fake.model, fake.longest = reference, 13  # the longest sample has 11
    found = check_server(url, samples=samples, reference=checkpoint, top_k=TOP, roots=roots)
    assert 0 <= found["divergence"] < 1e-9
    assert abs(found["loss"]) < 1e-6


def test_of_conversations_the_answers_count(
    url: str, checkpoint: Path, tmp_path: Path, roots: Roots, reference: Any, other: Any
) -> None:
    path = tmp_path / "chats.jsonl"
    turns = [(CAPTIONS[0], CAPTIONS[1]), (CAPTIONS[3], CAPTIONS[2])]
    path.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": asked},
                        {"role": "assistant", "content": answered},
                    ]
                }
            )
            + "\n"
            for asked, answered in turns
        )
    )
    found = check_server(url, samples=path, reference=checkpoint, top_k=TOP, roots=roots)
    texts = [tokens(checkpoint, f"{asked} {answered}") for asked, answered in turns]
    spans = [
        range(len(tokens(checkpoint, asked)) - 1, len(text) - 1)
        for (asked, _), text in zip(turns, texts, strict=True)
    ]
    wanted = by_hand(reference, other, texts, TOP, spans)
    assert wanted["tokens"] == sum(len(answered.split()) for _, answered in turns)
    matches(found, wanted)


@pytest.fixture(scope="module")
def swept(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Roots, Any]:
    """A recipe from a real sweep of the first two captions; the others are left."""
    root = tmp_path_factory.mktemp("sweep")
    for size, count in (("small", 2), ("medium", 3), ("large", 4)):
        (root / f"{size}.txt").write_text("".join(f"{one}\n" for one in CAPTIONS[:count]))
    plan = plan_of(
        checkpoint,
        root / "results",
        f"dataset.directory={root}",
        *(f"dataset.files.{size}={size}.txt" for size in ("small", "medium", "large")),
        "dataset.sizes.small=2",
        "dataset.sizes.medium=3",
        "dataset.sizes.large=4",
        "dataset.size=small",
        "model.dtype=float32",
        "autoquant.method=fisher",
    )
    run_sweep(plan)
    found = Roots.from_environment()
    roots = Roots(root=found.root, results=root / "results", configs=found.configs)
    recipe = root / "recipe.json"
    write_recipe(plan.sweep_id, bits=12, target="json", out=recipe, roots=roots)
    return recipe, roots, json.loads(recipe.read_text())


def test_a_recipe_says_what_to_compare_on_what(
    swept: tuple[Path, Roots, Any], url: str, reference: Any, other: Any, checkpoint: Path
) -> None:
    path, roots, recipe = swept
    found = check_server(url, recipe=path, top_k=TOP, roots=roots)
    unused = [tokens(checkpoint, caption) for caption in CAPTIONS[2:]]
    matches(found, by_hand(reference, other, unused, TOP))
    assert found["predicted"] == recipe["damage"] > 0
    assert found["reference"] == str(checkpoint)
    assert found["notices"] == []


def test_a_recipe_elsewhere_needs_what_its_sweep_said(
    swept: tuple[Path, Roots, Any], url: str, checkpoint: Path, samples: Path, roots: Roots
) -> None:
    path, _, recipe = swept
    with pytest.raises(UserError, match=f"sweep {recipe['sweep_id']} is not below"):
        check_server(url, recipe=path, samples=samples, roots=roots)
    with pytest.raises(UserError, match="no sweep whose unused samples"):
        check_server(url, recipe=path, reference=checkpoint, roots=roots)
    found = check_server(url, recipe=path, reference=checkpoint, samples=samples, roots=roots)
    assert (found["samples"], found["predicted"]) == (len(CAPTIONS), recipe["damage"])


def test_a_score_that_is_no_divergence_predicts_nothing(
    swept: tuple[Path, Roots, Any],
    url: str,
    checkpoint: Path,
    samples: Path,
    tmp_path: Path,
    roots: Roots,
) -> None:
    given = Recipe.model_validate(swept[2]).model_copy(update={"damage_unit": "gradient score"})
    path = tmp_path / "gradient.json"
    path.write_text(given.model_dump_json())
    found = check_server(url, recipe=path, reference=checkpoint, samples=samples, roots=roots)
    assert found["predicted"] is None
    assert found["notices"] == [
        "the recipe's total is a gradient score and no KL divergence: nothing is predicted"
    ]


def test_a_recipe_of_another_checkpoint_is_refused(
    swept: tuple[Path, Roots, Any], url: str, samples: Path, tmp_path: Path, roots: Roots
) -> None:
    another = save(configuration("Llama", tied=True), tmp_path / "another")
    with pytest.raises(UserError, match="is not the checkpoint that the recipe was made for"):
        check_server(url, recipe=swept[0], reference=another, samples=samples, roots=roots)
    yaml = tmp_path / "recipe.yaml"
    yaml.write_text("quant_cfg: {}\n")
    with pytest.raises(Damaged, match="cannot be read"):
        check_server(url, recipe=yaml, reference=another, samples=samples, roots=roots)
    yaml.write_text("{}")
    with pytest.raises(Damaged, match=r"is no recipe: sweep_id"):
        check_server(url, recipe=yaml, reference=another, samples=samples, roots=roots)


@pytest.mark.parametrize(
    ("wrong", "asked", "said", "remedy"),
    [
        ({"names": ("a", "b")}, {}, "has 2 models", "--model: a, b"),
        ({"names": ("a", "b")}, {"model": "c"}, "has no model 'c'", "Its models: a, b"),
        ({"names": ()}, {}, "lists no model", "Check the address"),
        ({"api": "none"}, {}, "gives no log-probabilities of a prompt", "vLLM or SGLang"),
        ({"most": 3}, {}, r"refuses: 400.*max allowed: 3", "the server's log"),
        ({"drop": 1}, {}, "at 7 positions of a prompt of 9 tokens", "cuts or rewrites prompts"),
        ({"shift": VOCABULARY}, {}, "another vocabulary: it names token", "made of the reference"),
        ({"value": float("nan")}, {}, "what it computes is broken", "the server's log"),
        ({"value": 1.0}, {}, "gives 1.0 as a log-probability", "the server's log"),
        ({"longest": 12}, {}, "sample 3 has 11 tokens and needs 13", "--max-model-len"),
        ({"body": b"<html>"}, {}, "its answer is no JSON", "Check the address"),
        ({"body": b"[]"}, {}, "its answer has another form", "Check the address"),
        ({"body": b'{"choices": []}'}, {}, "gives 0 answers to 4 prompts", "Check the address"),
    ],
)
def test_what_a_server_does_wrong_is_one_message(
    wrong: dict[str, Any],
    asked: dict[str, Any],
    said: str,
    remedy: str,
    fake: Fake,
    url: str,
    checkpoint: Path,
    samples: Path,
    roots: Roots,
) -> None:
    for name, value in wrong.items():
        setattr(fake, name, value)
    with pytest.raises(UserError, match=said) as caught:
        check_server(url, samples=samples, reference=checkpoint, roots=roots, top_k=TOP, **asked)
    assert re.search(remedy, caught.value.remedy)


def test_another_tokenizer_is_refused(
    fake: Fake, url: str, checkpoint: Path, samples: Path, roots: Roots
) -> None:
    class Shuffled:
        def decode(self, ids: list[int]) -> str:
            return f"word{ids[0]}"

    fake.tokenizer = Shuffled()
    with pytest.raises(UserError, match=r"another tokenizer: token \d+ is 'word\d+' there"):
        check_server(url, samples=samples, reference=checkpoint, roots=roots)


@pytest.mark.parametrize(
    ("address", "error", "said"),
    [
        ("http://127.0.0.1:9", TryAgain, "does not answer"),
        ("127.0.0.1", UserError, "is no address"),
        ("http://a:b", UserError, "is no address"),
    ],
)
def test_a_server_that_is_not_there(
    address: str, error: type[QsensError], said: str, checkpoint: Path, samples: Path, roots: Roots
) -> None:
    with pytest.raises(error, match=said) as caught:
        check_server(address, samples=samples, reference=checkpoint, roots=roots)
    assert address in str(caught.value)


def test_the_command(swept: tuple[Path, Roots, Any], url: str, monkeypatch: Any) -> None:
    path, roots, recipe = swept
    monkeypatch.setenv("QSENS_RESULTS", str(roots.results))
    words = ["check-server", f"{url}/v1", "--recipe", str(path), "--top-k", "3"]
    found = CliRunner().invoke(app, [*words, "--json"])
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert (said["predicted"], said["top_k"]) == (recipe["damage"], 3)
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert f"{said['divergence']:.5g}" in shown.stdout
    assert f"{said['divergence'] / recipe['damage']:.2f}" in shown.stdout
    assert f"{100 * said['outside']['reference']:.2f} % of the reference" in shown.stdout
