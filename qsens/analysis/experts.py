"""The experts of each mixture: which of them hurt most, and which saw no token."""

from __future__ import annotations

from qsens.config.base import Frozen
from qsens.names import group_name
from qsens.schema.manifest import Manifest

# Experts that a report names of each mixture.
FIRST = 3


class Expert(Frozen):
    """One expert."""

    expert: int
    """Its number, from 0."""
    sensitivity: float
    """The score of its mixture with this expert alone quantized."""
    tokens: int
    """Real tokens of the samples scored that it got."""


class Mixture(Frozen):
    """The experts of one layer."""

    layer: str
    """ModelOpt's name of the group."""
    experts: int
    """How many experts there are."""
    first: tuple[Expert, ...]
    """The most sensitive of them, at most three."""
    without_tokens: tuple[int, ...]
    """Experts that got no token of the samples scored: nothing is known of them."""


def mixtures(manifest: Manifest) -> tuple[Mixture, ...]:
    """Return the mixtures of a manifest in model order; none where it has no scores by expert."""
    made = []
    for key, row in manifest.layer_sensitivity.items():
        if row.experts is None:
            continue
        pairs = zip(row.experts.sensitivity, row.experts.tokens, strict=True)
        known = [
            Expert(expert=number, sensitivity=score, tokens=tokens)
            for number, (score, tokens) in enumerate(pairs)
            if score is not None
        ]
        known.sort(key=lambda each: (-each.sensitivity, each.expert))
        made.append(
            Mixture(
                layer=group_name(key),
                experts=len(row.experts.tokens),
                first=tuple(known[:FIRST]),
                without_tokens=tuple(row.experts.without_tokens),
            )
        )
    return tuple(made)
