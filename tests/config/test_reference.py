"""Every key can be listed, and says what it means."""

from __future__ import annotations

from qsens.config.reference import describe_keys


def test_every_key_has_a_meaning() -> None:
    rows = {row["key"]: row for row in describe_keys()}
    assert all(row["meaning"].endswith(".") for row in rows.values())
    assert rows["autoquant.effective_bits"]["default"] == "8.0"
    assert rows["autoquant.effective_bits"]["allowed"] == "> 0 and <= 16"
    assert rows["dataset.size"]["allowed"] == "small, medium, large"
    assert rows["runner.report_only"]["default"] == "false"
    assert {"model.path", "quant_pair", "coverage", "output_layout", "dag.pool"} <= set(rows)
