"""Read ``configs/`` and overrides into a :class:`SweepConfig`; errors name their source."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from qsens.config.base import LONGEST_NAME, NAME
from qsens.config.files import read_mapping
from qsens.config.models import SweepConfig
from qsens.config.overrides import (
    CHOICES,
    COMMAND_LINE,
    SHARED,
    nest,
    parse_overrides,
    quoted,
    unknown_key,
)
from qsens.config.pairs import GranularityConfig, PairConfig
from qsens.config.roots import Roots
from qsens.errors import UserError
from qsens.reading import shown
from qsens.visible import visible

# Set in each file's own section, so that paths can start where the file lies.
_HERE = "here"


@dataclass(frozen=True)
class Loaded:
    """A validated sweep and what the reader should be told about it.

    Attributes:
        config: The sweep.
        notices: One line each: names taken from a path, experimental formats, granularities that
            a pair is left out at.
    """

    config: SweepConfig
    notices: tuple[str, ...] = ()


@dataclass
class _Sources:
    """Which file, or the command line, gave a dotted key its value."""

    layers: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def of(self, key: str) -> str:
        label: str
        parts = key.split(".")
        for label, tree in reversed(self.layers):
            node: Any = tree
            for part in parts:
                if not isinstance(node, dict) or part not in node:
                    break
                node = node[part]
            else:
                return label
        return self.of(".".join(parts[:-1])) if len(parts) > 1 else "built-in defaults"


def choices(group: str, roots: Roots | None = None) -> dict[str, Path]:
    """Return the files that can be chosen in ``group``, by name, sorted.

    Args:
        group: ``model``, ``dataset``, ``quant_pair``, ``quant_granularity``, ``runtime`` or
            ``sweep``.
        roots: Where to look; from the environment when not given.
    """
    roots = roots or Roots.from_environment()
    files: dict[str, Path] = {}
    for directory in roots.configs:
        for path in sorted((directory / group).glob("*.yaml")):
            files.setdefault(path.stem, path)
    return dict(sorted(files.items()))


def load_sweep(
    preset: str = "single", overrides: Iterable[str] = (), *, roots: Roots | None = None
) -> Loaded:
    """Read a sweep preset, apply overrides, and validate.

    Args:
        preset: Name of a file below ``configs/sweep/``.
        overrides: ``key=value`` strings; keys are dotted, lists are separated by commas.
        roots: Where to look; from the environment when not given.

    Raises:
        UserError: A key is unknown, a value is not allowed, a file cannot be read, or a granularity
            makes no sense for any of the pairs. The message names the key, what is allowed, and
            where the value came from.
    """
    roots = roots or Roots.from_environment()
    given = parse_overrides(overrides)
    sources = _Sources()
    sweep, label = _read("sweep", preset, roots, where="PRESET")
    chosen = _choose(sweep.pop("defaults", None), label, given)
    pairings = _pair(chosen, roots)

    tree: dict[str, Any] = {"preset": preset, "pairings": pairings}
    for group, (names, origin) in chosen.items():
        sections = []
        for name in names:
            section, file = _read(group, name, roots, where=f"{group} (from {origin})")
            if "name" not in section and group != "dataset":
                section["name"] = name
            sections.append(section)
            sources.layers.append((file, {group: section}))
        tree[group] = sections if CHOICES[group] else sections[0]
    sources.layers.append((label, sweep))
    nested = nest(given)
    sources.layers.append((COMMAND_LINE, nested))

    # A data set may lie beside the checkpoint, wherever that is.
    path = {"model": {"path": given["model.path"]}} if given.get("model.path") else {}
    resolved = _resolve(_over(tree, sweep, label), path, label=label)
    notices = _names_from_path(nested, given, roots)
    config = _validate(_over(resolved, nested, label), sources)
    config = _absolute(config, roots)
    notices += [
        f"{pair.name} is experimental: nobody is known to deploy it"
        for pair in config.quant_pair
        if pair.experimental
    ]
    notices += _granularity_notices(config, chosen["quant_granularity"][1], roots)
    return Loaded(config, tuple(notices))


def _choose(defaults: Any, label: str, given: dict[str, Any]) -> dict[str, tuple[list[str], str]]:
    """Say which files are chosen; takes the choices out of ``given``."""
    defaults = {} if defaults is None else defaults
    if not isinstance(defaults, dict):
        raise UserError(
            "is no mapping", where=f"defaults ({label})", remedy="Write GROUP: NAME lines."
        )
    unknown = sorted(map(str, set(defaults) - set(CHOICES)))
    if unknown:
        raise UserError(
            f"unknown key '{unknown[0]}'",
            where=f"defaults ({label})",
            remedy=f"Allowed: {', '.join(CHOICES)}.",
        )
    chosen: dict[str, tuple[list[str], str]] = {}
    for group, several in CHOICES.items():
        origin = COMMAND_LINE if group in given else label
        value = given.pop(group) if group in given else defaults.get(group)
        if value is None and group == "quant_granularity":
            value = "default"
        names = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if (
            not names
            or (len(names) > 1 and not several)
            or any(isinstance(name, dict | list) for name in names)
        ):
            needed = "at least one name" if several else "exactly one name"
            raise UserError(
                f"needs {needed}, got {shown(value)}",
                where=f"{group} ({origin})",
                remedy=f"Write {group}=NAME; `qsens plan --help` lists the presets.",
            )
        chosen[group] = ([str(name) for name in names], origin)
    return chosen


def _pair(chosen: dict[str, tuple[list[str], str]], roots: Roots) -> dict[str, tuple[str, ...]]:
    """Take granularities out of the names of pairs, into those of the sweep.

    A pair that is named without one gets those of ``quant_granularity``.

    Returns:
        The granularities of each pair; empty where no pair was named with one.
    """
    names, origin = chosen["quant_pair"]
    granularities, of_granularities = chosen["quant_granularity"]
    pairings: dict[str, tuple[str, ...]] = {}
    for name in names:
        pair, own = split_format(name, roots)
        added = granularities if own is None else [own]
        pairings[pair] = (*pairings.get(pair, ()), *added)
    if set(pairings) == set(names):
        return {}
    used = dict.fromkeys(name for own in pairings.values() for name in own)
    everything = dict.fromkeys((*granularities, *used))
    chosen["quant_pair"] = (list(pairings), origin)
    chosen["quant_granularity"] = (
        [name for name in everything if name in used],
        of_granularities,
    )
    return pairings


def split_format(name: str, roots: Roots | None = None) -> tuple[str, str | None]:
    """Return the pair and the granularity that a format's name names, ``wint8_aint8-ct_token``.

    The granularity is none where the whole name is that of a pair, or of none that there is.

    Args:
        name: The name.
        roots: Where files lie; from the environment when not given.
    """
    pairs = choices("quant_pair", roots)
    pair, separator, granularity = name.partition("-")
    if name in pairs or not separator or pair not in pairs:
        return name, None
    return pair, granularity


def _read(group: str, name: str, roots: Roots, *, where: str) -> tuple[dict[str, Any], str]:
    """Return a file's content and the label that messages give it."""
    files = choices(group, roots)
    if name not in files:
        close = difflib.get_close_matches(name, files, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UserError(
            f"unknown {group.replace('_', ' ')} '{shown(name)}'",
            where=where,
            remedy=f"Allowed: {', '.join(files)}.{hint} Files: {roots.configs[0]}/{group}/.",
        )
    path = files[name]
    data = read_mapping(path)
    if group != "sweep":
        data[_HERE] = str(path.parent)
    return data, str(path)


def _merge(*trees: dict[str, Any], label: str, resolve: bool = False) -> dict[Any, Any]:
    """Return the first tree with what the later ones say; with interpolations filled in if asked.

    Raises:
        UserError: An interpolation cannot be.
    """
    try:
        merged = OmegaConf.merge(*trees)
        data = OmegaConf.to_container(merged, resolve=resolve, throw_on_missing=resolve)
    except OmegaConfBaseException as error:
        raise UserError(
            visible(" ".join(str(error).split())),
            where=f"{getattr(error, 'full_key', None) or 'an interpolation'} ({label})",
            remedy="Mend the ${...} in the file.",
        ) from error
    except RecursionError:
        raise UserError(
            "nests too deeply", where=label, remedy="Write it with fewer levels."
        ) from None
    assert isinstance(data, dict)
    return data


def _over(tree: dict[str, Any], given: dict[str, Any], label: str) -> dict[str, Any]:
    """Return a tree with what is given over it; what is given of the data sets, over each."""
    rest = {key: value for key, value in given.items() if key != SHARED}
    merged = _merge(tree, rest, label=label)
    shared = given.get(SHARED, {})
    if isinstance(shared, dict):
        merged[SHARED] = [_merge(section, shared, label=label) for section in merged[SHARED]]
    else:  # refused when it is validated
        merged[SHARED] = shared
    return merged


def _resolve(*trees: dict[str, Any], label: str) -> dict[str, Any]:
    """Fill in the interpolations of files, then drop what only they needed."""
    data = _merge(*trees, label=label, resolve=True)
    for group, several in CHOICES.items():
        held = data[group] if several else [data[group]]
        for section in held if isinstance(held, list) else ():
            if isinstance(section, dict):  # what else it may be is refused when it is validated
                section.pop(_HERE, None)
    return {str(key): value for key, value in data.items()}


def _names_from_path(nested: dict[str, Any], given: dict[str, Any], roots: Roots) -> list[str]:
    """``model.path`` alone names another checkpoint than the model file's: take its name."""
    if "model.path" not in given or {"model.name", "model.short_name"} & set(given):
        return []
    path = Path(str(given["model.path"])).expanduser()
    name = _name_of(path if path.name not in ("", "..") else roots.resolve(path))
    nested["model"] |= {"name": name, "short_name": name}
    if not any(key.startswith("model.hub") for key in given):
        nested["model"]["hub"] = {"repository": None, "revision": "main"}
    return [f"model.name and model.short_name are '{name}', from the last part of model.path"]


def _name_of(path: Path) -> str:
    """Return a name for a directory: its last part, if that is a name.

    Where it is none, digits of its digest follow what is left of it, so that no two share one.
    """
    whole = path.name
    if len(whole) <= LONGEST_NAME and re.fullmatch(NAME, whole):
        return whole
    digits = hashlib.sha256(os.fsencode(whole or path)).hexdigest()[:8]
    plain = unicodedata.normalize("NFKD", whole).encode("ascii", "ignore").decode()
    kept = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("._-") or "model"
    return f"{kept[: LONGEST_NAME - len(digits) - 1]}-{digits}"


def _validate(tree: Any, sources: _Sources) -> SweepConfig:
    try:
        return SweepConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    if first["type"] == "extra_forbidden":
        raise unknown_key(key, _siblings(first["loc"]), sources.of(key))
    message = first["msg"].removeprefix("Value error, ")
    value = first.get("input")
    got = f", got {visible(quoted(value))}" if isinstance(value, str | int | float | bool) else ""
    raise UserError(
        f"{message}{got}",
        where=f"{key or 'sweep'} ({sources.of(key)})",
        remedy="`qsens plan --keys` lists every key with its default, unit and allowed values.",
    )


def _granularity_notices(config: SweepConfig, origin: str, roots: Roots) -> list[str]:
    """Say what is left out of the grid; refuse a granularity that makes sense for no pair."""
    notices = []
    for granularity in config.quant_granularity:
        reasons: dict[str, list[str]] = {}
        pairs = config.pairs_with(granularity)
        for pair in pairs:
            reason = pair.refusal(granularity)
            if reason is not None:
                reasons.setdefault(reason, []).append(pair.name)
                notices.append(f"{pair.name} is left out at {granularity.name}: {reason}")
            elif pair.with_granularity(granularity).experimental and not pair.experimental:
                notices.append(
                    f"{pair.name} at {granularity.name} is experimental: nobody is known to "
                    "deploy it"
                )
        if sum(map(len, reasons.values())) == len(pairs):
            said = "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
            allowed = ", ".join(_accepted(pairs, roots))
            raise UserError(
                f"{granularity.name} makes no sense for any pair of the sweep: {said}",
                where=f"quant_granularity ({origin})",
                remedy=f"Leave {granularity.name} out; allowed with these pairs: {allowed}.",
            )
    return notices


def _accepted(pairs: Sequence[PairConfig], roots: Roots) -> list[str]:
    """Return the granularities that make sense for at least one of ``pairs``."""
    accepted = []
    for name in choices("quant_granularity", roots):
        section, _ = _read("quant_granularity", name, roots, where="quant_granularity")
        section.pop(_HERE)
        try:
            granularity = GranularityConfig.model_validate({"name": name, **section})
        except ValidationError:  # its own error, whenever it is chosen
            continue
        if any(pair.refusal(granularity) is None for pair in pairs):
            accepted.append(name)
    return accepted


def _siblings(location: Sequence[int | str]) -> list[str]:
    model: Any = SweepConfig
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        arguments = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type)]
        models = [a for a in [annotation, *arguments] if isinstance(a, type)]
        model = next((a for a in models if issubclass(a, BaseModel)), model)
    return list(model.model_fields)


def _absolute(config: SweepConfig, roots: Roots) -> SweepConfig:
    """Resolve every path, so that nothing depends on a working directory later."""
    output, traces = config.runner.output_dir, config.dag.traces
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": roots.resolve(config.model.path)}),
            "dataset": tuple(
                dataset.model_copy(
                    update={
                        "directory": roots.resolve(dataset.directory),
                        "images": roots.resolve(dataset.images) if dataset.images else None,
                    }
                )
                for dataset in config.dataset
            ),
            "runner": config.runner.model_copy(
                update={"output_dir": roots.resolve(output) if output else None}
            ),
            "dag": config.dag.model_copy(
                update={
                    "traces": traces.model_copy(
                        update={
                            "prompts": roots.resolve(traces.prompts),
                            "out": roots.resolve(traces.out),
                        }
                    )
                    if traces
                    else None
                }
            ),
        }
    )
