"""KL divergence where only some of a distribution is known: the rest is one lumped token.

Needs torch. A server gives the log-probabilities ``q`` of a few tokens ``S`` at each position; the
distribution ``p`` is known whole. With ``R`` the tokens outside ``S``, by the chain rule

    ``KL(p || q) = KL(p(S) || q(S)) + p(S) KL(p | S || q | S) + p(R) KL(p | R || q | R)``,

where the first term is that of two coins. The last one is unknown and not negative, so the first
two are a lower bound: the divergence of the two distributions with ``R`` as one token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qsens.engine.kl.divergence import divergences

# Log-probabilities are given in float32: their sum is 1 up to a few units in the last place of a
# logit, and what is missing of 1 by less says nothing.
_ROUNDING = 1e-5
# A log-probability of nothing, equal in both distributions.
_ABSENT = -1e4


@dataclass(frozen=True)
class LumpedDivergence:
    """Lower bounds of divergences, row by row.

    Attributes:
        nats: The bound, ``(rows,)``, float64.
        outside_p: Probability of the tokens that were not given, under ``p``, likewise.
        outside_q: The same under ``q``.
    """

    nats: torch.Tensor
    outside_p: torch.Tensor
    outside_q: torch.Tensor


def lumped_divergences(
    logits: torch.Tensor, ids: torch.Tensor, log_q: torch.Tensor
) -> LumpedDivergence:
    """Return the lower bound of ``KL(p || q)`` that the given tokens allow, in nats.

    Where all tokens are given it is the divergence itself. Where ``q`` leaves the others less than
    its own rounding, the divergence of the coins is left out: the bound stays one.

    Args:
        logits: Logits of ``p``, ``(rows, vocabulary)``.
        ids: The tokens that are given, no token twice, ``(rows, tokens)``, int64; -1 where a row
            has fewer.
        log_q: Their log-probabilities, same shape, float64.
    """
    given = ids >= 0
    known = ids.clamp_min(0).to(logits.device)
    scores = logits.double()
    log_p = (scores.gather(1, known) - scores.logsumexp(dim=1, keepdim=True)).to(ids.device)
    log_p = log_p.masked_fill(~given, _ABSENT)
    log_q = log_q.masked_fill(~given, _ABSENT)
    inside_p, inside_q = log_p.exp().sum(dim=1), log_q.exp().sum(dim=1)
    whole = given.sum(dim=1) == logits.shape[1]
    outside_p = (1 - inside_p).clamp_min(0).masked_fill(whole, 0)
    outside_q = (1 - inside_q).clamp_min(0).masked_fill(whole, 0)
    coins = _excess(outside_p, outside_q) + _excess(1 - outside_p, 1 - outside_q)
    coins = torch.where(outside_q > _ROUNDING, coins, 0)
    within = (1 - outside_p) * divergences(log_p, log_q)[0]
    return LumpedDivergence(coins + within, outside_p, outside_q)


def _excess(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return ``p log(p / q) - p + q``, which is not negative and sums to a divergence."""
    return torch.xlogy(p, p / q) - p + q
