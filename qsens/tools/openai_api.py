"""A server that speaks OpenAI's API over HTTP, such as vLLM's and SGLang's."""

from __future__ import annotations

import logging
import os
from typing import Any

import httpx

from qsens.errors import TryAgain, UserError

_TRIES = 3
_SECONDS = 600.0


class OpenAiApi:
    """Requests to one server; ``OPENAI_API_KEY`` is sent where it is set.

    Args:
        url: Its address, with or without ``/v1``.
        where: What messages name it.
        remedy: What a message asks for where the server refuses.
        again: The same where it does not answer.

    Raises:
        UserError: That is no address.
    """

    def __init__(self, url: str, *, where: str, remedy: str, again: str) -> None:
        key = os.environ.get("OPENAI_API_KEY")
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it says every request
        self.where, self._remedy, self._again = where, remedy, again
        try:
            self._client = httpx.Client(
                base_url=url.rstrip("/").removesuffix("/v1"),
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=_SECONDS,
            )
        except httpx.InvalidURL as error:
            raise self.refusal(f"is no address: {error}") from error

    def models(self) -> list[dict[str, Any]]:
        """Return the models that it lists, each with an ``id``.

        Raises:
            TryAgain: It does not answer.
            UserError: It refuses, or lists none.
        """
        given = self.json("GET", "/v1/models")
        try:
            listed = [dict(model) for model in given["data"]]
            if listed and all(isinstance(model["id"], str) for model in listed):
                return listed
        except (KeyError, TypeError, ValueError) as error:
            raise self.refusal("it lists no model") from error
        raise self.refusal("it lists no model")

    def json(self, method: str, path: str, body: Any = None) -> Any:
        """Return the JSON that it answers; a request that fails is made again.

        Raises:
            TryAgain: It does not answer.
            UserError: It refuses, or answers something else.
        """
        reason = ""
        for _ in range(_TRIES):
            try:
                answer = self._client.request(method, path, json=body)
            except httpx.UnsupportedProtocol as error:
                raise self.refusal(f"is no address: {error}") from error
            except httpx.HTTPError as error:
                reason = str(error) or type(error).__name__
                continue
            if answer.status_code >= 500:
                reason = f"{answer.status_code}: {answer.text[:200]}"
                continue
            if answer.status_code >= 400:
                raise self.refusal(f"it refuses: {answer.status_code}: {answer.text[:300]}")
            try:
                return answer.json()
            except ValueError as error:
                raise self.refusal(f"its answer is no JSON: {error}") from error
        raise TryAgain(f"does not answer: {reason}", where=self.where, remedy=self._again)

    def refusal(self, what: str, remedy: str | None = None) -> UserError:
        """Return the error that says ``what`` of the server."""
        return UserError(what, where=self.where, remedy=remedy or self._remedy)
