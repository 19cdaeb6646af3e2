"""A checkpoint's files, read without torch: what it is, whether it is whole, its digest."""

from __future__ import annotations

import json
import logging
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qsens.checksums import CHECKSUM, is_sealed, sealed
from qsens.checksums import digest_file as digest_file
from qsens.documents import dump_json
from qsens.errors import UserError
from qsens.grid import CheckpointIdentity, digest_of
from qsens.store import set_aside, write_text

INDEX = "model.safetensors.index.json"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_HEADS = ("lm_head.weight", "output_layer.weight")
log = logging.getLogger(__name__)
_REMEDY = "Download the checkpoint again, or set model.path to a whole one."


def identify(path: Path, *, cache: Path | None = None) -> CheckpointIdentity:
    """Read what a checkpoint is, and hash its content.

    Args:
        path: Directory of the checkpoint.
        cache: File that keeps digests by path, size and modification time, so that several
            gigabytes are not read again every night; nothing is kept when not given.

    Raises:
        UserError: The directory is missing, holds no safetensors, or lacks a shard.
    """
    config = read_config(path)
    weights = weight_files(path)
    known = _read_cache(cache)
    files = [path / "config.json", *weights]
    tokenizer = [path / name for name in _TOKENIZER if (path / name).is_file()]
    processor = [path / name for name in PROCESSOR if (path / name).is_file()]
    if not tokenizer:
        raise UserError(
            "has no tokenizer files", where=str(path), remedy="Save the tokenizer beside it."
        )
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = dict(
            zip(
                [*files, *tokenizer, *processor],
                pool.map(lambda file: _digest(file, known), [*files, *tokenizer, *processor]),
                strict=True,
            )
        )
    if cache is not None:
        text = dump_json(sealed(dict(sorted(known.items()))))
        if not cache.is_file() or cache.read_text(encoding="utf-8") != text:
            write_text(cache, text)
    return CheckpointIdentity(
        path=path,
        digest=digest_of({file.name: digests[file] for file in files}),
        tokenizer_digest=digest_of({file.name: digests[file] for file in tokenizer}),
        architecture=str((config.get("architectures") or ["unknown"])[0]),
        weight_bytes=sum(file.stat().st_size for file in weights),
        tied_head=_has_tied_head(config, weights),
        processor_digest=digest_of({file.name: digests[file] for file in processor})
        if processor
        else None,
    )


def read_config(path: Path) -> dict[str, Any]:
    """Return a checkpoint's ``config.json``.

    Raises:
        UserError: The directory or the file is missing or broken.
    """
    if not path.is_dir():
        raise UserError(
            "the checkpoint's directory does not exist",
            where=f"model.path = {path}",
            remedy="Set model.path to a local checkpoint; `qsens demo-model` builds a small one.",
        )
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError("has no config.json", where=str(path), remedy=_REMEDY) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"is broken: {error}", where=str(file), remedy=_REMEDY) from error
    if not isinstance(config, dict):
        raise UserError("is no JSON object", where=str(file), remedy=_REMEDY)
    return config


def read_chat_template(path: Path) -> str | None:
    """Return the chat template that a checkpoint keeps in a JSON file of its own, as processors do.

    Raises:
        UserError: The file is broken.
    """
    return _template_in(path / "chat_template.json")


def check_chat_template(path: Path) -> None:
    """Refuse a checkpoint whose files hold no chat template.

    Raises:
        UserError: There is none, or a file that may hold one is broken.
    """
    if not (
        (path / "chat_template.jinja").is_file()
        or read_chat_template(path)
        or _template_in(path / "tokenizer_config.json", may_lack=True)
    ):
        raise UserError(
            "has no chat template, and the sweep reads pictures",
            where=f"model.path = {path}",
            remedy="Save its chat_template.jinja beside the weights, or use coverage=lm_only with "
            "dataset.modality=text.",
        )


def _template_in(file: Path, *, may_lack: bool = False) -> str | None:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"is broken: {error}", where=str(file), remedy=_REMEDY) from error
    template = held.get("chat_template") if isinstance(held, dict) else None
    if not template and not may_lack:
        raise UserError(
            "is broken: it has no text 'chat_template'", where=str(file), remedy=_REMEDY
        )
    return template


def weight_files(path: Path) -> list[Path]:
    """Return a checkpoint's safetensors files, sorted; each one's header has been read.

    Raises:
        UserError: There are none, one is missing, or one is cut short.
    """
    index = path / INDEX
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise UserError(f"is broken: {error}", where=str(index), remedy=_REMEDY) from error
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(names)} weight files are missing, first {missing[0]}",
                where=str(path),
                remedy=_REMEDY,
            )
        files = [path / name for name in names]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        others = sorted(file.name for file in path.glob("*.bin"))
        raise UserError(
            "holds weights as pickle (.bin) only" if others else "holds no *.safetensors",
            where=str(path),
            remedy="Save it with save_pretrained(); pickles are never loaded."
            if others
            else _REMEDY,
        )
    for file in files:
        read_header(file)
    return files


def read_header(file: Path) -> dict[str, Any]:
    """Return a safetensors header: name to ``dtype``, ``shape``, ``data_offsets``.

    Raises:
        UserError: The file is no safetensors file, or shorter than its header says.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it has {size} bytes where its header says {8 + length + end}")
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"is broken: {error}", where=str(file), remedy=_REMEDY) from error
    assert isinstance(header, dict)
    return header


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight, by name."""
    return {
        name: tuple(entry["shape"])
        for file in weight_files(path)
        for name, entry in read_header(file).items()
    }


def _has_tied_head(config: dict[str, Any], weights: list[Path]) -> bool:
    """Return whether ``config`` ties the head, or the files hold no weight for one."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    if config.get("tie_word_embeddings", inner) is True:
        return True
    return not any(name.endswith(_HEADS) for file in weights for name in read_header(file))


def _digest(path: Path, known: dict[str, str]) -> str:
    stat = path.stat()
    key = f"{path}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
    if key not in known:
        known[key] = digest_file(path)
    return known[key]


def _read_cache(cache: Path | None) -> dict[str, str]:
    if cache is None or not cache.is_file():
        return {}
    try:
        data = json.loads(cache.read_bytes())
    except ValueError:
        data = None
    if isinstance(data, dict) and CHECKSUM not in data:  # from before caches had one
        return {}
    if not isinstance(data, dict) or not is_sealed(data):
        kept = set_aside(cache, "digests")
        log.warning("%s: is damaged; set aside as %s, all files are hashed again", cache, kept)
        return {}
    return {key: value for key, value in data.items() if key != CHECKSUM}
