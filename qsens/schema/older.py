"""Manifests of the older layout, made into those of today: what they lack is unknown."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from qsens.lenient import read_leniently
from qsens.names import FUSED, depth_of, group_name, kind_of
from qsens.schema.manifest import GroupSensitivity, Layer, Manifest, Status


def of_today(data: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest of the older layout as one of today; what it lacks is unknown."""
    if data.get("schema_version", 0) > 0:
        return data
    rows = data.get("layer_sensitivity")
    if isinstance(rows, dict):
        unknown = dict.fromkeys(("costs", "importance", "rank"))
        rows = {key: unknown | row if isinstance(row, dict) else row for key, row in rows.items()}
    # The rows are read strictly: a message names what is wrong with them.
    strictly = {"layer_sensitivity": rows} if "layer_sensitivity" in data else {}
    return read_leniently(Manifest, data) | strictly


def complete(key: str, row: GroupSensitivity, layers: Mapping[str, Layer]) -> GroupSensitivity:
    """Give a row of the older layout what the newer one states."""
    name = group_name(key)
    parent, _, leaf = name.rpartition(".")
    fused = next((leaves for leaves in FUSED if leaf in leaves), (leaf,))
    members = [f"{parent}.{sibling}" for sibling in fused if f"{parent}.{sibling}" in layers]
    unquantized = row.formats[0].startswith("NONE")
    score = row.scores[0]
    status: Status = "scored"
    if unquantized:
        status = "disabled"
    elif score is None or not math.isfinite(score):
        status = "non_finite"
    elif score == 0:
        status = "no_gradient"
    bits = re.search(r"effective-bits: ([0-9]{1,3}(?:\.[0-9]+)?)\)", row.formats[0])
    return row.model_copy(
        update={
            "members": row.members or members or [name],
            "kind": kind_of(name),
            "depth": depth_of(name),
            "status": status,
            "num_bits": float(bits.group(1)) if bits else None,
            "sensitivity": score if status == "scored" else None,
            "size_cost": row.costs[0] if row.costs else None,
        }
    )
