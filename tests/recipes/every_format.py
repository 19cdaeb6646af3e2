"""All pairs that come with qsens, at all granularities."""

from __future__ import annotations

from qsens.config import PairConfig, choices, load_sweep


def at_all_granularities(pairs: dict[str, PairConfig]) -> dict[str, PairConfig]:
    """Return every pair at every granularity that suits it, by the name of the format."""
    words = [f"{what}={','.join(choices(what))}" for what in ("quant_pair", "quant_granularity")]
    granularities = load_sweep("demo-text", words).config.quant_granularity
    return {
        f"{name}-{granularity.name}": pair.with_granularity(granularity)
        for name, pair in pairs.items()
        for granularity in granularities
        if pair.refusal(granularity) is None
    }
