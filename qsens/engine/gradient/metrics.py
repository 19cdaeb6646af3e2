"""What a gradient says of an output error: a squared norm, or inner products. Needs torch.

``gradient`` takes ``sum((G * dY)^2)`` over tokens and channels, ModelOpt's score. ``fisher`` takes
the inner product ``sum(G * dY)`` of every draw of labels, whose square is, in the mean, twice the
KL divergence: see :mod:`qsens.engine.gradient.fisher`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from qsens.engine.activations import ModuleActivations
from qsens.engine.gradient.buffers import RowStatistics
from qsens.engine.gradient.error_norms import RowSpan, score_norms, score_products
from qsens.engine.gradient.experts import Mixture


class Metric(Protocol):
    """What is measured of a module's output error, given the gradient there."""

    @property
    def draws(self) -> int:
        """Return how many draws of labels go backward; 0 where the labels are the samples' own."""
        ...

    @property
    def exact(self) -> bool:
        """Return whether inputs are quantized to float32, and outputs made of them in float32.

        Those of the module as it is are made anew then: no rounding of the model's data type is in
        their difference.
        """
        ...

    def measure(
        self,
        changed: torch.Tensor,
        rows: ModuleActivations,
        spans: tuple[RowSpan, ...],
        statistics: RowStatistics,
        position: int,
    ) -> None:
        """Book what changed outputs of a module do; they are used up.

        Args:
            changed: The candidates' outputs, ``(rows, out)``.
            rows: The module's own inputs, outputs and gradients.
            spans: Which rows of ``changed`` are whose.
            statistics: Receives the norms.
            position: The place of the module there.
        """
        ...

    def of_experts(self, mixture: Mixture, measured: torch.Tensor, count: int) -> torch.Tensor:
        """Return the scores of single experts, ``(experts, samples)``.

        Args:
            mixture: The mixture.
            measured: What was measured of each pair of a row and an expert.
            count: Rows of the window that count.
        """
        ...


class GradientNorm:
    """``sum((G * dY)^2)``, with ``dY`` in the model's own data type, as ModelOpt takes it."""

    draws = 0
    exact = False

    def measure(
        self,
        changed: torch.Tensor,
        rows: ModuleActivations,
        spans: tuple[RowSpan, ...],
        statistics: RowStatistics,
        position: int,
    ) -> None:
        """See :meth:`Metric.measure`."""
        score_norms(
            changed,
            rows.outputs,
            rows.grad_output[0],
            spans,
            errors=statistics.errors[position],
            scores=statistics.scores[position],
        )

    def of_experts(self, mixture: Mixture, measured: torch.Tensor, count: int) -> torch.Tensor:
        """See :meth:`Metric.of_experts`."""
        return mixture.sums(measured.square(), count)


@dataclass(frozen=True)
class FisherProduct:
    """``sum(G * dY)`` of every draw.

    Attributes:
        draws: Draws of labels.
        exact: As of :class:`Metric`: wherever the model rounds more than float32.
    """

    draws: int
    exact: bool

    def measure(
        self,
        changed: torch.Tensor,
        rows: ModuleActivations,
        spans: tuple[RowSpan, ...],
        statistics: RowStatistics,
        position: int,
    ) -> None:
        """See :meth:`Metric.measure`."""
        score_products(
            changed,
            rows.outputs,
            rows.grad_output,
            spans,
            errors=statistics.errors[position],
            scores=statistics.products[:, position],
        )

    def of_experts(self, mixture: Mixture, measured: torch.Tensor, count: int) -> torch.Tensor:
        """See :meth:`Metric.of_experts`."""
        return mixture.sums(measured.T.contiguous(), count).square().mean(dim=-1) / 2
