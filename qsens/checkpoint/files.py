"""A checkpoint's files, read without torch: which of them count, what it is, its digest."""

from __future__ import annotations

import fnmatch
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from qsens.checkpoint.headers import AGAIN, Tensor, read_tensors
from qsens.checkpoint.tied import has_tied_head, is_said_to_be_tied
from qsens.checksums import CHECKSUM, digest_of, digest_opened, is_sealed, sealed
from qsens.documents import dump_json
from qsens.errors import UserError
from qsens.identity import CheckpointIdentity
from qsens.reading import MOST_BYTES, files_in, has_directory, has_file, open_file, read_json, shown
from qsens.store import set_aside
from qsens.writing import write_text

SINGLE = "model.safetensors"
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
# What a tokenizer is made from where there is no tokenizer.json.
_VOCABULARIES = ("*.model", "*.tiktoken", "vocab*", "merges*", "tekken.json")
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_GENERATION = ("generation_config.json", "video_preprocessor_config.json")
log = logging.getLogger(__name__)
# Key of config.json by which transformers is told to read another file than it would.
_NAMED = "transformers_weights"
# Names of weight files, in any case, whoever reads them.
_WEIGHTS = ("*.safetensors", "*.gguf", "pytorch_model*.bin", "consolidated*.pth")
_ADAPTER = ("adapter_config.json", "adapter_model*")
# What an import may find.
_CODE = (".py", ".pyc", ".so")


@dataclass(frozen=True)
class Weights:
    """The weight files of a checkpoint that count: those that are loaded and hashed, no others.

    Attributes:
        entry: What transformers is to read, relative to the checkpoint: the one file, or the index
            of several.
        files: The files, sorted.
        tensors: Their tensors, by name.
        beside: Names of weight files in the same directories that nobody reads, sorted.
    """

    entry: str
    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]
    beside: tuple[str, ...]


def identify(
    path: Path,
    *,
    cache: Path | None = None,
    trust_remote_code: bool = False,
    heads: Sequence[str] = (),
    dtype: str = "float32",
    check_tokenizer: Callable[[Path], None] | None = None,
) -> CheckpointIdentity:
    """Read what a checkpoint is, and hash its content.

    Args:
        path: Directory of the checkpoint.
        cache: File that keeps digests by path, size and modification time, so that several
            gigabytes are not read again every night; nothing is kept when not given.
        trust_remote_code: Whether the checkpoint's own code runs: it is hashed then.
        heads: Patterns (fnmatch) of the head's module name.
        dtype: Data type that the weights are loaded in.
        check_tokenizer: Called with ``path`` where the cache does not say that it has passed these
            very files before: parsing a vocabulary takes longer than all else here.

    Raises:
        UserError: The directory is missing, its weight files are not whole or leave open which
            of them count, or its code lies elsewhere.
    """
    config = read_config(path)
    weights = find_weights(path)
    _check_index(path / weights.entry)
    known = _read_cache(cache)
    kept = dict(known)
    code, notices = _code(path, trusted=trust_remote_code)
    files = [path / "config.json", *weights.files, *code]
    tokenizer = _tokenizer_files(path)
    processor = _present(path, PROCESSOR)
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

    def together(chosen: Sequence[Path]) -> str:
        return digest_of({file.relative_to(path).as_posix(): digests[file] for file in chosen})

    tokenizer_digest = together(tokenizer)
    if check_tokenizer is not None and f"checked|{tokenizer_digest}" not in known:
        check_tokenizer(path)
        known[f"checked|{tokenizer_digest}"] = "whole"
    tied = has_tied_head(config, weights.tensors, heads, dtype, partial(_equal, known=known))
    if cache is not None and known != kept:
        write_text(cache, dump_json(sealed(dict(sorted(known.items())))))
    if is_said_to_be_tied(config) and not tied:
        notices.append(
            "config.json ties the head to the embedding, and the files hold another head: it is "
            "loaded and scored as a weight of its own; whoever serves it must be told "
            "tie_word_embeddings=false"
        )
    if weights.beside:
        notices.append(
            f"{len(weights.beside)} weight files beside those of the checkpoint are not read, "
            f"the first is {weights.beside[0]}"
        )
    return CheckpointIdentity(
        path=path,
        digest=together(files),
        tokenizer_digest=tokenizer_digest,
        architecture=_architecture(config),
        weight_bytes=sum(file.stat().st_size for file in weights.files),
        tied_head=tied,
        processor_digest=together(processor) if processor else None,
        notices=notices,
    )


def read_config(path: Path) -> dict[str, Any]:
    """Return a checkpoint's ``config.json``.

    Raises:
        UserError: The directory or the file is missing or broken, or an adapter lies there, which
            nobody would apply.
    """
    if not has_directory(path, remedy=AGAIN):
        raise UserError(
            "the checkpoint's directory does not exist",
            where=f"model.path = {path}",
            remedy="Set model.path to a local checkpoint; `qsens demo-model` builds a small one.",
        )
    adapter = next(_matching(path, _ADAPTER), None)
    if adapter is not None:
        raise UserError(
            f"holds an adapter, {adapter.name}, which would not be scored",
            where=f"model.path = {path}",
            remedy="Merge the adapter into its base first (peft: merge_and_unload), or move it out "
            "of the directory to score the base alone.",
        )
    file = path / "config.json"
    if not has_file(file, remedy=AGAIN):
        raise UserError("has no config.json", where=str(path), remedy=AGAIN)
    config = read_json(file, remedy=AGAIN)
    if not isinstance(config, dict):
        raise UserError("is no JSON object", where=str(file), remedy=AGAIN)
    return config


def find_weights(path: Path) -> Weights:
    """Say which of a checkpoint's weight files count; each one's header is read.

    They are those that transformers reads: ``model.safetensors``, else all that
    ``model.safetensors.index.json`` names, unless ``transformers_weights`` in ``config.json`` names
    one or the other itself. Where it would leave open which are meant, nothing is read.

    Args:
        path: Directory of the checkpoint.

    Raises:
        UserError: There are none, one is missing, cut short or outside the directory, several have
            no index or lie beside one of other files, or two hold the same tensor.
    """
    entry = _entry(path)
    places = weight_map(path / entry) if entry.endswith(".json") else {}
    names = sorted(set(places.values())) or [entry]
    missing = [name for name in names if not has_file(path / name, remedy=AGAIN)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(names)} weight files are missing, first {shown(missing[0])}",
            where=str(path),
            remedy=AGAIN,
        )
    files = tuple(path / name for name in names)
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_tensors(file).items():
            if name in tensors:
                raise UserError(
                    f"two weight files hold {shown(name)}: "
                    f"{_relative(tensors[name].file, path)} and {_relative(file, path)}",
                    where=str(path),
                    remedy="Only one can be meant: save it again with save_pretrained().",
                )
            tensors[name] = tensor
    for name, place in places.items():
        if name not in tensors or tensors[name].file != path / place:
            raise UserError(
                f"says that {shown(name)} is in {shown(place)}, which does not hold it",
                where=str(path / entry),
                remedy="Get the index and the weight files of one and the same checkpoint.",
            )
    beside = {
        _relative(other, path)
        for directory in {path, *(file.parent for file in files)}
        for other in _matching(directory, _WEIGHTS)
    }
    return Weights(entry, files, tensors, tuple(sorted(beside - set(names))))


def weight_files(path: Path) -> list[Path]:
    """Return the weight files that count, sorted; see :func:`find_weights`."""
    return list(find_weights(path).files)


def weight_map(index: Path) -> dict[str, str]:
    """Return the file that an index names for each tensor: all tensors of those files are read.

    Raises:
        UserError: It is broken, or names what is no safetensors file below its directory.
    """
    held = read_json(index, remedy=AGAIN)
    places = held.get("weight_map") if isinstance(held, dict) else None
    if not isinstance(places, dict) or not places:
        raise UserError("is broken: it has no weight_map", where=str(index), remedy=AGAIN)
    for name, place in places.items():
        if not isinstance(place, str):
            raise UserError(
                f"is broken: it says that {shown(name)} is in {shown(place)}",
                where=str(index),
                remedy=AGAIN,
            )
    files = {name: _inside(place, index) for name, place in places.items()}
    strange = next(
        (name for name in sorted(files.values()) if not name.endswith(".safetensors")), None
    )
    if strange is not None:
        raise UserError(
            f"names {shown(strange)}, which is no .safetensors file",
            where=str(index),
            remedy="Save it with save_pretrained(); pickles are never loaded.",
        )
    return files


def _entry(path: Path) -> str:
    """Return the file that transformers is to read, or the index of several."""
    named = read_config(path).get(_NAMED)
    if named is not None:
        suffixes = (".safetensors", ".safetensors.index.json")
        if not isinstance(named, str) or not named.endswith(suffixes):
            raise UserError(
                f"{_NAMED} = {shown(named)} is neither a safetensors file nor the index of some",
                where=str(path / "config.json"),
                remedy=AGAIN,
            )
        if not has_file(path / _inside(named, path / "config.json"), remedy=AGAIN):
            raise UserError(
                f"{_NAMED} = {shown(named)} is not there", where=str(path), remedy=AGAIN
            )
        return named
    single, indexed = (has_file(path / name, remedy=AGAIN) for name in (SINGLE, INDEX))
    if single and indexed and set(weight_map(path / INDEX).values()) != {SINGLE}:
        raise UserError(
            f"holds {SINGLE}, and beside it {INDEX}, which names other files",
            where=str(path),
            remedy="They are weights twice, and may differ: remove those that are not meant.",
        )
    if single or indexed:
        return SINGLE if single else INDEX
    others = sorted(file.name for file in _matching(path, ("*.safetensors",)))
    if others:
        several = len(others) > 1
        raise UserError(
            f"holds {len(others)} weight files and no {INDEX}, first {shown(others[0])}"
            if several
            else f"its weights are in {shown(others[0])}, and transformers reads {SINGLE}",
            where=str(path),
            remedy="Get the index as well: it says which files belong together."
            if several
            else f"Rename it to {SINGLE} if it is the whole checkpoint.",
        )
    pickles = next(_matching(path, ("*.bin",)), None) is not None
    raise UserError(
        "holds weights as pickle (.bin) only" if pickles else "holds no *.safetensors",
        where=str(path),
        remedy="Save it with save_pretrained(); pickles are never loaded." if pickles else AGAIN,
    )


def _check_index(entry: Path) -> None:
    """Refuse an index that transformers stumbles over."""
    if entry.suffix != ".json":
        return
    if not isinstance(read_json(entry, remedy=AGAIN).get("metadata"), dict):
        raise UserError(
            "has no metadata, which transformers asks an index for",
            where=str(entry),
            remedy='Write "metadata": {} into it.',
        )


def _inside(name: str, source: Path) -> str:
    """Return a file's name relative to the checkpoint, if it does not lead out of it."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise UserError(
            f"names {shown(name)}, outside the checkpoint", where=str(source), remedy=AGAIN
        )
    return pure.as_posix()


def _tokenizer_files(path: Path) -> list[Path]:
    files = set(_present(path, _TOKENIZER))
    if path / _TOKENIZER[0] not in files:
        files |= set(_matching(path, _VOCABULARIES))
    return sorted(files)


def served_files(path: Path) -> list[Path]:
    """Return what a server reads beside weights and ``config.json``, sorted.

    Tokenizer, processor, chat template, and how to generate.
    """
    return sorted({*_tokenizer_files(path), *_present(path, (*PROCESSOR, *_GENERATION))})


def _present(path: Path, names: Sequence[str]) -> list[Path]:
    return [path / name for name in names if has_file(path / name, remedy=AGAIN)]


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    return shown(str(named[0])) if isinstance(named, list) and named else "unknown"


def _code(path: Path, *, trusted: bool) -> tuple[list[Path], list[str]]:
    """Return the checkpoint's code that may run, and a notice where it has some that does not."""
    classes = _own_classes(path)
    if not trusted:
        return [], [
            f"the checkpoint's own code does not run (auto_map: {shown(classes[0])}): "
            "transformers' class is used instead; model.trust_remote_code=true would run it"
        ] if classes else []
    elsewhere = next((name for name in classes if "--" in name), None)
    if elsewhere is not None:
        raise UserError(
            f"auto_map names code of another repository, {shown(elsewhere)}, which may change "
            "unseen",
            where=f"model.path = {path}",
            remedy="Copy that code beside the weights, and take the repository out of auto_map.",
        )
    code = (file for file in path.rglob("*") if file.suffix in _CODE and file.is_file())
    return sorted(
        file
        for file in code
        if not any(part.startswith((".", "__pycache__")) for part in file.relative_to(path).parts)
    ), []


def _own_classes(path: Path) -> list[str]:
    """Return the classes that a checkpoint's JSON files name in its own code."""
    classes = []
    for file in _present(path, ("config.json", "tokenizer_config.json", *PROCESSOR)):
        held = read_json(file, remedy=AGAIN)
        mapped = held.get("auto_map") if isinstance(held, dict) else None
        for value in mapped.values() if isinstance(mapped, dict) else ():
            classes += [str(one) for one in (value if isinstance(value, list) else [value]) if one]
    return classes


def _matching(directory: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """Return the files of a directory whose names match, in any case, sorted."""
    for file in files_in(directory, remedy=AGAIN):
        if any(fnmatch.fnmatch(file.name.lower(), one) for one in patterns):
            yield file


def _relative(file: Path, path: Path) -> str:
    return file.relative_to(path).as_posix()


def _equal(one: Tensor, other: Tensor, known: dict[str, str]) -> bool:
    """Return whether two tensors hold the same bytes."""
    a, b = (_digest(tensor.file, known, (tensor.begin, tensor.end)) for tensor in (one, other))
    return a == b


def _digest(path: Path, known: dict[str, str], part: tuple[int, int] | None = None) -> str:
    """Return the digest of a file or of some of its bytes, from ``known`` where it is there."""
    with open_file(path, remedy=AGAIN) as opened:
        stat = os.fstat(opened.fileno())
        key = f"{path}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
        if part is not None:
            key = f"{key}|{part[0]}-{part[1]}"
        if key not in known:
            known[key] = digest_opened(opened, part)
        return known[key]


def _read_cache(cache: Path | None) -> dict[str, str]:
    if cache is None or not cache.is_file():
        return {}
    try:
        data = read_json(cache, most=MOST_BYTES, remedy="")
    except UserError:
        data = None
    if isinstance(data, dict) and CHECKSUM not in data:  # from before caches had one
        return {}
    if not isinstance(data, dict) or not is_sealed(data):
        kept = set_aside(cache, "digests")
        log.warning("%s: is damaged; set aside as %s, all files are hashed again", cache, kept)
        return {}
    return {key: value for key, value in data.items() if key != CHECKSUM}
