"""A checkpoint from a model hub: chosen files, one pinned commit, whole or not at all."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import ValidationError

from qsens.config import Roots, choices, load_sweep
from qsens.config.base import Frozen
from qsens.config.models import HubConfig
from qsens.engine.files import INDEX, SINGLE, read_config, weight_files
from qsens.errors import TryAgain, UserError
from qsens.locks import held
from qsens.pipeline.hub import Hub, Listing, RemoteFile
from qsens.writing import make_directory, write_text

SOURCE = "qsens-source.json"
"""Written beside the weights: where a checkpoint came from."""

# Configuration, tokenizer and processor, at the repository's root; never code, never a pickle.
_SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_GIB = 1 << 30
# A disk that is full to the last byte breaks other programs.
_RESERVE = _GIB


class Source(Frozen):
    """Where a checkpoint came from; ``qsens-source.json``."""

    schema_version: Literal[1] = 1
    """Version of this file's layout."""
    repository: str
    """``owner/name`` on the hub."""
    revision: str
    """The branch, tag or commit that was asked for."""
    commit: str
    """The commit that it stood for."""
    files: dict[str, int]
    """Size of every file, in bytes."""


def fetch_model(
    target: str,
    directory: Path | None = None,
    *,
    revision: str | None = None,
    roots: Roots | None = None,
) -> dict[str, Any]:
    """Make sure that a checkpoint is there, whole, at one commit.

    Args:
        target: Name of a file below ``configs/model/``, or a repository, ``owner/name``.
        directory: Where it goes; the model file's ``path`` when not given.
        revision: Branch, tag or commit; the model file's, else ``main``, when not given.
        roots: Where things lie; from the environment when not given.

    Returns:
        ``directory``, ``repository``, ``revision``, ``commit``, ``files``, ``bytes`` and
        ``downloaded_bytes``.

    Raises:
        UserError: The target is unknown or closed, holds no safetensors, or the directory holds
            something else.
        TryAgain: The hub cannot be reached, a download was cut, or there is not enough space.
    """
    roots = roots or Roots.from_environment()
    wanted, default = _wanted(target, revision, roots)
    path = roots.resolve(directory or default)
    hub = Hub()
    make_directory(path.parent)
    with held(FileLock(path.parent / f".{path.name}.lock"), where=str(path), wait=False):
        there = _read_source(path)
        if there is not None and there.repository == wanted.repository:
            enough = (there.commit, there.revision) if hub.offline else (there.commit,)
            if wanted.revision in enough:
                return _described(path, there, downloaded=0)
        if hub.offline:
            raise UserError(
                f"is not there in revision '{wanted.revision}', and HF_HUB_OFFLINE is set",
                where=str(path),
                remedy="Unset HF_HUB_OFFLINE, or copy the directory from where it was fetched.",
            )
        listing = hub.listing(str(wanted.repository), wanted.revision)
        if there is not None and (there.repository, there.commit) == (
            listing.repository,
            listing.commit,
        ):
            return _described(path, there, downloaded=0)
        _refuse_occupied(path, there, listing)
        return _fetch(hub, listing, path)


def _wanted(target: str, revision: str | None, roots: Roots) -> tuple[HubConfig, Path]:
    """Return what is asked for, and where it goes by default."""
    if "/" not in target:
        model = load_sweep("single", [f"model={target}"], roots=roots).config.model
        if model.hub.repository is None:
            known = ", ".join(name for name in choices("model", roots) if name != target)
            raise UserError(
                "its model file names no repository",
                where=f"model {target}",
                remedy=f"Add hub: {{repository: OWNER/NAME}} to it, or choose among: {known}.",
            )
        hub, path = model.hub, model.path
    else:
        name = target.rsplit("/", 1)[-1]
        try:
            hub = HubConfig(repository=target)
        except ValidationError:
            raise UserError(
                f"'{target}' is no repository's name",
                where="fetch-model",
                remedy="Write OWNER/NAME, or the name of a file below configs/model/.",
            ) from None
        path = Path("models") / name / "checkpoints" / name
    return (hub.model_copy(update={"revision": revision}) if revision else hub), path


def _fetch(hub: Hub, listing: Listing, path: Path) -> dict[str, Any]:
    """Download beside ``path``; what is whole is renamed to it."""
    partial = path.with_name(f".{path.name}.{listing.commit[:12]}.partial")
    partial.mkdir(exist_ok=True)
    downloaded = 0
    index = [listing.files[INDEX]] if INDEX in listing.files else []
    for file in index:
        downloaded += _get(hub, listing, file, partial)
    files = [*index, *_chosen(listing, partial)]
    _check_space(files, partial)
    for file in sorted(files, key=lambda file: (file.size, file.name)):
        downloaded += _get(hub, listing, file, partial)
    read_config(partial)
    weight_files(partial)
    source = Source(
        repository=listing.repository,
        revision=listing.revision,
        commit=listing.commit,
        files={file.name: file.size for file in sorted(files, key=lambda file: file.name)},
    )
    write_text(partial / SOURCE, source.model_dump_json(indent=2) + "\n")
    partial.replace(path)
    return _described(path, source, downloaded=downloaded)


def _get(hub: Hub, listing: Listing, file: RemoteFile, directory: Path) -> int:
    """Download a file where it is not there yet; return how many bytes went over the wire."""
    path = directory / file.name
    if path.is_file() and path.stat().st_size == file.size:
        return 0
    left = _missing(file, directory)
    hub.download(listing, file.name, path)
    return left


def _missing(file: RemoteFile, directory: Path) -> int:
    """Return the bytes of a file that are still to be downloaded."""
    for path in (directory / file.name, directory / f"{file.name}.part"):
        if path.is_file() and path.stat().st_size <= file.size:
            return file.size - path.stat().st_size
    return file.size


def _chosen(listing: Listing, directory: Path) -> list[RemoteFile]:
    """Return the files of the checkpoint: small ones by name, weights by the index."""
    where = f"{listing.repository} at {listing.commit[:12]}"
    if "config.json" not in listing.files:
        raise UserError(
            "has no config.json", where=where, remedy="Name the repository of a whole checkpoint."
        )
    names = [
        name
        for name in listing.files
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in _SMALL) and "/" not in name
    ]
    weights = [name for name in listing.files if re.fullmatch(r"[^/]+\.safetensors", name)]
    if INDEX in listing.files:
        try:
            content = json.loads((directory / INDEX).read_text(encoding="utf-8"))
            shards = sorted(set(content["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"its {INDEX} is broken: {error}", where=where, remedy="Choose another revision."
            ) from error
        absent = [name for name in shards if name not in weights]
        if absent:
            raise UserError(
                f"its index names {absent[0]}, which is not there",
                where=where,
                remedy="Choose another revision.",
            )
        weights = shards
    elif SINGLE in weights:
        weights = [SINGLE]
    elif weights:
        raise UserError(
            f"holds neither {SINGLE} nor {INDEX}, but {weights[0]}: transformers would not find it",
            where=where,
            remedy="Choose another revision, or the repository in the layout of transformers.",
        )
    if not weights:
        pickles = [name for name in listing.files if name.endswith((".bin", ".pt", ".pth"))]
        raise UserError(
            "holds weights as pickle only" if pickles else "holds no *.safetensors",
            where=where,
            remedy="Choose a revision with safetensors; pickles are never loaded.",
        )
    return [listing.files[name] for name in (*names, *weights)]


def _check_space(files: list[RemoteFile], directory: Path) -> None:
    needed = sum(_missing(file, directory) for file in files)
    free = shutil.disk_usage(directory).free
    if needed + _RESERVE > free:
        raise TryAgain(
            f"{needed / _GIB:.2f} GiB are still to be downloaded, and of the {free / _GIB:.2f} "
            f"GiB that are free {_RESERVE / _GIB:.0f} GiB are left alone",
            where=str(directory.parent),
            remedy="Free some space, or name a directory on another disk.",
        )


def _refuse_occupied(path: Path, there: Source | None, listing: Listing) -> None:
    if there is not None:
        raise UserError(
            f"holds {there.repository} at {there.commit[:12]}, not {listing.repository} at "
            f"{listing.commit[:12]}",
            where=str(path),
            remedy=f"Keep it with --revision {there.commit}, name another directory, or remove it.",
        )
    if path.is_dir() and any(path.iterdir()):
        raise UserError(
            "holds files that fetch-model did not write whole",
            where=str(path),
            remedy="Name another directory, or remove this one.",
        )
    if path.exists() and not path.is_dir():
        raise UserError("is no directory", where=str(path), remedy="Name a directory.")


def _read_source(path: Path) -> Source | None:
    """Return where the checkpoint came from; none if that is not said or files are not whole."""
    try:
        source = Source.model_validate_json((path / SOURCE).read_bytes())
        whole = all((path / name).stat().st_size == size for name, size in source.files.items())
    except (OSError, ValidationError):
        return None
    return source if whole else None


def _described(path: Path, source: Source, *, downloaded: int) -> dict[str, Any]:
    return {
        "directory": str(path),
        "repository": source.repository,
        "revision": source.revision,
        "commit": source.commit,
        "files": len(source.files),
        "bytes": sum(source.files.values()),
        "downloaded_bytes": downloaded,
    }
