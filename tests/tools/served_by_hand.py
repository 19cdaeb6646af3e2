"""What a served model costs, from the whole distributions of both models, by numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


@torch.no_grad()
def by_hand(
    reference: Any, other: Any, texts: list[list[int]], top_k: int, spans: list[Any] | None = None
) -> dict[str, Any]:
    """Return the figures from the whole distributions of both models.

    Args:
        reference: The model that is served, unquantized.
        other: The model that the server has.
        texts: Token ids of each sample.
        top_k: Tokens that the server names.
        spans: Positions that count in each sample; all when not given.
    """
    nats = full = lost = outside = 0.0
    positions = labels = 0
    for at, ids in enumerate(texts):
        p, q = (
            model(torch.tensor([ids])).logits[0].double().softmax(-1).numpy()
            for model in (reference, other)
        )
        for position in range(len(ids)) if spans is None else spans[at]:
            full += float((p[position] * np.log(p[position] / q[position])).sum())
            named = set(np.argsort(-q[position])[:top_k].tolist())
            named.add(ids[position + 1] if position + 1 < len(ids) else ids[-1])
            inside = sorted(named)
            kept_p, kept_q = p[position][inside], q[position][inside]
            nats += float((kept_p * np.log(kept_p / kept_q)).sum())
            if len(inside) < p.shape[1]:
                rest_p, rest_q = 1 - kept_p.sum(), 1 - kept_q.sum()
                nats += float(rest_p * np.log(rest_p / rest_q))
                outside += float(rest_p)
            positions += 1
            if position + 1 < len(ids):
                label = ids[position + 1]
                lost += float(np.log(p[position][label] / q[position][label]))
                labels += 1
    return {
        "tokens": positions,
        "labels": labels,
        "divergence": nats / positions,
        "full": full / positions,
        "loss": lost / labels,
        "outside": outside / positions,
    }
