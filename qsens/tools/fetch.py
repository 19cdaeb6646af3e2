"""A checkpoint from a model hub: chosen files, one pinned commit, whole or not at all."""

from __future__ import annotations

import fnmatch
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from qsens.checkpoint.files import INDEX, SINGLE, read_config, weight_files, weight_map
from qsens.config import Roots, choices, load_sweep
from qsens.config.base import Frozen
from qsens.config.models import HubConfig
from qsens.errors import TryAgain, UserError
from qsens.locks import held, lock_at
from qsens.reading import MOST_BYTES, MOST_JSON, read_json, shown
from qsens.store import CHECKPOINTS, MODELS
from qsens.tools.hub import Hub, is_offline
from qsens.tools.listing import Listing, RemoteFile
from qsens.writing import make_directory, write_text

SOURCE = "qsens-source.json"
"""Written beside the weights: where a checkpoint came from."""

# Configuration, tokenizer and processor, at the repository's root; never code, never a pickle.
_NAMES = (
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
_SMALL = re.compile("|".join(map(fnmatch.translate, _NAMES)))
# Files of one checkpoint at most: the largest have two hundred.
_MOST_FILES = 1000
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
    unverified: tuple[str, ...] = ()
    """Files of which the hub listed no digest, so that nobody can tell what they should hold."""


def fetch_model(
    target: str,
    directory: Path | None = None,
    *,
    revision: str | None = None,
    allow_unverified: bool = False,
    roots: Roots | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, size: None,
) -> dict[str, Any]:
    """Make sure that a checkpoint is there, whole, at one commit.

    Args:
        target: Name of a file below ``configs/model/``, or a repository, ``owner/name``.
        directory: Where it goes; the model file's ``path`` when not given.
        revision: Branch, tag or commit; the model file's, else ``main``, when not given.
        allow_unverified: Whether files are taken of which the hub lists no digest.
        roots: Where things lie; from the environment when not given.
        progress: Is told a file's name, how many of its bytes are there, and how many it has.

    Returns:
        ``directory``, ``repository``, ``revision``, ``commit``, ``files``, ``unverified``,
        ``bytes`` and ``downloaded_bytes``.

    Raises:
        UserError: The target is unknown or closed, holds no safetensors or too much, its listing
            or index is broken, digests are missing, or the directory holds something else.
        TryAgain: The hub cannot be reached, a download was cut, or there is not enough space.
    """
    roots = roots or Roots.from_environment()
    wanted, default = _wanted(target, revision, roots)
    path = roots.resolve(directory or default)
    with held(lock_at(path.parent / f".{path.name}.lock"), where=str(path), wait=False):
        there = _read_source(path)
        if there is not None and there.repository == wanted.repository:
            enough = (there.commit, there.revision) if is_offline() else (there.commit,)
            if wanted.revision in enough:
                return _kept(path, there, allow_unverified)
        if is_offline():
            raise UserError(
                f"is not there in revision '{wanted.revision}', and HF_HUB_OFFLINE is set",
                where=str(path),
                remedy="Unset HF_HUB_OFFLINE, or copy the directory from where it was fetched.",
            )
        hub = Hub()
        listing = hub.listing(str(wanted.repository), wanted.revision)
        if there is not None and (there.repository, there.commit) == (
            listing.repository,
            listing.commit,
        ):
            return _kept(path, there, allow_unverified)
        _refuse_occupied(path, there, listing)
        return _fetch(hub, listing, path, allow_unverified, progress)


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
        path = Path(MODELS) / name / CHECKPOINTS / name
    return (hub.model_copy(update={"revision": revision}) if revision else hub), path


def _fetch(
    hub: Hub,
    listing: Listing,
    path: Path,
    allow_unverified: bool,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Download beside ``path``; what is whole is renamed to it."""
    partial = path.with_name(f".{path.name}.{listing.commit[:12]}.partial")

    def get(file: RemoteFile) -> int:
        return hub.download(
            listing, file, partial / file.name, lambda have: progress(file.name, have, file.size)
        )

    small = _small_files(listing)
    index = [listing.file(INDEX)] if INDEX in listing.entries else []
    _check_files([*small, *index], listing, allow_unverified)
    make_directory(partial)
    downloaded = sum(map(get, index))
    weights = [listing.file(name) for name in _weights(listing, partial)]
    files = [*index, *small, *weights]
    _check_files(files, listing, allow_unverified)
    _check_space(files, partial)
    downloaded += sum(map(get, sorted(files, key=lambda file: (file.size, file.name))))
    read_config(partial)
    weight_files(partial)
    _remove_others(partial, {file.name for file in files})
    source = Source(
        repository=listing.repository,
        revision=listing.revision,
        commit=listing.commit,
        files={file.name: file.size for file in sorted(files, key=lambda file: file.name)},
        unverified=tuple(_unverified(files)),
    )
    write_text(partial / SOURCE, source.model_dump_json(indent=2) + "\n")
    partial.replace(path)
    return _described(path, source, downloaded=downloaded)


def _small_files(listing: Listing) -> list[RemoteFile]:
    """Return what is no weights."""
    if "config.json" not in listing.entries:
        raise UserError(
            "has no config.json",
            where=listing.where,
            remedy="Name the repository of a whole checkpoint.",
        )
    names = [name for name in listing.entries if "/" not in name and _SMALL.fullmatch(name)]
    _check_number(len(names), listing)
    return [listing.file(name) for name in names]


def _weights(listing: Listing, directory: Path) -> list[str]:
    """Return the names of the weight files, by the index where there is one."""
    weights = [name for name in listing.entries if re.fullmatch(r"[^/]+\.safetensors", name)]
    if INDEX in listing.entries:
        try:
            shards = sorted(set(weight_map(directory / INDEX).values()))
        except UserError as error:
            raise UserError(
                f"its {INDEX} {error.what}", where=listing.where, remedy="Choose another revision."
            ) from error
        absent = next((name for name in shards if name not in listing.entries), None)
        if absent is not None:
            raise UserError(
                f"its index names {shown(absent)}, which is not there",
                where=listing.where,
                remedy="Choose another revision.",
            )
        _check_number(len(shards), listing)
        return shards
    if SINGLE in weights:
        return [SINGLE]
    if weights:
        raise UserError(
            f"holds neither {SINGLE} nor {INDEX}, but {shown(weights[0])}: transformers would not "
            "find it",
            where=listing.where,
            remedy="Choose another revision, or the repository in the layout of transformers.",
        )
    pickles = any(name.endswith((".bin", ".pt", ".pth")) for name in listing.entries)
    raise UserError(
        "holds weights as pickle only" if pickles else "holds no *.safetensors",
        where=listing.where,
        remedy="Choose a revision with safetensors; pickles are never loaded.",
    )


def _check_files(files: list[RemoteFile], listing: Listing, allow_unverified: bool) -> None:
    """Refuse what is larger than anybody reads it, and what could not be checked."""
    for file in files:
        most = MOST_JSON if file.name in (INDEX, "config.json") else MOST_BYTES
        if file.size > most and not file.name.endswith(".safetensors"):
            raise UserError(
                f"its {file.name} has {file.size} bytes, and at most {most} are read",
                where=listing.where,
                remedy="Choose another revision.",
            )
    unknown = _unverified(files)
    if unknown and not allow_unverified:
        raise UserError(
            f"the hub lists no digest of {_first(unknown)}: nobody could tell whether what comes "
            "is what was published",
            where=listing.where,
            remedy="Use a hub that lists digests, or take it as it comes with --allow-unverified.",
        )


def _check_number(count: int, listing: Listing) -> None:
    if count > _MOST_FILES:
        raise UserError(
            f"{count} of its files are those of a checkpoint, and at most {_MOST_FILES} are taken",
            where=listing.where,
            remedy="Choose another revision.",
        )


def _unverified(files: Iterable[RemoteFile]) -> list[str]:
    return sorted({file.name for file in files if not file.digest})


def _first(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} others" if len(names) > 1 else names[0]


def _remove_others(directory: Path, names: set[str]) -> None:
    """Remove what an earlier try chose, and this one does not."""
    for file in directory.iterdir():
        if file.name in names:
            continue
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink()


def _missing(file: RemoteFile, directory: Path) -> int:
    """Return the bytes of a file that are still to be downloaded."""
    for path in (directory / file.name, directory / f"{file.name}.part"):
        if path.is_file() and path.stat().st_size <= file.size:
            return file.size - path.stat().st_size
    return file.size


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
        source = Source.model_validate(read_json(path / SOURCE, remedy=""))
        whole = all((path / name).stat().st_size == size for name, size in source.files.items())
    except (OSError, UserError, ValueError):
        return None
    return source if whole else None


def _kept(path: Path, source: Source, allow_unverified: bool) -> dict[str, Any]:
    """Return what is there already, if it may be used."""
    if source.unverified and not allow_unverified:
        raise UserError(
            f"was fetched though the hub listed no digest of {_first(source.unverified)}",
            where=str(path),
            remedy="Take it as it is with --allow-unverified, or remove it and fetch it again.",
        )
    return _described(path, source, downloaded=0)


def _described(path: Path, source: Source, *, downloaded: int) -> dict[str, Any]:
    return {
        "directory": str(path),
        "repository": source.repository,
        "revision": source.revision,
        "commit": source.commit,
        "files": len(source.files),
        "unverified": len(source.unverified),
        "bytes": sum(source.files.values()),
        "downloaded_bytes": downloaded,
    }
