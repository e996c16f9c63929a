"""How far the logits of one model are from those of another."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 256
"""Rows of logits that are compared at a time: vocabularies are large."""


def relative_norm(out: Tensor, reference: Tensor) -> float:
    """‖out - reference‖ / ‖reference‖ in float64."""
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def divergences(out: Tensor, reference: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """KL(reference ‖ out) (float64 [N]) of the distributions that the rows of logits [N, V] stand for, in nats, from
    probabilities in `dtype`; rounding cannot make it negative."""
    found = []
    for ours, theirs in zip(out.split(ROWS), reference.split(ROWS), strict=True):
        log_p, log_q = theirs.to(dtype).log_softmax(-1), ours.to(dtype).log_softmax(-1)
        found.append((log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64).clamp(min=0))
    return torch.cat(found)
