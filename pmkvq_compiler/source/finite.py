"""Checks that weights are numbers, and that a dtype can hold them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pmkvq_compiler.errors import CompileError


def check_finite(name: str, value: Tensor) -> None:
    """Raises `CompileError` if a weight has NaN or infinite numbers."""
    if not math.isfinite(reach(value)):
        small = " or holds more than float16 does: try --dtype bfloat16, or" if value.dtype == torch.float16 else ","
        raise CompileError(
            f"weight {name} has NaN or infinite numbers; the checkpoint is damaged{small} fetch it again"
        )


def check_fits(name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Raises `CompileError` if a weight is not finite, or would not be finite in `dtype`."""
    check_finite(name, value)
    if reach(value) > torch.finfo(dtype).max:
        raise CompileError(
            f"weight {name} reaches {reach(value):.3g}, more than {str(dtype).removeprefix('torch.')} holds; "
            f"choose --dtype bfloat16 or float32"
        )


def reach(value: Tensor) -> float:
    """The largest absolute value, or NaN if there is one. This reads the numbers once and does not copy them."""
    if not value.is_floating_point() or value.numel() == 0:
        return 0.0
    low, high = value.aminmax()
    return max(-float(low), float(high))
