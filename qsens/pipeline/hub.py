"""A model hub over HTTP: what a repository holds, and its files, resumed where they were cut.

The token is that of ``HF_TOKEN`` or of an earlier login. It goes to the hub's own host alone, and
into no message: errors say a status and a host, never an address, which may be signed.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get

from qsens import __version__
from qsens.errors import QsensError, TryAgain, UserError

# What a file of ours may answer, and no connection.
_LOCAL = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
_MAY_PASS = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        name: Its name, relative to the repository's root.
        size: Its size in bytes.
        digest: ``sha256:`` of its content, or ``git:`` of its blob; empty where the hub says none.
    """

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Listing:
    """A repository at one commit.

    Attributes:
        repository: ``owner/name``.
        revision: The branch, tag or commit that was asked for.
        commit: What it stands for, 40 hex digits.
        files: All files, by name.
    """

    repository: str
    revision: str
    commit: str
    files: dict[str, RemoteFile]


class Hub:
    """The hub that ``HF_ENDPOINT`` names."""

    def __init__(self) -> None:
        # Both write addresses, and the one of a redirect may carry a signature.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        self._token = get_token()
        self._api = HfApi(token=self._token or False, library_name="qsens")
        self.host = _host(self._api.endpoint)

    @property
    def offline(self) -> bool:
        """Whether ``HF_HUB_OFFLINE`` forbids every request."""
        return bool(constants.HF_HUB_OFFLINE)

    def listing(self, repository: str, revision: str) -> Listing:
        """Return what a repository holds.

        Raises:
            UserError: There is no such repository or revision, or it is closed to this token.
            TryAgain: The hub cannot be reached, or answers that it is busy.
        """
        with self._said(repository, revision):
            info = self._api.model_info(repository, revision=revision, files_metadata=True)
            if not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)):
                raise ValueError("no commit")
        files = {}
        for sibling in info.siblings or []:
            digest = f"git:{sibling.blob_id}" if sibling.blob_id else ""
            if sibling.lfs is not None:
                digest = f"sha256:{sibling.lfs.sha256}"
            files[sibling.rfilename] = RemoteFile(sibling.rfilename, sibling.size or 0, digest)
        return Listing(repository, revision, str(info.sha), files)

    def download(self, listing: Listing, name: str, path: Path) -> None:
        """Get a file to ``path``, from where an earlier try was cut; its digest is checked.

        Raises:
            UserError: The file is closed to this token.
            TryAgain: The connection was cut, the disk is full, or the content is not that of the
                digest; then it is taken away again.
        """
        file = listing.files[name]
        part = path.with_name(f"{path.name}.part")
        have = part.stat().st_size if part.is_file() else 0
        if have > file.size:
            have = 0
        # A compressed answer has another length, and cannot be resumed.
        headers = {"user-agent": f"qsens/{__version__}", "accept-encoding": "identity"}
        if self._token:
            headers["authorization"] = f"Bearer {self._token}"
        with (
            self._said(listing.repository, listing.revision, name),
            part.open("r+b" if have else "wb") as opened,
        ):
            opened.seek(have)
            if have < file.size:
                http_get(
                    hf_hub_url(
                        listing.repository,
                        name,
                        revision=listing.commit,
                        endpoint=self._api.endpoint,
                    ),
                    opened,
                    resume_size=have,
                    headers=headers,
                    expected_size=file.size,
                    displayed_filename=name,
                )
        if file.digest and digest_like(part, file.digest) != file.digest:
            part.unlink()
            raise TryAgain(
                f"the content of {name} is not what the hub lists",
                where=f"{listing.repository} at {listing.commit[:12]}",
                remedy="Run it again: only this file is downloaded anew.",
            )
        part.replace(path)

    @contextmanager
    def _said(self, repository: str, revision: str, name: str = "") -> Iterator[None]:
        """Say what the hub refused in one message, without addresses or headers."""
        try:
            yield
        except (
            httpx.HTTPError,
            httpx.InvalidURL,
            OfflineModeIsEnabled,
            OSError,
            ValueError,
            TypeError,
        ) as error:
            where = f"{repository} on {self.host}" + (f", {name}" if name else "")
            # Not "from error": a chained traceback would show addresses.
            raise self._translated(error, where, revision) from None

    def _translated(self, error: Exception, where: str, revision: str) -> QsensError:
        sent = "the token that was sent does not open it" if self._token else "no token was sent"
        if isinstance(error, HFValidationError):
            return UserError(
                "is no repository's name", where=where, remedy="Write OWNER/NAME, as the hub does."
            )
        if isinstance(error, UnicodeEncodeError):
            return UserError(
                "the token holds characters that cannot be sent",
                where=where,
                remedy="Set HF_TOKEN to the token alone, without line ends or quotes.",
            )
        if isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL):
            return UserError(
                "HF_ENDPOINT is no address of a hub",
                where=where,
                remedy="Set it to an address that begins with https://, or unset it.",
            )
        if isinstance(error, ValueError | TypeError):
            return UserError(
                "its answer is not that of a hub",
                where=where,
                remedy="Check HF_ENDPOINT: it must name a hub.",
            )
        if isinstance(error, RevisionNotFoundError):
            return UserError(
                f"has no revision '{revision}'",
                where=where,
                remedy="Name a branch, a tag or a commit of it with --revision.",
            )
        if isinstance(error, GatedRepoError):
            return UserError(
                f"asks for its owner's consent, and {sent}",
                where=where,
                remedy="Accept its terms on the hub, then set HF_TOKEN to a token of that account.",
            )
        if isinstance(error, RepositoryNotFoundError):
            return UserError(
                f"does not exist, or is private, and {sent}",
                where=where,
                remedy="Check the name; for a private repository set HF_TOKEN.",
            )
        if isinstance(error, HfHubHTTPError | httpx.HTTPStatusError):
            status = error.response.status_code
            if status in (401, 403):
                return UserError(
                    f"the hub refuses it (status {status}), and {sent}",
                    where=where,
                    remedy="Set HF_TOKEN to a token that may read this repository.",
                )
            if status in _MAY_PASS:
                return _try_again(f"the hub answers with status {status}", where)
            return UserError(
                f"the hub answers with status {status}",
                where=where,
                remedy="Check HF_ENDPOINT: it must name a hub.",
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return TryAgain(
                "no space left on the disk",
                where=where,
                remedy="Free some space, then run it again: what was downloaded is kept.",
            )
        if isinstance(error, OSError) and error.errno in _LOCAL:
            return UserError(
                f"the directory cannot be written to: {error.strerror}",
                where=where,
                remedy="Name another directory.",
            )
        return _try_again(f"the connection failed ({type(error).__name__})", where)


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


def _try_again(what: str, where: str) -> TryAgain:
    return TryAgain(
        what, where=where, remedy="Run it again: it goes on from where it was interrupted."
    )


def _host(endpoint: str) -> str:
    """Return an endpoint's host and port, without what may be a password."""
    parts = urlsplit(endpoint)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)
