"""The schema of a recipe: a format for every group, and what it promises."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from qsens.config import PairConfig
from qsens.config.base import Frozen
from qsens.config.models import Size
from qsens.config.runtime import Gpu
from qsens.documents import read_document
from qsens.names import Kind
from qsens.schema.audit import Verdict

RECIPE_VERSION = 1
# Modules that a line of words names.
_LISTED = 20
Method = Literal["gradient", "fisher", "kl_div"]
DamageUnit = Literal["nats a token", "gradient score", "score of the method"]
Source = Literal["estimates", "corrected estimates", "true divergences"]


class ScoreCorrection(Frozen):
    """How the scores of a format were corrected."""

    source: Source
    """``estimates``: the scores as they are; ``corrected estimates``: divided by ``ratio``;
    ``true divergences``: what an audit of all groups measured."""
    verdict: Verdict | None = None
    """What the audit of the pair says; null where there is none."""
    ratio: float | None = None
    """Median of estimate over truth by that audit; null where it corrects nothing."""
    audit: str | None = None
    """Digest of the audit."""


class Choice(Frozen):
    """What one group becomes, or groups that are decided together."""

    groups: tuple[str, ...]
    """ModelOpt's names of the groups; one, as a rule."""
    members: tuple[str, ...]
    """Names of their modules."""
    kind: Kind
    """What the first group is in a decoder layer."""
    depth: int | None
    """Index of its layer, from 0."""
    format: str | None
    """Name of the format, a key of ``formats``; null leaves the modules at 16 bits."""
    bits: float
    """Bits a weight costs, block scales included."""
    weights: int
    """Weight elements."""
    damage: float
    """Predicted KL of these groups alone in the format; with ``gradient`` ModelOpt's score."""


class DomainPrediction(Frozen):
    """What a recipe is predicted to cost one data set, under the amax of all."""

    name: str
    """Name of the data set."""
    share: float | None
    """What it counts in the choice, a share of tokens; null where it counts by those that were
    scored, and where the worst case decided."""
    damage: float
    """Sum over the groups, in the recipe's unit, a token of it."""
    best: float
    """The same of the recipe that is best for it alone, at the same bits."""


class LeftOut(Frozen):
    """A format of the sweep that was no option."""

    format: str
    """Its name."""
    reason: str
    """Why."""
    modules: tuple[str, ...] = ()
    """The modules that it was no option for; empty where it was none for any."""

    @property
    def words(self) -> str:
        """Return all of it in one line."""
        shown = ", ".join(self.modules[:_LISTED])
        more = f", and {len(self.modules) - _LISTED} more" if len(self.modules) > _LISTED else ""
        return f"{self.format}: {self.reason}" + (f": {shown}{more}" if shown else "")


class RuntimeUse(Frozen):
    """What a recipe was chosen for."""

    name: str
    """Name of the runtime, a file under ``configs/runtime/``."""
    version: str
    """Its version there."""
    gpu: Gpu | None
    """The GPU generation; null where any may come."""
    tensor_parallel: int
    """GPUs that every layer is cut over."""

    @property
    def words(self) -> str:
        """Return all of it in one line."""
        gpu = "" if self.gpu is None else f" on {self.gpu}"
        cut = "" if self.tensor_parallel == 1 else f", cut over {self.tensor_parallel} GPUs"
        return f"{self.name} {self.version}{gpu}{cut}"


class Recipe(Frozen):
    """A format for every group that may be quantized."""

    schema_version: int = RECIPE_VERSION
    """Version of this schema."""
    sweep_id: str
    """The sweep that it was chosen from."""
    model: str
    """Directory of the model's results under ``models/``."""
    checkpoint_digest: str
    """SHA-256 over the contents of the checkpoint's configuration and weight files."""
    size: Size
    """Calibration size of the scores."""
    method: Method
    """The score: ``gradient``, ``fisher``, ``kl_div``."""
    damage_unit: DamageUnit
    """Unit of every ``damage``: nats a token are predicted KL, a gradient score is none."""
    bits_asked: float
    """Target, in bits a weight over all groups here; what stays unquantized counts 16. Where a KL
    divergence was asked for, the bits that it came to."""
    max_kl: float | None = None
    """Largest predicted KL that was asked for, nats a token: the bits are the fewest within it;
    null where bits were asked for."""
    bits: float
    """Bits a weight that the recipe comes to."""
    damage: float
    """Sum over the groups: a prediction, each group taken alone."""
    domains: tuple[DomainPrediction, ...] = ()
    """What it is predicted to cost each data set, where the sweep scored several together."""
    formats: dict[str, PairConfig]
    """The formats used, by name, as qsens defines them."""
    prices: dict[str, ScoreCorrection] = {}
    """How the scores of these formats were corrected."""
    runtime: RuntimeUse | None = None
    """What it was chosen for; null where for none in particular."""
    choices: tuple[Choice, ...]
    """What each group becomes, in model order."""
    outside: tuple[str, ...]
    """Modules outside the coverage: they stay as they are, and no bits count them."""
    left_out: tuple[LeftOut, ...] = ()
    """Formats of the sweep that were no option."""
    notices: tuple[str, ...] = ()
    """What a reader should know."""


def read_recipe(path: Path) -> Recipe:
    """Read what ``qsens recipe --to json`` wrote.

    Raises:
        Damaged: It cannot be read, or is something else.
        UserError: A newer qsens wrote it.
    """
    again = "Name a file that `qsens recipe --to json --out FILE` wrote."
    return read_document(
        Recipe, path, what="recipe", version=RECIPE_VERSION, name=again, again=again
    )
