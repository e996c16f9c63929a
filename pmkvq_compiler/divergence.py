"""How far the logits of one model are from those of another."""

from __future__ import annotations

import torch
from torch import Tensor

AT_ONCE = 1 << 24
"""How many logits are compared at a time. Vocabularies are large, and so are copies of many rows."""


def relative_norm(out: Tensor, reference: Tensor) -> float:
    """‖out - reference‖ / ‖reference‖ in float64."""
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def divergences(out: Tensor, reference: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """KL(reference ‖ out) in nats (float64 [N]) between the token distributions that rows of logits [N, V] give.

    Probabilities are computed in `dtype`. A divergence that rounding would make negative is 0.
    """
    found, rows = [], max(1, AT_ONCE // out.shape[-1])
    for ours, theirs in zip(out.split(rows), reference.split(rows), strict=True):
        log_p, log_q = theirs.to(dtype).log_softmax(-1), ours.to(dtype).log_softmax(-1)
        found.append((log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64).clamp(min=0))
    return torch.cat(found)
