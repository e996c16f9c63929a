"""Products with experts: the rows of one matrix, sorted by expert, each times the matrix of its own expert."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`x` [R, K] times `weights` [E, K, N]: [R, N]. The rows of expert e end before row `ends[e]` ([E], int32)."""
    product: Tensor = torch.ops.aten._grouped_mm.default(x, weights, ends)
    return product


def grouped_mm_without_numbers(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """What `grouped_mm` returns on a device without memory, for which torch has it in bfloat16 alone."""
    return x.new_empty(len(x), weights.shape[-1])


def grouped_mm_on_device(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`grouped_mm` for few rows, of which the host reads nothing, so that a CUDA graph can hold it.

    Where torch has no kernel for it, the host reads `ends` and multiplies the rows of one expert after the other.
    """
    if x.dtype == torch.bfloat16 and has_kernel(x.device):
        return grouped_mm(x, weights, ends)
    rows, experts = torch.arange(len(x), dtype=ends.dtype, device=x.device), len(weights)
    own = torch.searchsorted(ends, rows, right=True)  # the expert of each row
    if 3 * len(x) < experts:  # taking a matrix for each row reads it twice and writes it once
        return torch.bmm(x.unsqueeze(1), weights[own]).squeeze(1)
    return torch.matmul(x, weights)[own, rows]


def has_kernel(device: torch.device) -> bool:
    """Whether torch has a kernel for `grouped_mm` in bfloat16 on a device. For other dtypes it has none."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
