"""The audit of a plan's scores: true KL divergence of some groups against what they say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qsens.analysis.audit import choose_groups, judge
from qsens.analysis.ranking import rank
from qsens.analysis.statistic import statistic_of, value_of
from qsens.cells import CellSpec, is_named, refuse_unknown
from qsens.config.models import SIZES
from qsens.documents import dump_document
from qsens.errors import Damaged, Fault, UserError
from qsens.grid import Plan
from qsens.identity import measured_kl_version
from qsens.names import group_name, kind_of
from qsens.pipeline.shared_checkpoint import Progress, SharedCheckpoint
from qsens.reading import has_file
from qsens.results import AGAIN
from qsens.schema.audit import Audit, Point, digest_of, read_audit
from qsens.schema.manifest import GroupSensitivity, Manifest
from qsens.schema.summary import Statistic
from qsens.store import Store
from qsens.writing import write_text

if TYPE_CHECKING:
    from qsens.pipeline.measured_kl import MeasuredKL

GROUPS = 12


def audit(
    plan: Plan,
    *,
    pairs: Sequence[str] = (),
    groups: int = GROUPS,
    full: bool = False,
    progress: Progress | None = None,
    checkpoint: SharedCheckpoint | None = None,
) -> dict[str, Any]:
    """Measure the true divergence of some groups of every pair, and judge the scores by it.

    Each pair is audited at the smallest size of the plan, on the samples that were scored there. An
    audit that is there already, of as many groups, is not made again.

    Args:
        plan: The plan; its cells have been scored.
        pairs: The pairs to audit; all of the plan when not given.
        groups: Groups of each pair, see :func:`qsens.analysis.audit.choose_groups`.
        full: Whether to measure all groups instead.
        progress: Called with a phase, steps done, and steps in all.
        checkpoint: That of the plan, where other steps of this process use it as well.

    Returns:
        ``{audits: [...], missing: [{cell, reason}]}``, each audit as it is stored, with its
        ``path``.

    Raises:
        UserError: The plan has no such pair, or its scores are the truth already.
        Fault: Something went wrong in a pair; the audits of the others are there.
    """
    store = Store(plan)
    if plan.config.autoquant.method == "kl_div":
        raise UserError(
            "its scores are the true KL divergence already",
            where=f"plan {plan.plan_id}: autoquant.method = kl_div",
            remedy="Audit a plan of method gradient or fisher.",
        )
    refuse_unknown(pairs, plan.cells, where=f"plan {plan.plan_id}")
    cells = [cell for cell in audited_cells(plan) if is_named(cell, pairs)]
    manifests = _manifests(store, cells)
    missing = [
        {"cell": cell.cell, "reason": "has no result"}
        for cell in cells
        if cell.cell not in manifests
    ]
    wanted = _to_measure(store, cells, manifests, groups, full=full)
    for name in wanted:
        _set_aside(store, plan.cell(name))
    faults: list[Fault] = []
    for measured in _measure(store, wanted, progress or (lambda *_: None), checkpoint):
        faults += measured.faults.values()
        for name in measured.nats:
            cell = plan.cell(name)
            statistic, scores = _scores(manifests[name])
            points = [
                Point(
                    layer=layer,
                    kind=scores[layer].kind or kind_of(layer),
                    estimate=value_of(scores[layer], statistic),
                    standard_error=scores[layer].standard_error,
                    truth=measured.nats[name][layer],
                )
                for layer in wanted[name]
                if layer in measured.nats[name]
            ]
            made = Audit(
                cell=name,
                pair=cell.pair,
                granularity=cell.granularity,
                coverage=cell.coverage,
                modality=cell.modality,
                size=cell.size,
                cell_digest=cell.digest,
                method=plan.config.autoquant.method,
                mode="full" if full else "sample",
                samples=cell.scored,
                statistic=statistic,
                points=tuple(points),
                judgement=judge(points, in_nats=plan.config.autoquant.method == "fisher"),
                failures=measured.failures[name],
                floor=measured.floor,
                seconds=round(measured.seconds, 3),
                device=measured.device,
                measured_kl=measured_kl_version(plan.config.model.dtype),
            )
            made = made.model_copy(update={"digest": digest_of(made)})
            write_text(store.audit(cell), dump_document(made))
    if faults:
        raise faults[0]
    audits = []
    for cell in cells:
        stored = _stored(store, cell, manifests.get(cell.cell))
        if stored is not None:
            audits.append({**stored.model_dump(mode="json"), "path": str(store.audit(cell))})
    return {"audits": audits, "missing": missing}


def is_audited(plan: Plan) -> bool:
    """Return whether the audits that ``plan`` asks for are there, of all cells that have a result.

    Without torch, unlike what would make them.
    """
    mode = plan.config.autoquant.audit
    if mode == "none":
        return True
    store, cells = Store(plan), audited_cells(plan)
    manifests = _manifests(store, cells)
    return not _to_measure(store, cells, manifests, GROUPS, full=mode == "full")


def audited_cells(plan: Plan) -> list[CellSpec]:
    """Return the cells that stand for their pairs: those of the smallest size, of all data sets."""
    smallest = min((cell.size for cell in plan.cells), key=SIZES.index)
    return [cell for cell in plan.cells if cell.size == smallest and cell.domain is None]


def find_audits(store: Store, manifests: Mapping[str, Manifest] | None = None) -> list[Audit]:
    """Return the audits of a plan that are there, in its order.

    Args:
        store: Where they lie.
        manifests: Those of the cells that have a result, by cell id; read when not given.
    """
    cells = audited_cells(store.plan)
    if manifests is None:
        manifests = _manifests(store, cells)
    stored = [_stored(store, cell, manifests.get(cell.cell)) for cell in cells]
    return [audit for audit in stored if audit is not None]


def _manifests(store: Store, cells: Sequence[CellSpec]) -> dict[str, Manifest]:
    """Return the manifests of the cells that have a result, by cell id."""
    manifests = {}
    for cell in cells:
        with contextlib.suppress(Damaged):
            manifest = store.result(cell)
            if manifest is not None:
                manifests[cell.cell] = manifest
    return manifests


def _stored(store: Store, cell: CellSpec, manifest: Manifest | None) -> Audit | None:
    """Return the audit of a cell, judged by the statistic that places its groups.

    None where it is damaged, or was measured another way. Audits of ``gradient`` once took the
    score per token for their estimates; what they measured stands, and the estimates are read off
    the cell's result again.

    Args:
        store: Where it lies.
        cell: The cell.
        manifest: The cell's result, where it is there.
    """
    stored = read_audit(store.audit(cell))
    now = measured_kl_version(store.plan.config.model.dtype)
    if stored is None or stored.cell_digest != cell.digest or stored.measured_kl != now:
        return None
    if manifest is None:
        return stored
    statistic, scores = _scores(manifest)
    if stored.statistic == statistic:
        return stored
    points = tuple(
        point.model_copy(update={"estimate": value_of(scores[point.layer], statistic)})
        for point in stored.points
    )
    judged = judge(points, in_nats=stored.method == "fisher")
    stored = stored.model_copy(
        update={"statistic": statistic, "points": points, "judgement": judged}
    )
    return stored.model_copy(update={"digest": digest_of(stored)})


def _scores(manifest: Manifest) -> tuple[Statistic, dict[str, GroupSensitivity]]:
    """Return which score places the groups of a cell, and the groups by name."""
    groups = {group_name(key): group for key, group in manifest.layer_sensitivity.items()}
    return statistic_of(manifest.scheme.auto_quantize_method, groups.values()), groups


def _set_aside(store: Store, cell: CellSpec) -> None:
    """Set the audit of ``cell`` aside where it is damaged."""
    path = store.audit(cell)
    if has_file(path, remedy=AGAIN):
        audit = read_audit(path)
        if audit is None or audit.cell_digest != cell.digest:
            store.set_aside(path, f"the audit of {cell.cell}", "is not what was written")


def _to_measure(
    store: Store,
    cells: Sequence[CellSpec],
    manifests: Mapping[str, Manifest],
    groups: int,
    *,
    full: bool,
) -> dict[str, list[str]]:
    """Return the groups to measure, of cells not audited so far."""
    wanted: dict[str, list[str]] = {}
    shared: set[str] = set()
    for cell in cells:
        manifest = manifests.get(cell.cell)
        if manifest is None:
            continue
        ranked = rank(manifest).rows
        scored = [row.layer for row in ranked if row.position is not None]
        chosen = scored if full else choose_groups(ranked, groups, shared)
        shared |= set(chosen)
        known = _stored(store, cell, manifest)
        if known is not None and len(known.points) + len(known.failures) >= len(chosen):
            continue
        wanted[cell.cell] = chosen
    return wanted


def _measure(
    store: Store,
    wanted: Mapping[str, Sequence[str]],
    progress: Progress,
    checkpoint: SharedCheckpoint | None,
) -> Iterator[MeasuredKL]:
    if not wanted:
        return
    from qsens.pipeline.measured_kl import measured_kl

    with contextlib.ExitStack() as stack:
        shared = checkpoint or stack.enter_context(SharedCheckpoint(store.plan))
        yield from measured_kl(store, wanted, progress, shared)
