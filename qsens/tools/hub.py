"""A model hub over HTTP: what a repository holds, and its files, resumed where they were cut.

The token is that of ``HF_TOKEN`` or of an earlier login. It goes to the hub's own host alone, and
into no message: errors say a status and a host, never an address, which may be signed.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import httpx
from huggingface_hub import constants, get_token

from qsens import __version__
from qsens.errors import DiskFull, QsensError, TryAgain, UserError
from qsens.reading import MOST_JSON, may_pass
from qsens.tools.listing import Listing, RemoteFile, parse_listing
from qsens.tools.transfer import Cut, Mismatch, Refused, Target, Unfit, is_address, receive

_CHECK = "Check HF_ENDPOINT: it must name a hub."


def is_offline() -> bool:
    """Return whether ``HF_HUB_OFFLINE`` forbids every request."""
    return bool(constants.HF_HUB_OFFLINE)


class Hub:
    """The hub that ``HF_ENDPOINT`` names.

    Raises:
        UserError: That is no address, or the token cannot be read or sent.
    """

    def __init__(self) -> None:
        # Both write addresses, and the one of a redirect may carry a signature.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        self._endpoint = constants.ENDPOINT
        self.host = _host(self._endpoint)
        self._token = _token()
        self._seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT

    def listing(self, repository: str, revision: str) -> Listing:
        """Return what a repository holds.

        Raises:
            UserError: There is no such repository or revision, it is closed to this token, or the
                answer is not that of a hub.
            TryAgain: The hub cannot be reached, takes too long, or answers that it is busy.
        """
        where = f"{repository} on {self.host}"
        body = io.BytesIO()
        with self._said(where, revision):
            self._receive(
                f"api/models/{repository}/revision/{_quoted(revision)}?blobs=true",
                Target(body, MOST_JSON, exact=False, resumable=False),
            )
        try:
            return parse_listing(body.getvalue(), repository, revision)
        except ValueError as error:
            raise UserError(
                f"its answer is not that of a hub: {error}", where=where, remedy=_CHECK
            ) from error

    def download(
        self,
        listing: Listing,
        file: RemoteFile,
        path: Path,
        came: Callable[[int], None] = lambda have: None,
    ) -> int:
        """Get a file to ``path``, from where an earlier try was cut; its digest is checked.

        One without a digest is begun anew: nobody could tell whether what is there belongs to it.

        Args:
            listing: Its repository.
            file: The file; no more than its size is written.
            path: Where it goes; one that is there and is as listed is kept.
            came: Is told how many bytes are there.

        Returns:
            How many bytes came over the wire.

        Raises:
            UserError: The file is closed to this token, or the answer is none that may be read.
            TryAgain: The connection was cut, the hub takes too long, the disk is full, or the
                content is not what is listed; then it is taken away again.
        """
        where = f"{listing.repository} on {self.host}, {file.name}"
        part = path.with_name(f"{path.name}.part")
        with self._said(where, listing.revision):
            if _is(path, file):
                return 0
            have = _kept(part, file)
            with part.open("r+b" if have else "xb") as opened:
                opened.seek(have)
                target = Target(
                    opened, file.size, have=have, resumable=bool(file.digest), came=came
                )
                if have < file.size:
                    self._receive(
                        f"{listing.repository}/resolve/{listing.commit}/{_quoted(file.name)}",
                        target,
                    )
            if not _is(part, file):
                part.unlink()
                raise TryAgain(
                    f"the content of {file.name} is not what the hub lists",
                    where=listing.where,
                    remedy="Run it again: only this file is downloaded anew.",
                )
            part.replace(path)
        return target.received

    def _receive(self, path: str, target: Target) -> None:
        headers = {"user-agent": f"qsens/{__version__}"}
        if self._token:
            headers["authorization"] = f"Bearer {self._token}"
        receive(f"{self._endpoint}/{path}", target, headers=headers, seconds=self._seconds)

    @contextmanager
    def _said(self, where: str, revision: str) -> Iterator[None]:
        """Say what went wrong in one message, without addresses or headers."""
        try:
            yield
        except Refused as error:
            # Not "from error", here and below: a chained traceback would show addresses.
            raise self._refusal(error, where, revision) from None
        except Unfit as error:
            raise UserError(
                str(error),
                where=where,
                remedy="Check HF_ENDPOINT, and the proxies on the way to it.",
            ) from None
        except Mismatch as error:
            raise TryAgain(
                f"{error}, and that is not what the hub lists",
                where=where,
                remedy=f"Run it again: none of them are kept. {_CHECK}",
            ) from None
        except Cut as error:
            raise _try_again(f"the connection was cut: {error}", where) from None
        except TimeoutError:
            raise _try_again(
                f"the hub is too slow: less than 64 KiB came in {self._seconds} s", where
            ) from None
        except (httpx.HTTPError, ssl.SSLError) as error:
            raise _try_again(f"the connection failed ({type(error).__name__})", where) from None
        except OSError as error:
            raise _local(error, where) from None

    def _refusal(self, error: Refused, where: str, revision: str) -> QsensError:
        sent = "the token that was sent does not open it" if self._token else "no token was sent"
        status, code = error.status, error.headers.get("x-error-code")
        if error.is_busy:
            return _try_again(f"the hub answers with status {status}", where)
        if code == "RevisionNotFound":
            return UserError(
                f"has no revision '{revision}'",
                where=where,
                remedy="Name a branch, a tag or a commit of it with --revision.",
            )
        if code == "GatedRepo":
            return UserError(
                f"asks for its owner's consent, and {sent}",
                where=where,
                remedy="Accept its terms on the hub, then set HF_TOKEN to a token of that account.",
            )
        # Who may not see a repository is told that there is none.
        if code == "RepoNotFound" or status == httpx.codes.UNAUTHORIZED:
            return UserError(
                f"does not exist, or is private, and {sent}",
                where=where,
                remedy="Check the name; for a private repository set HF_TOKEN.",
            )
        if status == httpx.codes.FORBIDDEN:
            return UserError(
                f"the hub refuses it (status {status}), and {sent}",
                where=where,
                remedy="Set HF_TOKEN to a token that may read this repository.",
            )
        return UserError(f"the hub answers with status {status}", where=where, remedy=_CHECK)


def digest_like(path: Path, digest: str) -> str:
    """Return the digest of a file's content, of the same kind as ``digest``."""
    kind = digest.partition(":")[0]
    running = hashlib.sha256()
    if kind == "git":
        # A git blob's name; no protection against malice, which the hub's own answer could not be.
        running = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as opened:
        while block := opened.read(1 << 22):
            running.update(block)
    return f"{kind}:{running.hexdigest()}"


def _is(path: Path, file: RemoteFile) -> bool:
    """Return whether a file is what the hub lists, as far as that says."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    return not file.digest or digest_like(path, file.digest) == file.digest


def _kept(part: Path, file: RemoteFile) -> int:
    """Return how many bytes of an earlier try are gone on from; anything else is taken away."""
    have = part.stat().st_size if part.is_file() else 0
    if file.digest and 0 < have <= file.size:
        return have
    part.unlink(missing_ok=True)
    return 0


def _try_again(what: str, where: str) -> TryAgain:
    return TryAgain(
        what, where=where, remedy="Run it again: it goes on from where it was interrupted."
    )


def _local(error: OSError, where: str) -> QsensError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            "no space left on the disk",
            where=where,
            remedy="Free some space, then run it again: what was downloaded is kept.",
        )
    what = f"the directory cannot be written to: {error.strerror}"
    if may_pass(error):
        return TryAgain(what, where=where, remedy="Try again; look after the disk if it stays.")
    return UserError(what, where=where, remedy="Name another directory.")


def _quoted(text: str) -> str:
    # What no text is goes as it came: the hub does not know it.
    return quote(text.encode("utf-8", "surrogatepass"), safe="")


def _token() -> str | None:
    try:
        token = get_token()
    except (OSError, ValueError):  # not "from": it may show what is in the file
        raise UserError(
            "cannot be read",
            where=f"the token of an earlier login, {constants.HF_TOKEN_PATH}",
            remedy="Set HF_TOKEN, or log in again.",
        ) from None
    if token and not (token.isascii() and token.isprintable()):
        raise UserError(
            "the token holds characters that cannot be sent",
            where="HF_TOKEN",
            remedy="Set HF_TOKEN to the token alone, without line ends or quotes.",
        )
    return token


def _host(endpoint: str) -> str:
    """Return an endpoint's host and port, without what may be a password."""
    try:
        url = httpx.URL(endpoint)
    except httpx.InvalidURL:
        url = httpx.URL()
    if not is_address(url):
        raise UserError(
            "HF_ENDPOINT is no address of a hub",
            where="fetch-model",
            remedy="Set it to an address that begins with https://, or unset it.",
        )
    return f"{url.host}:{url.port}" if url.port else url.host
