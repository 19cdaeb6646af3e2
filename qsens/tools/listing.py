"""What a hub says that a repository holds; each entry is checked when its file is wanted."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qsens.errors import UserError
from qsens.reading import parse_json, shown

_MOST_SIZE = (1 << 63) - 1
# Bytes of a name: while it is downloaded, a suffix stands behind it.
_LONGEST = 240
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        name: Its name, in the repository's root.
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
        entries: What the hub says of each file, by name.
    """

    repository: str
    revision: str
    commit: str
    entries: Mapping[str, Mapping[str, Any]]

    @property
    def where(self) -> str:
        """What messages name."""
        return f"{self.repository} at {self.commit[:12]}"

    def file(self, name: str) -> RemoteFile:
        """Return a file of the repository's root.

        Raises:
            UserError: Its name is none that a file here can have, or its size or digest is none.
        """
        try:
            _check_name(name)
            entry = self.entries[name]
            size = entry.get("size")
            if type(size) is not int or not 0 <= size <= _MOST_SIZE:
                raise ValueError(f"the size of {shown(name)} is {shown(size)}")
            return RemoteFile(name, size, _digest(name, entry))
        except ValueError as error:
            raise UserError(
                f"its listing is broken: {error}",
                where=self.where,
                remedy="Choose another revision, or check HF_ENDPOINT: it must name a hub.",
            ) from error


def parse_listing(data: bytes, repository: str, revision: str) -> Listing:
    """Return what a hub answers to the question for a revision with its files.

    Raises:
        ValueError: It is no listing, or that of another commit than the one that was asked for.
    """
    held = parse_json(data)
    if not isinstance(held, dict):
        raise ValueError("it is no JSON object")
    commit = held.get("sha")
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise ValueError(f"its commit is {shown(commit)}")
    if _COMMIT.fullmatch(revision) and commit != revision:
        raise ValueError(f"commit {revision[:12]} was asked for, and it is of {commit[:12]}")
    siblings = held.get("siblings")
    if not isinstance(siblings, list):
        raise ValueError(f"its list of files is {shown(siblings)}")
    entries: dict[str, Mapping[str, Any]] = {}
    for sibling in siblings:
        name = sibling.get("rfilename") if isinstance(sibling, dict) else None
        if not isinstance(name, str):
            raise ValueError(f"it lists {shown(sibling)} as a file")
        if name in entries:
            raise ValueError(f"it lists {shown(name)} twice")
        entries[name] = sibling
    return Listing(repository, revision, commit, entries)


def _check_name(name: str) -> None:
    plain = name.isprintable() and not {"/", "\\"} & set(name) and name not in ("", ".", "..")
    if not plain or len(os.fsencode(name)) > _LONGEST:
        raise ValueError(f"{shown(name)} is no name of a file")


def _digest(name: str, entry: Mapping[str, Any]) -> str:
    # The blob of a large file is that of a note that stands for it.
    large, blob = entry.get("lfs"), entry.get("blobId")
    if large is None and blob is None:
        return ""
    said = blob if large is None else large.get("sha256") if isinstance(large, dict) else large
    kind, pattern = ("git", _COMMIT) if large is None else ("sha256", _SHA256)
    if not isinstance(said, str) or not pattern.fullmatch(said):
        raise ValueError(f"the digest of {shown(name)} is {shown(said)}")
    return f"{kind}:{said}"
