"""A model behind a server: what it says of the tokens of prompts, as vLLM's and SGLang's APIs do.

vLLM answers in OpenAI's completions, under ``prompt_logprobs``. SGLang's completions know tokens by
their text alone, which several tokens may share; its own ``/generate`` knows them by their ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from qsens.engine.kl.served import PromptLogprobs
from qsens.errors import UserError
from qsens.tools.openai_api import OpenAiApi

Kind: TypeAlias = Literal["vLLM", "SGLang"]
Given: TypeAlias = Mapping[int, tuple[float, str]]
"""Log-probability and text of tokens at one position."""

# What stands for a logarithm of 0: JSON has no infinity, and vLLM writes this one.
_IMPOSSIBLE = -9999.0
# Rounding may put a probability of 1 above it.
_ABOVE = 1e-3
_NONE = "gives no log-probabilities of a prompt's tokens"


class ServedModel:
    """A model of a server.

    Args:
        api: The server.
        name: What the server calls the model; its only one when not given.

    Attributes:
        name: What the server calls it.
        longest: Tokens of a prompt and its answer at most; none where the server does not say.
        kind: Whose API it is; none before the first prompt.
        texts: The server's text of the tokens that prompts held, by id.

    Raises:
        TryAgain: The server does not answer.
        UserError: It has no such model, or several and none is named.
    """

    def __init__(self, api: OpenAiApi, name: str | None) -> None:
        self._api = api
        listed = {model["id"]: model for model in api.models()}
        names = ", ".join(listed)
        if name is not None and name not in listed:
            raise api.refusal(f"has no model '{name}'", f"Its models: {names}.")
        if name is None and len(listed) > 1:
            raise api.refusal(
                f"has {len(listed)} models", f"Name one of them with --model: {names}."
            )
        self.name: str = name or next(iter(listed))
        longest = listed[self.name].get("max_model_len")
        self.longest = longest if isinstance(longest, int) else None
        self.kind: Kind | None = None
        self.texts: dict[int, str] = {}

    def logprobs(self, prompts: Sequence[Sequence[int]], top_k: int) -> list[PromptLogprobs]:
        """Return what it says of each prompt.

        Args:
            prompts: Token ids, two or more each.
            top_k: Tokens that are asked for at each position, the likeliest.

        Raises:
            TryAgain: The server does not answer.
            UserError: It refuses, or gives no log-probabilities of prompts.
        """
        answers = self._completions(prompts, top_k) if self.kind != "SGLang" else None
        if answers is None:
            answers = self._generated(prompts, top_k)
        if len(answers) != len(prompts):
            raise self._api.refusal(f"gives {len(answers)} answers to {len(prompts)} prompts")
        return [
            self._read(prompt, positions)
            for prompt, positions in zip(prompts, answers, strict=True)
        ]

    def _completions(
        self, prompts: Sequence[Sequence[int]], top_k: int
    ) -> list[Sequence[Given]] | None:
        """Return what vLLM says; none where the server leaves it out."""
        body = {
            "model": self.name,
            "prompt": list(map(list, prompts)),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": top_k,
        }
        try:
            answer = self._api.json("POST", "/v1/completions", body)
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            found = [choice.get("prompt_logprobs") for choice in choices]
            if not all(found):
                return None
            self.kind = "vLLM"
            return [list(map(_of_vllm, positions[1:])) for positions in found]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._malformed(error) from error

    def _generated(self, prompts: Sequence[Sequence[int]], top_k: int) -> list[Sequence[Given]]:
        """Return what SGLang says."""
        body = {
            "input_ids": list(map(list, prompts)),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": top_k,
            "return_text_in_logprobs": True,
        }
        try:
            answer = self._api.json("POST", "/generate", body)
        except UserError as error:
            raise self._api.refusal(
                _NONE,
                "Serve the model with vLLM or SGLang, whose APIs do: neither `prompt_logprobs` of "
                "/v1/completions nor `return_logprob` of /generate is answered here.",
            ) from error
        try:
            self.kind = "SGLang"
            return [_of_sglang(one["meta_info"]) for one in answer]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise self._malformed(error) from error

    def _read(self, prompt: Sequence[int], positions: Sequence[Given]) -> PromptLogprobs:
        """Return what is given as arrays, the prompt's own tokens first."""
        if len(positions) != len(prompt) - 1:
            raise self._api.refusal(
                f"gives log-probabilities at {len(positions)} positions of a prompt of "
                f"{len(prompt)} tokens",
                "Switch off what cuts or rewrites prompts on the way to the model.",
            )
        width = max(map(len, positions))
        ids = np.full((len(positions), width), -1, dtype=np.int64)
        logprobs = np.zeros((len(positions), width))
        for row, (own, given) in enumerate(zip(prompt[1:], positions, strict=True)):
            if own not in given:
                raise self._api.refusal(
                    f"gives no log-probability of token {own}, which the prompt holds there",
                    "Serve the checkpoint with its own tokenizer.",
                )
            order = [own, *(token for token in given if token != own)]
            ids[row, : len(order)] = order
            logprobs[row, : len(order)] = [self._number(given[token][0]) for token in order]
            self.texts[own] = given[own][1]
        return PromptLogprobs(ids, logprobs)

    def _number(self, value: float) -> float:
        if math.isnan(value) or value > _ABOVE:
            raise self._api.refusal(
                f"gives {value} as a log-probability: what it computes is broken",
                "See the server's log, and whether it serves the format of the checkpoint.",
            )
        return max(value, _IMPOSSIBLE)

    def _malformed(self, error: Exception) -> UserError:
        return self._api.refusal(f"{_NONE}: its answer has another form ({error!r})")


def _of_vllm(position: Mapping[str, Mapping[str, Any]]) -> Given:
    return {
        int(token): (float(entry["logprob"]), str(entry.get("decoded_token") or ""))
        for token, entry in position.items()
    }


def _of_sglang(answer: Mapping[str, Any]) -> Sequence[Given]:
    """Return what is said of each position, from its own token and from the likeliest ones."""
    own, likeliest = answer["input_token_logprobs"], answer["input_top_logprobs"]
    return [
        {int(token): (float(logprob), str(text or "")) for logprob, token, text in (*top, one)}
        for one, top in zip(own[1:], _lists(likeliest[1:]), strict=True)
    ]


def _lists(values: Iterable[Any]) -> list[Any]:
    return [value or [] for value in values]
