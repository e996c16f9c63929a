"""Rotations of the channels of a head."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(dim: int) -> Tensor:
    """Orthogonal [dim, dim] (float64): normalized Hadamard blocks, as large as the power of two in `dim` allows."""
    block = torch.ones(1, 1, dtype=torch.float64)
    while dim % (2 * block.shape[0]) == 0:
        block = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), block)
    rotation: Tensor = torch.block_diag(*[block / block.shape[0] ** 0.5] * (dim // block.shape[0]))
    return rotation


def rotate_heads(x: Tensor, rotation: Tensor) -> Tensor:
    """`x` [B, H, S, d] times the rotation [Hkv, d, d] of the key head that each head belongs to, in the rotation's
    precision; shape and dtype of `x`."""
    groups = x.unflatten(1, (rotation.shape[0], -1)).to(rotation.dtype)
    return torch.einsum("bhgsc,hcd->bhgsd", groups, rotation).flatten(1, 2).to(x.dtype)
