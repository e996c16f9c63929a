"""The rotation that spreads what a few channels hold over all channels of a head."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(dim: int) -> Tensor:
    """Orthogonal [dim, dim] (float64): normalized Hadamard blocks, as large as the power of two in `dim` allows."""
    block = torch.ones(1, 1, dtype=torch.float64)
    while dim % (2 * block.shape[0]) == 0:
        block = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), block)
    return torch.block_diag(*[block / block.shape[0] ** 0.5] * (dim // block.shape[0]))
