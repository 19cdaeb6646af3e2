"""The DAG's params: generated from the configuration models, and read back into overrides."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from airflow.sdk import Param
from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo

from qsens.config import Roots, SweepConfig, choices, load_sweep
from qsens.config.base import Frozen
from qsens.config.overrides import LONGEST
from qsens.config.reference import meanings
from qsens.errors import UserError

# Params that stand for one key of the configuration; a param's name is the key's last part.
AXES = {
    "model": "model",
    "dataset": "dataset",
    "quant_pair": "quant_pair",
    "size": "dataset.size",
    "quant_granularity": "quant_granularity",
    "coverage": "coverage",
}
# Keys that have a param of their own, which `overrides` must not go around.
_OWN = {key: name for name, key in AXES.items()} | {
    "runner.force": "force",
    "runner.report_only": "mode",
}
# Characters of all overrides of a run; one may have LONGEST.
MOST_OVERRIDES = 2 * LONGEST
SWEEP_ID = r"^(\d{8}T\d{9,12}Z-[0-9a-f]{8})?$"
_AS_PRESET = "Empty: as the preset says."


class SweepParams(Frozen):
    """What a run of the DAG can be given."""

    preset: str
    """Sweep preset: what a run uses wherever the params below are empty."""
    model: str | None = None
    """As ``model`` in the configuration."""
    dataset: tuple[str, ...] | None = None
    """As ``dataset`` in the configuration: one, or several, each scored apart and all together."""
    quant_pair: tuple[str, ...] | None = None
    """As ``quant_pair`` in the configuration."""
    size: tuple[str, ...] | None = None
    """As ``dataset.size`` in the configuration."""
    quant_granularity: tuple[str, ...] | None = None
    """As ``quant_granularity`` in the configuration."""
    coverage: tuple[str, ...] | None = None
    """As ``coverage`` in the configuration."""
    mode: Literal["full", "report_only"] = "full"
    """``full`` computes what is missing and publishes; ``report_only`` publishes an existing sweep
    again, from its manifests, and computes nothing."""
    force: bool = False
    """Compute again what is there already, as new results."""
    overrides: str | None = Field(default=None, max_length=MOST_OVERRIDES)
    """More of the configuration, as on the command line: ``key=value`` separated by spaces or line
    ends, for example ``autoquant.score_size=64 dataset.max_calib_samples=8``."""
    sweep: str | None = Field(default=None, pattern=SWEEP_ID)
    """With ``report_only``: id of the sweep to publish again. Empty: all published cells of the
    model."""

    @classmethod
    def read(cls, params: Mapping[str, Any]) -> SweepParams:
        """Validate the params of a run; a key that the DAG does not declare is refused.

        Raises:
            UserError: A param is unknown, has no allowed value, or contradicts another.
        """
        try:
            read = cls.model_validate(dict(params))
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                first["msg"],
                where=f"param {'.'.join(map(str, first['loc']))}",
                remedy=f"Params: {', '.join(cls.model_fields)}.",
            ) from error
        given = [name for name in (*AXES, "force") if name != "model" and getattr(read, name)]
        if read.mode == "report_only" and given:
            raise UserError(
                "has no meaning with mode=report_only, which publishes a sweep as it was planned",
                where=f"param {given[0]}",
                remedy="Leave it empty, or choose mode=full.",
            )
        if read.mode == "full" and read.sweep:
            raise UserError(
                "has no meaning with mode=full, which makes a sweep of its own",
                where="param sweep",
                remedy="Leave it empty, or choose mode=report_only.",
            )
        return read

    def as_overrides(self) -> list[str]:
        """Return the params as ``key=value`` overrides of the preset.

        Raises:
            UserError: ``overrides`` cannot be split, or names a key that has its own param.
        """
        overrides = []
        for name, key in AXES.items():
            value = getattr(self, name)
            if not value:
                continue
            names = [value] if isinstance(value, str) else list(value)
            section, name = _section(key)
            order = _literals(section.model_fields[name])
            if order:
                names.sort(key=lambda name: order.index(name) if name in order else -1)
            overrides.append(f"{key}={','.join(names)}")
        if self.force:
            overrides.append("runner.force=true")
        for override in self._extra():
            key = override.partition("=")[0].strip().lstrip("+")
            if key in _OWN:
                raise UserError(
                    "has a param of its own",
                    where=f"{key} (param overrides)",
                    remedy=f"Use the param {_OWN[key]}.",
                )
            overrides.append(override)
        return overrides

    def _extra(self) -> list[str]:
        try:
            return shlex.split(self.overrides or "")
        except ValueError as error:
            raise UserError(
                f"cannot be split: {error}",
                where="param overrides",
                remedy="Close the quotes; quote a value that holds spaces.",
            ) from error


def dag_params(preset: str, roots: Roots | None = None) -> dict[str, Param]:
    """Return the DAG's params, with choices and descriptions from the configuration.

    Args:
        preset: Default of the param ``preset``.
        roots: Where configuration files lie; from the environment when not given.
    """
    sizes = load_sweep(preset, roots=roots).config.dataset[0].sizes
    shown: dict[str, dict[str, str]] = {
        "size": {
            size: f"{size} · {count} samples" if isinstance(count, int) else f"{size} · {count}"
            for size, count in sizes.items()
        }
    }
    params = {}
    for name, field in SweepParams.model_fields.items():
        text = meanings(SweepParams)[name]
        if name == "preset":
            params[name] = Param(
                preset, description_md=text, type="string", enum=list(choices("sweep", roots))
            )
        elif name in AXES:
            params[name] = _axis(AXES[name], roots, shown.get(name, {}))
        elif isinstance(field.default, bool):
            params[name] = Param(field.default, description_md=text, type="boolean")
        elif allowed := _literals(field):
            params[name] = Param(field.default, description_md=text, type="string", enum=allowed)
        else:
            schema: dict[str, Any] = (
                {"pattern": SWEEP_ID}
                if name == "sweep"
                else {"format": "multiline", "maxLength": MOST_OVERRIDES}
            )
            params[name] = Param(None, description_md=text, type=["null", "string"], **schema)
    return params


def _axis(key: str, roots: Roots | None, shown: Mapping[str, str]) -> Param:
    """Return the param of one axis; the form offers what the configuration allows.

    Args:
        key: Dotted key of the configuration.
        roots: Where configuration files lie.
        shown: What the form shows for a value, where that is not the value itself.
    """
    section, name = _section(key)
    field = section.model_fields[name]
    allowed = _literals(field) or list(choices(key, roots))
    text = f"{meanings(section)[name]} `{key}`. {_AS_PRESET}"
    if get_origin(field.annotation) is not tuple:
        return Param(
            None,
            description_md=text,
            type=["null", "string"],
            enum=[None, *allowed],
            values_display={"null": "as the preset says"},
        )
    # The form's multi-select wants `examples`; what validates is the items' own enum.
    return Param(
        None,
        description_md=text,
        type=["null", "array"],
        items={"type": "string", "enum": allowed},
        uniqueItems=True,
        examples=allowed,
        values_display={value: shown.get(value, value) for value in allowed},
    )


def _section(key: str) -> tuple[type[BaseModel], str]:
    """Return the section of :class:`SweepConfig` that a dotted key lies in, and its name there."""
    model: type[BaseModel] = SweepConfig
    *parents, leaf = key.split(".")
    for parent in parents:
        section = model.model_fields[parent].annotation
        if get_origin(section) is tuple:
            section = get_args(section)[0]
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        model = section
    return model, leaf


def _literals(field: FieldInfo) -> list[str]:
    """Return the values of a field that is a literal, or a tuple of literals, in their order."""
    annotation = field.annotation
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    return list(get_args(annotation)) if get_origin(annotation) is Literal else []
