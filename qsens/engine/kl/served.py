"""How far what a server computes lies from the model that it was made of. Needs torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import nn

from qsens.data.samples import Samples
from qsens.engine.float32 import in_float32
from qsens.engine.head import Head, head_input, without_head
from qsens.engine.kl.lumped import lumped_divergences
from qsens.engine.kl.whole import per_token, whole_batches
from qsens.engine.layer_stream import IN_TURNS, device_of, run_in_turns

# Rows whose logits are held at once in float64.
_ROWS = 64


@dataclass(frozen=True)
class PromptLogprobs:
    """What a server says of the tokens of a prompt.

    Attributes:
        ids: ``(tokens - 1, given)``, int64: the prompt's own next token, then the others that are
            given at that position, -1 where there are fewer.
        logprobs: Their log-probabilities, same shape, float64.
    """

    ids: np.ndarray[Any, Any]
    logprobs: np.ndarray[Any, Any]


@dataclass(frozen=True)
class ServedDivergence:
    """How far a server is from a model, summed over each sample, ``(samples,)``, float64.

    Attributes:
        nats: Lower bound of the KL divergence, see :mod:`qsens.engine.kl.lumped`.
        outside_p: Probability that the model gives the tokens that the server did not name.
        outside_q: Probability that the server gives them.
        tokens: Positions that these are summed over.
        lost: ``log p - log q`` of the labels: how much more loss the server has, nats.
        labels: Labels.
    """

    nats: np.ndarray[Any, Any]
    outside_p: np.ndarray[Any, Any]
    outside_q: np.ndarray[Any, Any]
    tokens: np.ndarray[Any, Any]
    lost: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]

    @classmethod
    def joined(cls, parts: Sequence[ServedDivergence]) -> ServedDivergence:
        """Return that of the samples of all parts, in their order."""
        names = [field.name for field in fields(cls)]
        return cls(
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        )

    def numbers(self) -> dict[str, Any]:
        """Return it a token, with standard errors over samples; none of a single sample."""
        divergence, divergence_error = per_token(self.nats, self.tokens)
        loss, loss_error = per_token(self.lost, self.labels)
        several = len(self.nats) > 1
        return {
            "samples": len(self.nats),
            "tokens": int(self.tokens.sum()),
            "labels": int(self.labels.sum()),
            "divergence": divergence,
            "divergence_error": divergence_error if several else None,
            "outside": {
                "reference": per_token(self.outside_p, self.tokens)[0],
                "served": per_token(self.outside_q, self.tokens)[0],
            },
            "loss": loss,
            "loss_error": loss_error if several else None,
        }


@torch.no_grad()
def compare_served(
    model: nn.Module, samples: Samples, served: Sequence[PromptLogprobs]
) -> ServedDivergence:
    """Compare a server with a model that computes in float32, its weights as they are stored.

    Positions are those of measured KL: see :meth:`qsens.data.samples.Batch.predicts`.

    Args:
        model: The model, on its device or streamed to it.
        samples: Samples of text.
        served: What the server says of each sample, with one token behind its last one.
    """
    columns = {
        name: np.zeros(len(samples))
        for name in ("nats", "outside_p", "outside_q", "tokens", "lost", "labels")
    }
    head = Head.of(model)
    batches = whole_batches(samples, device_of(model))
    for start in range(0, len(batches), IN_TURNS):
        window = batches[start : start + IN_TURNS]
        with in_float32(model):
            with without_head(head.module):
                runs = [functools.partial(head_input, model, batch) for batch in window]
                read = run_in_turns(model, runs)
            for batch, hidden in zip(window, read, strict=True):
                counts, labels = batch.predicts().cpu(), batch.label_mask().cpu()
                for row, sample in enumerate(batch.samples):
                    found = _compared(head, hidden[row], served[sample], counts[row], labels[row])
                    for name, value in found.items():
                        columns[name][sample] = value
    return ServedDivergence(**columns)


def _compared(
    head: Head,
    hidden: torch.Tensor,
    served: PromptLogprobs,
    counts: torch.Tensor,
    labels: torch.Tensor,
) -> dict[str, float]:
    """Return the sums over one sample.

    Args:
        head: The head.
        hidden: What it reads, ``(tokens, hidden)``.
        served: What the server says.
        counts: Where a distribution counts, ``(tokens,)``, bool.
        labels: Where the next token is a label, ``(tokens - 1,)``, bool.
    """
    ids, log_q = torch.from_numpy(served.ids), torch.from_numpy(served.logprobs)
    is_label = torch.zeros_like(counts)
    is_label[:-1] = labels
    sums = dict.fromkeys(("nats", "outside_p", "outside_q", "lost"), 0.0)
    for rows in torch.split(counts.nonzero()[:, 0], _ROWS):
        logits = head(hidden[rows.to(hidden.device)])
        lumped = lumped_divergences(logits, ids[rows], log_q[rows])
        own = ids[rows, :1].to(logits.device)
        log_p = logits.double().log_softmax(dim=1).gather(1, own)[:, 0].cpu()
        sums["nats"] += float(lumped.nats.sum())
        sums["outside_p"] += float(lumped.outside_p.sum())
        sums["outside_q"] += float(lumped.outside_q.sum())
        sums["lost"] += float((log_p - log_q[rows, 0])[is_label[rows]].sum())
    return sums | {"tokens": float(counts.sum()), "labels": float(labels.sum())}
