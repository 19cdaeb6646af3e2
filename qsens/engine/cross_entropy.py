"""Cross-entropy of next tokens: labels, losses, the gradient at the logits. Needs torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qsens.data.samples import Batch


def next_tokens(batch: Batch) -> torch.Tensor:
    """Return the label of every position, ``(samples, longest)``, -1 where there is none."""
    labels = torch.full_like(batch.input_ids, -1)
    labels[:, :-1] = batch.input_ids[:, 1:].masked_fill(~batch.label_mask(), -1)
    return labels


def negative_log_likelihood(log_p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return each row's loss in nats, ``(rows,)``, float64; 0 where there is no label.

    Args:
        log_p: Log-probabilities, ``(rows, vocabulary)``.
        labels: ``(rows,)``, -1 where there is none.
    """
    picked = log_p.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    return -picked.double() * (labels >= 0)


def with_gradient(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of the summed loss at ``logits``, in their dtype, and each row's loss.

    The gradient is ``softmax - one_hot``.

    Args:
        logits: ``(rows, vocabulary)``.
        labels: ``(rows,)``, all of them labels.
    """
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    losses = negative_log_likelihood(log_p, labels)
    grad_output = log_p.exp_()
    picked = labels[:, None]
    grad_output.scatter_add_(1, picked, grad_output.new_full(picked.shape, -1.0))
    return grad_output.to(logits.dtype), losses


def losses_of(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the loss of each sample in nats, summed over its labels, ``(samples,)``, float64.

    Autograd can go backward from it. Logarithms are taken in float32, a sample at a time.

    Args:
        logits: ``(samples, tokens, vocabulary)``.
        batch: The batch, on any device.
    """
    rows = [
        F.cross_entropy(one.float(), own, reduction="none", ignore_index=-1).double().sum()
        for one, own in zip(logits, next_tokens(batch).to(logits.device), strict=True)
    ]
    return torch.stack(rows)
