"""The head of a model: what it reads, and a model without it. Needs torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qsens.checkpoint.structure import head_of
from qsens.data.samples import Batch
from qsens.errors import UserError

# Rows of the head's output that are held at once in more than the model's own data type.
HEAD_ROWS = 512


def plain_head(model: Any) -> nn.Linear:
    """Return the output embedding of a model whose logits are all that it makes.

    Raises:
        UserError: What the model does after its head is more than a linear module.
    """
    head = head_of(model)
    config = model.config.get_text_config()
    bent = getattr(config, "final_logit_softcapping", None) or getattr(
        config, "logits_scaling", None
    )
    if not isinstance(head, nn.Linear) or bent:
        raise UserError(
            "its logits are not simply those of a linear head",
            where=type(model).__name__,
            remedy="Use autoquant.engine=modelopt for this model.",
        )
    return head


@contextmanager
def without_head(head: nn.Linear) -> Iterator[None]:
    """Make a model give what its head reads, in place of logits, while the context lasts."""
    head.forward = _identity  # type: ignore
    try:
        yield
    finally:
        del head.forward


def head_input(model: Any, batch: Batch) -> torch.Tensor:
    """Return what the head reads, ``(samples, longest, hidden)``, of a model without its head.

    No mask is handed over: padding stands on the right, where no real token looks under causal
    attention, and attention kernels are several times faster without one.

    Args:
        model: The model, within :func:`without_head`.
        batch: The batch, on the model's device.
    """
    output = model(**batch.inputs(), use_cache=False)
    hidden: torch.Tensor = output.logits
    return hidden


def _identity(hidden: torch.Tensor) -> torch.Tensor:
    return hidden
