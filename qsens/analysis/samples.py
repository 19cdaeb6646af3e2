"""Scores of every sample, read from the state file beside a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from qsens.errors import Damaged

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SampleScores:
    """What each sample adds to each group's score.

    Attributes:
        groups: Names of the groups.
        scores: ``(groups, samples)``, float64: ``s_i`` with method ``gradient``, else nats.
        tokens: ``(samples,)``, float64: label tokens with method ``gradient`` or with pictures,
            else real tokens.
    """

    groups: tuple[str, ...]
    scores: Floats
    tokens: Floats

    @property
    def count(self) -> int:
        """Return the number of samples."""
        return int(self.tokens.shape[0])

    def per_token(self) -> Floats:
        """Return ``sum_i s_i / sum_i T_i`` of each group."""
        total: Floats = self.scores.sum(axis=1) / self.tokens.sum()
        return total

    def take(self, groups: Sequence[str]) -> SampleScores:
        """Return the same for ``groups``, in that order."""
        at = {name: index for index, name in enumerate(self.groups)}
        rows = [at[name] for name in groups]
        return SampleScores(tuple(groups), self.scores[rows], self.tokens)


def read_samples(path: Path, method: str) -> SampleScores | None:
    """Read the groups with finite scores; none where the engine kept no score of every sample.

    Args:
        path: ``<scheme>_autoquant_state.safetensors``.
        method: The score's method: it says what a token is.

    Raises:
        Damaged: The file cannot be read, or contradicts itself.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if not {"per_sample", "label_tokens"} <= set(file.keys()):
                return None
            scores = np.asarray(file.get_tensor("per_sample"), dtype=np.float64)
            labels = np.asarray(file.get_tensor("label_tokens"), dtype=np.float64)
    except (OSError, SafetensorError) as error:
        raise Damaged(
            f"cannot be read: {error}",
            where=str(path),
            remedy="Run its sweep again.",
        ) from error
    groups = metadata.get("groups", "").split("\n")
    if scores.shape != (len(groups), labels.shape[0]):
        raise Damaged(
            f"holds scores of shape {scores.shape} for {len(groups)} groups "
            f"and {labels.shape[0]} samples",
            where=str(path),
            remedy="Run its sweep again.",
        )
    # Of text, a label is a real token predicted from a real token: one fewer than real tokens.
    of_labels = method == "gradient" or metadata.get("modality") == "image_text"
    tokens = labels if of_labels else labels + 1
    kept = np.asarray(np.isfinite(scores).all(axis=1))
    names = tuple(name for name, keep in zip(groups, kept, strict=True) if keep)
    return SampleScores(names, scores[kept], tokens)
