"""The same cell by both engines on the same batches. Imports torch when it runs."""

from __future__ import annotations

from typing import Any

from qsens.analysis.agreement import agreement
from qsens.documents import dump_json
from qsens.errors import UserError
from qsens.grid import Plan
from qsens.pipeline.shared_checkpoint import Progress
from qsens.store import VERIFIED, Store
from qsens.writing import write_text

# The one score that both engines define.
METHOD = "gradient"
# What reordered sums cost: in bfloat16 the rounding of every output is part of the number.
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 1e-2}


def verify(
    plan: Plan, cell_id: str, *, tolerance: float | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Score a cell by the fused engine and by ModelOpt, and compare.

    Both score by ``gradient``: it is the score that ModelOpt defines. A plan of ``fisher`` or
    ``kl_div`` is verified by it as well, which holds what all methods rest on against ModelOpt:
    groups, calibration, quantized weights and inputs, gradients.

    Args:
        plan: The plan.
        cell_id: The cell.
        tolerance: Largest relative difference allowed; by data type when not given.
        progress: Called with a phase, steps done, and steps in all.

    Returns:
        ``{cell, method, agrees, tolerance, largest, median, spearman, worst, only_in_one, seconds,
        path}``; ``method`` is what both scored by. The same is stored at ``path``.

    Raises:
        UserError: The cell cannot be computed, or ModelOpt has no code for it on this device.
    """
    from qsens.pipeline.compute import both_engines

    if not plan.cell(cell_id).precision.by_modelopt:
        raise UserError(
            "ModelOpt does not compute its format, whose reference is compressed-tensors",
            where=f"cell {cell_id}",
            remedy="Verify a cell of ModelOpt's formats: `qsens plan wfp8_afp8` lists some.",
        )
    autoquant = plan.config.autoquant.model_copy(update={"method": METHOD})
    config = plan.config.model_copy(update={"autoquant": autoquant})
    store, cell = Store(plan.model_copy(update={"config": config})), plan.cell(cell_id)
    ours, theirs, seconds = both_engines(store, cell, progress or (lambda *_: None))
    compared = agreement(ours, theirs)
    allowed = tolerance if tolerance is not None else TOLERANCE[plan.config.model.dtype]
    path = plan.results / VERIFIED / f"{cell.digest}.json"
    result = {
        "cell": cell.cell,
        "method": METHOD,
        "agrees": compared.largest <= allowed and not compared.only_in_one,
        "tolerance": allowed,
        **compared.as_dict(),
        "seconds": seconds,
        "path": str(path),
    }
    write_text(path, dump_json(result))
    return result
