"""The app of the reports, made at its first request: Airflow loads plugins in every process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

_Message = MutableMapping[str, Any]
_App = Callable[
    [_Message, Callable[[], Awaitable[_Message]], Callable[[_Message], Awaitable[None]]],
    Awaitable[None],
]


class LazyApp:
    """An ASGI app that imports what it needs when somebody asks for a page."""

    def __init__(self) -> None:
        self._app: _App | None = None

    async def __call__(
        self,
        scope: _Message,
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
        """Pass a request on."""
        if self._app is None:
            from airflow.api_fastapi.core_api.security import get_user

            from qsens_airflow.pages import make_app

            self._app = make_app(get_user)
        await self._app(scope, receive, send)
