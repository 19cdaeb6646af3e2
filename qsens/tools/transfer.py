"""One body over HTTP within bounds: no byte too many, no longer than it may take, as it is.

The answers may come from anybody. None is decompressed, since a few bytes may become gigabytes;
what answers that redirect hold is not read; a body is read piece by piece.
"""

from __future__ import annotations

import asyncio
import functools
import re
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import BinaryIO

import httpx

# Bytes that must come in the time that a transfer may stand still.
_LEAST = 1 << 16
# After so many more than ever before, an interruption is the first one again.
_STRETCH = 1 << 24
_TRIES = 3
_PAUSE = 0.5
_REDIRECTS = 5
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_LENGTH = re.compile(r"[0-9]{1,19}")
_RANGE = re.compile(r"bytes ([0-9]{1,19})-[0-9]{1,19}/([0-9]{1,19}|\*)")


class Refused(Exception):
    """The answer is neither the body nor a redirect.

    Attributes:
        status: Its status.
        headers: Its headers.
    """

    def __init__(self, answer: httpx.Response) -> None:
        super().__init__(answer.status_code)
        self.status = answer.status_code
        self.headers = answer.headers

    @property
    def is_busy(self) -> bool:
        """Whether another try may be answered otherwise."""
        return self.status in _BUSY


class Cut(Exception):
    """The body ended early, or cannot be gone on with from where it was cut."""


class Mismatch(Exception):
    """The body has another length than it must have."""


class Unfit(Exception):
    """An answer that is not followed or read; no other try changes that."""


_PASSING = (
    Cut,
    Refused,
    TimeoutError,
    ssl.SSLError,
    httpx.NetworkError,
    httpx.RemoteProtocolError,
)


@dataclass
class Target:
    """Where a body is written.

    Attributes:
        file: Opened for writing, at its end.
        size: Bytes of the whole body; at most so many where ``exact`` is false.
        exact: Whether fewer are not the whole.
        have: Bytes that are there from an earlier try.
        resumable: Whether a body that was cut is gone on with, or begun again.
        came: Is told how many bytes are there.
        received: Bytes that came over the wire.
    """

    file: BinaryIO
    size: int
    exact: bool = True
    have: int = 0
    resumable: bool = True
    came: Callable[[int], None] = field(default=lambda have: None)
    received: int = 0

    def restart(self) -> None:
        """Take away what is there."""
        self.file.seek(0)
        self.file.truncate()
        self.have = 0

    def add(self, piece: bytes) -> None:
        """Write a piece.

        Raises:
            Mismatch: It is more than may come; what came before it is taken away, too.
        """
        self.received += len(piece)
        if len(piece) > self.size - self.have:
            self.restart()
            raise Mismatch(f"more than {self.size} bytes come")
        self.file.write(piece)
        self.file.flush()
        self.have += len(piece)
        self.came(self.have)


def receive(address: str, target: Target, *, headers: Mapping[str, str], seconds: float) -> None:
    """Get what is at an address; what was cut is gone on with, a few times.

    Args:
        address: The address, ``http`` or ``https``.
        target: Where the body is written.
        headers: Of the request; ``authorization`` goes to the host of ``address`` alone.
        seconds: How long connecting, redirects and the first 64 KiB may take together, and how
            long each 64 KiB after them.

    Raises:
        Refused: The answer is something else.
        Cut: Fewer bytes came, time and again.
        Mismatch: More would come, or another number than ``target.size`` is announced.
        Unfit: It is encoded, or redirected too often or to where nobody should follow.
        TimeoutError: It takes too long.
        httpx.TransportError: The connection failed.
    """
    asyncio.run(_receive(address, target, headers, seconds))


async def _receive(
    address: str, target: Target, headers: Mapping[str, str], seconds: float
) -> None:
    now = asyncio.get_running_loop().time
    async with _client(headers) as client:
        failures, most = 0, target.have
        deadline = now() + seconds
        while True:
            try:
                async with asyncio.timeout_at(deadline) as limit:
                    await _attempt(
                        client, address, target, lambda: limit.reschedule(now() + seconds)
                    )
                    return
            except _PASSING as error:
                deadline = limit.when() or deadline
                failures += 1
                if isinstance(error, Refused) and not error.is_busy:
                    raise
                if target.have - most >= _STRETCH:
                    failures, most = 0, target.have
                    deadline = now() + seconds
                elif isinstance(error, TimeoutError) or failures == _TRIES:
                    raise
            await asyncio.sleep(_PAUSE)


async def _attempt(
    client: httpx.AsyncClient, address: str, target: Target, moves: Callable[[], None]
) -> None:
    if not target.resumable:
        target.restart()
    asked = target.have
    async with _answer(client, address, asked) as answer:
        goes_on = asked > 0 and answer.status_code == httpx.codes.PARTIAL_CONTENT
        part = _RANGE.fullmatch(answer.headers.get("content-range", "")) if goes_on else None
        elsewhere = goes_on and (part is None or int(part[1]) != asked)
        nowhere = asked and answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE
        if elsewhere or nowhere:
            target.restart()
            raise Cut("it does not go on from where it was cut")
        if not goes_on and answer.status_code != httpx.codes.OK:
            raise Refused(answer)
        _check(answer, part[2] if part else answer.headers.get("content-length", ""), target)
        if not goes_on:
            target.restart()
        since = 0
        async for piece in answer.aiter_raw():
            target.add(piece)
            since += len(piece)
            if since >= _LEAST:
                since = 0
                moves()
    if target.exact and target.have < target.size:
        raise Cut(f"{target.have} of {target.size} bytes came")


@asynccontextmanager
async def _answer(
    client: httpx.AsyncClient, address: str, start: int
) -> AsyncIterator[httpx.Response]:
    """Follow redirects; their bodies, which may be long, are left unread."""
    request = client.build_request(
        "GET", address, headers={"range": f"bytes={start}-"} if start else {}
    )
    for _ in range(_REDIRECTS + 1):
        try:
            answer = await client.send(request, stream=True)
        except (ValueError, httpx.InvalidURL, httpx.UnsupportedProtocol):
            raise Unfit("it leads to an address that nobody can ask") from None
        try:
            following = answer.next_request
            if following is None:
                yield answer
                return
        finally:
            await answer.aclose()
        refuse_redirect(request.url, following.url)
        request = following
    raise Unfit(f"it redirects more than {_REDIRECTS} times")


def refuse_redirect(source: httpx.URL, target: httpx.URL) -> None:
    """Refuse a redirect to no address of HTTP, or from an encrypted connection to a plain one.

    Raises:
        Unfit: It is one.
    """
    if target.scheme not in ("http", "https"):
        raise Unfit("it redirects to something else than HTTP")
    if not is_address(target):
        raise Unfit("it leads to an address that nobody can ask")
    if source.scheme == "https" and target.scheme == "http":
        raise Unfit("it redirects to a connection that is not encrypted")


def is_address(url: httpx.URL) -> bool:
    """Return whether a connection can be tried."""
    return url.scheme in ("http", "https") and bool(url.host) and 0 < (url.port or 1) < 1 << 16


def _check(answer: httpx.Response, total: str, target: Target) -> None:
    """Refuse what cannot be the whole, before anything of it is read."""
    # Not even gzip: such a body has another length, and no bounds.
    if answer.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise Unfit("its answer is compressed, and that was not asked for")
    if _LENGTH.fullmatch(total):
        size = int(total)
        if size > target.size or (target.exact and size < target.size):
            raise Mismatch(f"{size} bytes come")


def _client(headers: Mapping[str, str]) -> httpx.AsyncClient:
    try:
        return httpx.AsyncClient(
            headers={**headers, "accept-encoding": "identity"},
            verify=_certificates(),
            timeout=None,  # the whole attempt has one
            follow_redirects=False,
        )
    except (ImportError, OSError, ValueError, httpx.InvalidURL):
        # Not "from": the address of a proxy may hold a password.
        raise Unfit("the environment names a proxy or certificates that cannot be used") from None


@functools.cache
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context()
