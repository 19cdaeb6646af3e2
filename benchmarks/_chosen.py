"""What a choice of formats costs on captions that nobody has seen: recipes, single pairs, ModelOpt.

A sweep by method ``fisher`` is run, audited and published; its recipe at each target is applied by
``mtq.quantize``, calibrated on the sweep's captions; so is each pair alone, and what
``mtq.auto_quantize`` chooses from the same formats at the same bits, with its loss scaled so that
its solver finds the optimum. A head tied to the embedding is quantized or kept at 16 bits by all of
them alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks._parts import Parts
from qsens.config import Roots
from qsens.config.models import Size
from qsens.data.records import Record
from qsens.engine.kl.whole import Measured
from qsens.engine.modelopt.end_to_end import MODELOPT, EndToEnd
from qsens.errors import AnswerIsNo
from qsens.grid import Plan
from qsens.pipeline.evaluate_recipe import evaluation_of
from qsens.pipeline.plan import plan_sweep
from qsens.pipeline.recipe import recipe_of
from qsens.pipeline.sweep import run_sweep
from qsens.published import read_summary
from qsens.recipes.formats import modelopt
from qsens.schema.recipe import Recipe
from qsens.schema.summary import Summary
from qsens.store import SUMMARY, Store

SIZE: Size = "medium"


class Chosen:
    """A model with a sweep of it, and whole models under mixed formats.

    Args:
        words: Overrides of the sweep: model, captions, pairs, device.
        held_out: Returns the captions to measure on, by data set.
        parts: Where what was measured is kept, and the results of the sweep.
        tied_head: Whether a tied head may be quantized; its bits count either way.
    """

    def __init__(
        self,
        words: Sequence[str],
        held_out: Callable[[Plan], Mapping[str, Sequence[Record]]],
        parts: Parts,
        *,
        tied_head: bool = True,
    ) -> None:
        here = Roots.from_environment()
        self.plan = plan_sweep(
            "single",
            [
                *words,
                f"dataset.size=small,{SIZE}",
                "autoquant.method=fisher",
                "autoquant.score_size=512",
                "autoquant.audit=sample",
            ],
            roots=Roots(
                root=here.root,
                results=(parts.directory / "results").resolve(),
                configs=here.configs,
            ),
        )
        self.pairs = {cell.pair: cell.precision for cell in self.plan.cells}
        self._held_out, self.parts = held_out, parts
        self._tied_head = tied_head
        self._prefix = "" if tied_head else "head-kept-"
        self._summary: Summary | None = None
        self._trial: EndToEnd | None = None

    @property
    def summary(self) -> Summary:
        """Return the sweep as it was published, run where it was not."""
        if self._summary is None:
            if not all(Store(self.plan).is_done(cell) for cell in self.plan.cells):
                self.parts.refuse("sweep")
            _, errors = run_sweep(self.plan)
            if errors:
                raise errors[0]
            self._summary = read_summary(Store(self.plan).sweep_dir() / SUMMARY)
        return self._summary

    @property
    def evaluation(self) -> EndToEnd:
        """Return the model with its captions, loaded where it was not."""
        if self._trial is None:
            cell = next(cell for cell in self.plan.cells if cell.size == SIZE)
            made = evaluation_of(self.plan, cell, self._held_out(self.plan), self._kept_head())
            assert isinstance(made, EndToEnd), "a second copy of the model has no room"
            self._trial = made
        return self._trial

    def floor(self) -> float | None:
        """Return what rounding to the model's own data type costs by itself, nats a token."""
        floor: float | None = self.parts.get("floor", lambda: self.evaluation.floor())
        return floor

    def _kept_head(self) -> list[str]:
        if self._tied_head:
            return []
        rows = self.summary.done[0].rows
        return [member for row in rows if row.kind == "head" for member in row.members]

    def compare(self, names: Sequence[str], bits: float) -> list[dict[str, Any]]:
        """Return what each choice from these pairs comes to at most at ``bits``, best first.

        Returns:
            What was measured, as :meth:`qsens.engine.kl.whole.Measured.numbers` gives
            it, with ``predicted``, the sum of the estimates, and ``against``: how much more loss
            than ModelOpt's choice, and the standard error of that.
        """
        choices = [self._alone(name) for name in names]
        choices = [entry for entry in choices if entry["bits"] <= bits + 1e-9]
        label = f"{len(names)}-pairs-{bits:g}"
        recipe = self.recipe(names, bits, corrected=True)
        if recipe is not None:
            choices.append(self._of_recipe("recipe", recipe))
            raw = self.recipe(names, bits, corrected=False)
            if raw is not None and _formats(raw) != _formats(recipe):
                choices.append(self._of_recipe("recipe, estimates as they are", raw))
            theirs = self.parts.get(
                f"{self._prefix}modelopt-{label}", lambda: self._modelopt(names, bits)
            )
            choices.append({**theirs, "predicted": self.predicted(theirs["formats"])})
        for entry in choices:
            if entry["name"] != MODELOPT and choices[-1]["name"] == MODELOPT:
                entry["against"] = _against(entry, choices[-1])
        return sorted(choices, key=lambda entry: float(entry["divergence"]))

    def recipe(self, names: Sequence[str], bits: float, *, corrected: bool) -> Recipe | None:
        """Return the recipe; none where the target is out of reach.

        Args:
            names: The pairs to choose from.
            bits: Bits a weight, at most.
            corrected: Whether the audits correct the estimates.
        """
        summary = self.summary if corrected else self.summary.model_copy(update={"audit": ()})
        try:
            return recipe_of(
                summary, self.plan, bits, size=SIZE, pairs=names, tied_head=self._tied_head
            )
        except AnswerIsNo:
            return None

    def predicted(self, formats: Mapping[str, str]) -> float:
        """Return the sum of the estimates of the groups in their formats, nats a token.

        Args:
            formats: Name of the pair of each module; the others stay at 16 bits.
        """
        total = 0.0
        for cell in self.summary.cells:
            if cell.size != SIZE:
                continue
            for row in cell.rows:
                if row.status == "scored" and formats.get(row.members[0]) == cell.pair:
                    total += row.sensitivity_per_token or 0.0
        return total

    def _alone(self, name: str) -> dict[str, Any]:
        pair = self.pairs[name]
        measured = self.parts.get(
            f"{self._prefix}alone-{name}",
            lambda: _kept(self.evaluation.measure(name, self.evaluation.uniform(pair))),
        )
        rows = next(cell.rows for cell in self.summary.cells if cell.pair == name)
        kept = set(self._kept_head())
        formats = {member: name for row in rows for member in row.members if member not in kept}
        return {**measured, "predicted": self.predicted(formats)}

    def _of_recipe(self, name: str, recipe: Recipe) -> dict[str, Any]:
        formats = _formats(recipe)
        digest = hashlib.sha256(repr(sorted(formats.items())).encode()).hexdigest()[:8]
        measured = self.parts.get(
            f"{self._prefix}recipe-{recipe.bits_asked:g}-{digest}",
            lambda: _kept(self.evaluation.measure(name, modelopt.config(recipe))),
        )
        return {
            **measured,
            "name": name,
            "predicted": self.predicted(formats),
            "sum": recipe.damage,
        }

    def _modelopt(self, names: Sequence[str], bits: float) -> dict[str, Any]:
        state = self.parts.directory / f"{self._prefix}modelopt-{len(names)}-pairs.pt"
        pairs = [self.pairs[name] for name in names]
        measured = self.evaluation.auto_quantize(pairs, bits, state)
        return {**_kept(measured), "formats": measured.formats}


def _formats(recipe: Recipe) -> dict[str, str]:
    """Return the name of the format of each module that gets one."""
    return {
        member: choice.format
        for choice in recipe.choices
        if choice.format is not None
        for member in choice.members
    }


def _kept(measured: Measured) -> dict[str, Any]:
    """Return what was measured as JSON can hold it, the captions included."""
    captions = {"by_caption": measured.by_caption.tolist(), "labels": measured.labels.tolist()}
    return {**measured.numbers(), **captions}


def _against(entry: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    one, two = (
        Measured(
            name="",
            bits=0.0,
            loss=0.0,
            divergence=0.0,
            scored=None,
            predicted=None,
            by_caption=np.array(each["by_caption"]),
            labels=np.array(each["labels"]),
        )
        for each in (entry, other)
    )
    return one.against(two)
